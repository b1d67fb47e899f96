"""Everything that a run needs, built from its file: samples and their order, autoencoder, tokenizer, model, inputs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from x2i.base.errors import RecipeError
from x2i.base.files import atomic
from x2i.base.seeds import digest
from x2i.corpus.corpus import Corpus
from x2i.model import deferred, lora, registry, weights
from x2i.model import vae as vaes
from x2i.model.base import Model, Processor
from x2i.model.config import AutoencoderKLConfig, ModelConfig, PixelsConfig, VAEConfig
from x2i.model.folders import Held
from x2i.model.layouts import Opened
from x2i.trainer import checkpoint, checks, measuring, parallel, parts, preview, tokens
from x2i.trainer.batch import Batch, Batcher
from x2i.trainer.checkpoint import Checkpoint
from x2i.trainer.config import RunConfig
from x2i.trainer.course import Origin
from x2i.trainer.data import DamagedSample, Example, SampleReader
from x2i.trainer.mixture import held_out_of, plan_of, table_of, tasks_of
from x2i.trainer.plan import Plan
from x2i.trainer.stage import Stage

log = logging.getLogger(__name__)


class Setup:
    """A run that is ready to train, or to be looked at. All random choices derive from the run's seed.

    Attributes:
        run: its file.
        table: its samples; `plans`: their order, by stage; `tasks`: those that any stage draws.
        reader: reads and decodes them.
        vae, tokenizer: with `processors`, by stage, they make a model's inputs.
        weights: the name of those that the run starts from, if any.
        model: with the weights of `newest`, or those that the run starts from; among several ranks without any, on the
            meta device, until it is divided and `fill` is called.
        batchers: make training batches, by stage.
        device: where the model computes; it is not moved there yet.
    """

    def __init__(
        self,
        run: RunConfig,
        corpora: Sequence[Corpus],
        newest: Checkpoint | None,
        device: str | None = None,
        share: tuple[int, int] | None = None,
        note: Callable[[str], None] = log.info,
    ) -> None:
        """Build it all.

        Args:
            run: the file.
            corpora: those that it names, opened.
            newest: the checkpoint to take tokenizer and weights from; None to start.
            device: where to compute, if not where the run file says.
            share: of `World.share`: which part of the weights this rank will hold.
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
        self._numbers, vae = self._described()
        self.vae_config = run.vae or vae or PixelsConfig()
        self.vae = vaes.build(self.vae_config).to(self.device)
        processor = registry.processor_class(self._numbers.architecture)
        self.tokenizer = self._build_tokenizer(processor)
        self._share = share
        self.model, self._fresh = self._build_model(keep=newest is None)
        if share is None:
            self.fill()
            self.begin()
        self.processors = [
            processor(
                registry.read_as(self.model.config, stage.inputs, f"stages.{place}.inputs"),
                *(self.tokenizer, self.vae, run.max_text_tokens),
            )
            for place, stage in enumerate(run.stages)
        ]
        self.batchers = [Batcher(p, self.vae, self.device) for p in self.processors]
        checks.check_stages(run, self.table, self.model, self.processors, self.reader)
        self.plans = [early.get(place) or self._packed(place) for place in range(len(run.stages))]
        preview.check(run.preview)

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
            tied = weights.aliases(rest)  # the file has these once
            weights.fill({n: t for n, t in rest.items() if n not in tied}, place)
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
            if self._base is None:
                model, fresh = self._build_model(keep=True)
                self._fresh = fresh or {name: p.detach() for name, p in model.named_parameters()}
            self._start()
            if self._base is None:
                self._begin_parts()

    def fill(self) -> None:
        """Read the weights that the run goes on or starts with into `model`, divided or not.

        Raises:
            RecipeError, X2IError: they cannot be had, or are of another model.
        """
        if self._newest is None or self.run.model.lora is not None:
            self._start()
        if self._newest is not None:
            with checkpoint.resuming(self._newest.path):
                self.load(self._newest.path)
        self._opened = None  # it has the weights once more

    def begin(self) -> None:
        """What follows `fill` where a run starts: all ranks together make what depends on parts that were read."""
        if self._newest is None and self._base is None:
            self._begin_parts()

    def build_like(self) -> Model[Any]:
        """Another model of the same numbers, on the meta device, to be divided and filled with weights."""
        model, _ = deferred.build(lambda: registry.build(self.model.config), keep=False)
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
            with checkpoint.resuming(self._newest.path):
                return tokens.load(self._newest.path)
        if self.run.tokenizer is not None:
            return tokens.build(self.run.tokenizer, self.reader, processor, self.tasks)
        assert self._base is not None
        return tokens.load(self._base) if self._opened is None else self._opened.tokenizer

    def _build_model(self, keep: bool) -> tuple[Model[Any], dict[str, Tensor] | None]:
        """The network; and, where it has no weights yet and they are to be fresh ones (`keep`), this rank's share of them."""
        run, vocabulary = self.run, self.tokenizer.get_vocab_size()
        trained = run.tokenizer is not None and run.tokenizer.train is not None
        rows = vocabulary if trained else max(vocabulary, self._rows)
        config = self._numbers.adapted(vocab_size=rows, latent_channels=self.vae.channels)
        seed = int(digest("weights/1", run.seed)[:15], 16)
        fresh: dict[str, Tensor] | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self._share is None:
                model = registry.build(config)
            else:
                keep = keep and self._base is None
                model, fresh = deferred.build(lambda: registry.build(config), *self._share, keep)
        if run.model.lora is not None:
            lora.attach(model, run.model.lora, seed)
        return model, fresh

    def _start(self) -> None:
        """Fill the model with what the run starts from: weights, or fresh ones with parts of other models."""
        for layer in lora.adapters(self.model).values():
            layer.renew()
        if self._base is not None:
            checkpoint.load_weights(self.model, self._base, self._opened)
            return
        parameters = dict(self.model.named_parameters())
        while self._fresh:
            name, part = self._fresh.popitem()
            parallel.local(parameters[name].detach()).copy_(part)
        for part, spec in self.run.model.pretrained.items():
            if part not in self.model.pretrained:
                known = ", ".join(self.model.pretrained) or "none"
                raise RecipeError(f"model.pretrained: no part {part!r} is found in other models; those are: {known}")
            path = checkpoint.fetched(spec)
            weights.load_part(self.model, path, weights.prefixed(self.model, path, self.model.pretrained[part]))

    def _begin_parts(self) -> None:
        """Tell a fresh model which of its parts were read from other models' checkpoints."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(digest("begin/1", self.run.seed)[:15], 16))
            self.model.begin(tuple(self.run.model.pretrained))


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
