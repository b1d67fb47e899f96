"""Everything that a run needs, built from its file: samples and their order, autoencoder, tokenizer, model, inputs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from x2i.base.errors import RecipeError, X2IError
from x2i.base.files import atomic
from x2i.base.seeds import digest
from x2i.corpus.corpus import Corpus
from x2i.model import lora, registry, weights
from x2i.model import vae as vaes
from x2i.model.base import Model, Processor
from x2i.model.config import AutoencoderKLConfig, ModelConfig, PixelsConfig, VAEConfig
from x2i.model.folders import Held
from x2i.model.layouts import Opened
from x2i.trainer import checkpoint, measuring, parts, preview, tokens
from x2i.trainer.batch import Batch, Batcher
from x2i.trainer.checkpoint import Checkpoint
from x2i.trainer.config import RunConfig
from x2i.trainer.course import Origin
from x2i.trainer.data import DamagedSample, Example, SampleReader
from x2i.trainer.mixture import held_out_of, plan_of, table_of, tasks_of, training_of
from x2i.trainer.plan import Plan
from x2i.trainer.stage import Stage

log = logging.getLogger(__name__)

#: Samples of a task that are read to see whether they tell which answer is worse.
_ASKED = 16


class Setup:
    """A run that is ready to train, or to be looked at. All random choices derive from the run's seed.

    Attributes:
        run: its file.
        table: its samples; `plans`: their order, by stage; `tasks`: those that any stage draws.
        reader: reads and decodes them.
        vae, tokenizer: with `processors`, by stage, they make a model's inputs.
        weights: the name of those that the run starts from, if any.
        model: with the weights of `newest`, or those that the run starts from.
        batchers: make training batches, by stage.
        device: where the model computes; it is not moved there yet.
    """

    def __init__(
        self,
        run: RunConfig,
        corpora: Sequence[Corpus],
        newest: Checkpoint | None,
        device: str | None = None,
        note: Callable[[str], None] = log.info,
    ) -> None:
        """Build it all.

        Args:
            run: the file.
            corpora: those that it names, opened.
            newest: the checkpoint to take tokenizer and weights from; None to start.
            device: where to compute, if not where the run file says.
            note: is told what takes long.

        Raises:
            RecipeError: the file asks for what the corpora, the model or the weights do not have.
            X2IError: weights cannot be had.
        """
        self.run, self._note = run, note
        if run.cpu_threads is not None:
            torch.set_num_threads(run.cpu_threads)
        self.table = table_of(corpora, run.stages, run.held_out)
        early = {
            place: plan_of(self.table, stage, run.seed, shuffle=run.shuffle)
            for place, stage in enumerate(run.stages)
            if stage.pack is None
        }
        self.tasks = {task for stage in run.stages for task in tasks_of(self.table, stage)}
        self.device = _device(device or run.device)
        reading = run.reading
        self.reader = SampleReader(self.table, reading.cache_mib << 20, run.decode, reading.verify, reading.open_files)
        # those that the run began with, though it began with another run's newest, which now may be a later one
        begun = None if newest is None or run.model.weights is None else newest.info.get("weights")
        self.weights = begun or (None if run.model.weights is None else checkpoint.pinned(run.model.weights))
        self._base = None if self.weights is None else checkpoint.fetched(self.weights)
        self._newest = newest
        self._opened = None if self._base is None else checkpoint.published(self._base)
        numbers, vae = self._described()
        self.vae_config = run.vae or vae or PixelsConfig()
        self.vae = vaes.build(self.vae_config).to(self.device)
        processor = registry.processor_class(numbers.architecture)
        self.tokenizer = self._build_tokenizer(processor)
        self.model = self._build_model(numbers, start=newest is None)
        self.processors = [
            processor(
                registry.read_as(self.model.config, stage.inputs, f"stages.{place}.inputs"),
                *(self.tokenizer, self.vae, run.max_text_tokens),
            )
            for place, stage in enumerate(run.stages)
        ]
        self.batchers = [Batcher(p, self.vae, self.device) for p in self.processors]
        self._check_stages()
        self.plans = [early.get(place) or self._packed(place) for place in range(len(run.stages))]
        preview.check(run.preview)
        if newest is not None:
            self.load(newest.path)

    def batches(self, place: int, step: int) -> list[Batch]:
        """The batches of step `step` (from 0) of the stage at `place`: what the training sees of it."""
        stage, plan = self.run.stages[place], self.plans[place]
        draws = {draw.index: draw for draw in plan.step(step)}
        examples = [self.reader.planned(plan, draw, stage) for draw in draws.values()]
        return self.batchers[place].training(examples, self.run.seed, stage, draws=draws)

    def load(self, place: Path) -> None:
        """Read the weights of a checkpoint of this run into the model, and the adapters that its stage has put on."""
        if self.run.model.lora is None and (adapted := parts.resumable(self.model)):
            rest = {n: t for n, t in self.model.state_dict().items() if n not in adapted}
            weights.fill(rest, place)
            weights.fill(adapted, place / checkpoint.ADAPTED)
        elif self.run.model.lora is None:
            weights.load(self.model, place)
        else:
            state = {lora.PREFIX + n: t for n, t in lora.adapter_state(self.model).items()}
            weights.fill(state, place / checkpoint.ADAPTER / lora.WEIGHTS)

    def load_origin(self, origin: Origin) -> None:
        """Read what a stage begins with into the model: the end of another, other weights, or the run's own beginning.

        Raises:
            X2IError: they cannot be had, or are of another model.
            RecipeError: they read other words.
        """
        if isinstance(origin, str):
            place = checkpoint.fetched(origin)
            file = place / tokens.FILE
            if file.is_file() and tokens.load(place).to_str() != self.tokenizer.to_str():
                raise RecipeError(f"start: {origin} has another tokenizer than this run, and so other words: {file}")
            checkpoint.load_weights(self.model, place)
        elif origin:
            self.load(checkpoint.folder(self.run.output, origin))
        else:
            fresh = self._build_model(self._described()[0], start=True).state_dict()
            for name, tensor in self.model.state_dict().items():
                weights.assign(tensor, fresh[name])

    def build_like(self) -> Model[Any]:
        """Another model of the same numbers, on the CPU, to be filled with weights."""
        model = registry.build(self.model.config)
        if self.run.model.lora is not None:
            lora.attach(model, self.run.model.lora)
        return model

    def held_out(self, stage: Stage) -> dict[str, list[Example]]:
        out: dict[str, list[Example]] = {}
        for task, samples in held_out_of(self.table, stage).items():
            for sample in samples.spread(self.run.held_out_samples):
                with contextlib.suppress(DamagedSample):  # logged when the trainer meets it
                    out.setdefault(task, []).append(self.reader.read(sample, stage.side(task in self.table.chats)))
        return out

    def _packed(self, place: int) -> Plan:
        """The plan of a packed stage, by what the model makes of the samples."""
        stage = self.run.stages[place]
        if not self.model.packs:
            raise RecipeError(
                f"stages.{place}.pack: {self.model.config.architecture} is trained on batches: give `batch` instead"
            )
        if stage.preference is not None:
            raise RecipeError(f"stages.{place}.pack: preferences are learned in batches: give `batch` instead")
        keep = self.run.output / measuring.FILE
        lengths = measuring.lengths_of(self.processors[place], self.reader, stage, keep, self._note)
        return plan_of(self.table, stage, self.run.seed, lengths, self.run.shuffle)

    def _described(self) -> tuple[ModelConfig, VAEConfig | None]:
        """The model's numbers and its autoencoder, from the run file or from beside the weights."""
        spec, base = self.run.model, self._base
        if self._opened is not None:
            beside, vae = self._opened.model.config, self._vae_of(self._opened)
        elif base is not None and (base / checkpoint.CONFIG).is_file():
            file = checkpoint.describe(base)
            beside, vae = registry.config_of(file.architecture, file.model, str(base)), file.vae
        else:
            beside, vae = None, None
        numbers = spec.config(beside)
        if numbers is None:
            raise RecipeError(f"model.weights: {spec.weights} does not say which model it is: give `preset`")
        self._rows = (beside or numbers).vocabulary  # a preset of the weights' kind may have more words than they
        return numbers, vae

    def _vae_of(self, opened: Opened[Any]) -> VAEConfig | None:
        """The autoencoder of a published model; one that lies within its weights is written into the run's folder."""
        if not isinstance(opened.vae, Held):
            return opened.described.vae
        folder = self.run.output / checkpoint.VAE_FOLDER
        if not folder.is_dir():
            try:
                with atomic(folder) as temporary:
                    opened.vae.module.save_pretrained(temporary)
            except OSError:
                if not folder.is_dir():  # otherwise another rank was faster
                    raise
        return AutoencoderKLConfig(kind="autoencoder_kl", weights=str(folder.absolute()))

    def _build_tokenizer(self, processor: type[Processor[Any]]) -> Tokenizer:
        if self._newest is not None:
            return tokens.load(self._newest.path)
        if self.run.tokenizer is not None:
            return tokens.build(self.run.tokenizer, self.reader, processor, self.tasks)
        assert self._base is not None
        return tokens.load(self._base) if self._opened is None else self._opened.tokenizer

    def _build_model(self, numbers: ModelConfig, start: bool) -> Model[Any]:
        """The network; to `start`, with the parts of other models that the run begins with."""
        run, vocabulary = self.run, self.tokenizer.get_vocab_size()
        trained = run.tokenizer is not None and run.tokenizer.train is not None
        rows = vocabulary if trained else max(vocabulary, self._rows)
        config = numbers.adapted(vocab_size=rows, latent_channels=self.vae.channels)
        seed = int(digest("weights/1", run.seed)[:15], 16)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = registry.build(config)
        if self._base is not None:
            checkpoint.load_weights(model, self._base, self._opened)
        elif start:
            self._load_parts(model)
        if run.model.lora is not None:
            lora.attach(model, run.model.lora, seed)
        return model

    def _load_parts(self, model: Model[Any]) -> None:
        """Fill parts of a fresh model from public checkpoints of other models. Raises RecipeError or X2IError."""
        for part, spec in self.run.model.pretrained.items():
            if part not in model.pretrained:
                known = ", ".join(model.pretrained) or "none"
                raise RecipeError(f"model.pretrained: no part {part!r} is found in other models; those are: {known}")
            path = checkpoint.fetched(spec)
            weights.load_part(model, path, weights.prefixed(model, path, model.pretrained[part]))
        model.begin(tuple(self.run.model.pretrained))

    def _check_stages(self) -> None:
        """Refuse what this model cannot learn. Raises RecipeError."""
        for place, stage in enumerate(self.run.stages):
            tasks = tasks_of(self.table, stage)
            chats, pictures = sorted(tasks & self.table.chats), sorted(tasks - self.table.chats)
            if chats and not self.model.answers:
                raise RecipeError(
                    f"stages.{stage.name}.mixture: samples of {', '.join(chats)} have no output image, and this model "
                    "writes no text: leave them out, or give it a head for text (model: {text_head: true})"
                )
            if pictures and not self.model.draws:
                raise RecipeError(
                    f"stages.{stage.name}.mixture: samples of {', '.join(pictures)} are to be drawn, and this model only "
                    "writes text: leave them out"
                )
            if stage.preference is not None and pictures:
                raise RecipeError(f"stages.{stage.name}.preference: {', '.join(pictures)} are drawn, not answered")
            if stage.preference is not None:
                self._check_preferences(stage)
            try:
                if pictures:
                    self.processors[place].check_size(stage.resolution, stage.resolution)
            except X2IError as error:
                raise RecipeError(f"stages.{place}.resolution: {error}") from None
            for width, height in stage.buckets if pictures else ():
                try:
                    self.processors[place].check_size(height, width)
                except X2IError as error:
                    raise RecipeError(f"stages.{place}.buckets: [{width}, {height}]: {error}") from None

    def _check_preferences(self, stage: Stage) -> None:
        """Refuse a stage for whose samples nobody says which answer is worse: no manifest tells. Raises RecipeError."""
        strata: dict[str, list[int]] = {}
        for task, samples in training_of(self.table, stage).items():
            strata.setdefault(task if stage.mixture_by == "task" else "the mixture", []).extend(samples.spread(_ASKED))
        for name, chosen in strata.items():
            worse = []
            for sample in chosen:
                with contextlib.suppress(DamagedSample):  # logged when the trainer meets it
                    worse.append(self.reader.read(sample, 8).rejected)
            if worse and not any(worse):
                raise RecipeError(
                    f"stages.{stage.name}.preference: {len(worse)} samples of {name} were read, and none has a "
                    "rejected_response to learn from: name other tasks in the mixture, or build a corpus that has them (the "
                    "task diagnose makes them with `rejected: true`)"
                )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(f"device: {name!r} is none; give auto, cpu, cuda or cuda:N") from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"device: {name!r} cannot be had here ({str(error).partition('. ')[0]})") from None
    return device
