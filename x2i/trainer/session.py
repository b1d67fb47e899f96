"""One sitting of a run: from a checkpoint (or nothing) through the stages to the end, or to an interruption."""

from __future__ import annotations

import contextlib
import io
import logging
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tokenizers import Tokenizer

from x2i import __version__
from x2i.base.errors import RecipeError, Stopped, X2IError
from x2i.base.seeds import digest
from x2i.corpus.corpus import Corpus
from x2i.model import lora, registry, weights
from x2i.model import vae as vaes
from x2i.model.base import Model, Processor
from x2i.model.config import ModelConfig, ModelFile, PixelsConfig, VAEConfig
from x2i.model.sampling import Painter
from x2i.trainer import checkpoint, preview, tokens
from x2i.trainer.batch import Batcher
from x2i.trainer.checkpoint import Checkpoint
from x2i.trainer.config import RunConfig, Stage
from x2i.trainer.data import DamagedSample, Example, Loader, SampleReader
from x2i.trainer.learner import HeldOutLoss, Learner, RowReport, StepReport
from x2i.trainer.ledger import Entry, Ledger
from x2i.trainer.mixture import held_out_of, plan_of, tasks_of
from x2i.trainer.progress import Progress
from x2i.trainer.run import LOGS, Result, result_of
from x2i.trainer.table import SampleTable

log = logging.getLogger(__name__)

#: Share of the old value in the losses that are shown.
_SMOOTH = 0.95


class Session:
    """Builds everything that a run needs, then runs it. All random choices derive from the run's seed."""

    def __init__(self, run: RunConfig, corpora: list[Corpus], newest: Checkpoint | None, progress: Progress) -> None:
        self._run = run
        self._progress = progress
        if run.cpu_threads is not None:
            torch.set_num_threads(run.cpu_threads)
        self._table = SampleTable(corpora, run.held_out)
        self._plans = [plan_of(self._table, stage, run.seed) for stage in run.stages]
        self._device = _device(run.device)
        self._reader = SampleReader(self._table, run.reading.cache_mib << 20)
        self._base = None if run.model.weights is None else checkpoint.fetched(run.model.weights)
        self._newest = newest
        numbers, vae = self._described()
        self._vae_config = run.vae or vae or PixelsConfig()
        self._vae = vaes.build(self._vae_config).to(self._device)
        processor = registry.processor_class(numbers.architecture)
        self._tokenizer = self._build_tokenizer(processor)
        self._model = self._build_model(numbers, start=newest is None)
        self._processors = [
            processor(
                registry.changed(self._model.config, stage.inputs, f"stages.{place}.inputs"),
                *(self._tokenizer, self._vae, run.max_text_tokens),
            )
            for place, stage in enumerate(run.stages)
        ]
        self._batchers = [Batcher(p, self._vae, self._device) for p in self._processors]
        self._check_stages()
        self._step = newest.step if newest else 0
        if newest is not None:
            self._load(newest.path)
        self._learner = Learner(run, self._model, self._device)
        if newest is not None:
            self._restore(newest.path)
        self._smoothed: dict[str, float] = {}
        self._stop = 0  # the signal that asked for it

    def run(self) -> Result:
        """Train to the end. On SIGINT or SIGTERM: finish the step, write a checkpoint, raise Stopped."""
        from torch.utils.tensorboard import SummaryWriter

        began, first = time.monotonic(), self._step
        self._announce()
        self._ledger = Ledger(self._run.output, self._step)
        self._writer = SummaryWriter(self._run.output / LOGS, purge_step=self._step or None)
        self._progress.start(self._run.total_steps, self._step)
        try:
            with self._interruptible():
                while self._step < self._run.total_steps and not self._stop:
                    self._stage(*self._run.locate(self._step))
        finally:
            self._progress.close()
            self._writer.close()
            self._reader.close()
        assert self._newest is not None
        if self._stop:
            self._progress.note(f"stopped at step {self._step}; the same command goes on from {self._newest.path}")
            raise Stopped(self._stop)
        return result_of(
            self._run,
            self._newest,
            steps_now=self._step - first,
            seconds=time.monotonic() - began,
            train_loss={t: round(v, 6) for t, v in sorted(self._smoothed.items()) if t},
            damaged=[vars(d) for _, d in sorted(self._reader.damaged.items())],
        )

    def _stage(self, place: int, start: int) -> None:
        """Train one stage from step `start` of it to its end, with checkpoints on the way."""
        run, stage, plan = self._run, self._run.stages[place], self._plans[place]
        if start == 0:
            self._begin(place)
            self._smoothed = {}
        loader = Loader(self._reader, plan, stage, start, run.reading)
        for number, examples in enumerate(loader, start):
            began = time.monotonic()
            batches = self._batchers[place].training(examples, run.seed, stage)
            report = self._learner.step(batches, stage, number, self._step)
            self._step += 1
            self._ledger.add(self._entries(stage, report))
            self._log(stage, report, stage.batch / (time.monotonic() - began))
            last = number + 1 == stage.steps
            if last or self._step % run.checkpoint_every == 0:
                self._checkpoint(place, number + 1, full=True)
            elif self._stop:
                self._checkpoint(place, number + 1, full=False)
            if self._stop:
                return

    def _checkpoint(self, place: int, stage_step: int, full: bool) -> None:
        """Write a checkpoint; a full one has held-out losses and a preview."""
        run, stage = self._run, self._run.stages[place]
        losses: dict[str, HeldOutLoss] = {}
        files: dict[str, Any] = {}
        if full:
            with self._learner.averaged():
                losses = self._learner.held_out(self._batchers[place], self._held_out(stage), stage)
                picture = self._preview(place)
            if picture is not None:
                files[checkpoint.PREVIEW] = picture
        files |= self._weights() | {
            checkpoint.CONFIG: ModelFile(
                architecture=self._model.config.architecture,
                model=self._processors[place].config.model_dump(mode="json"),
                vae=self._vae_config if self._model.draws else None,
                max_text_tokens=run.max_text_tokens,
                resolution=stage.resolution,
                chat_resolution=stage.chat_resolution,
                base=None if run.model.lora is None else run.model.weights,
            ).model_dump(mode="json"),
            tokens.FILE: self._tokenizer.to_str(pretty=True).encode(),
            checkpoint.TRAINER: {
                "format": 1,
                "step": self._step,
                "stage": stage.name,
                "stage_step": stage_step,
                "seed": run.seed,
                "run": run.digest,
                "corpora": [{"path": str(c.path), "digest": c.digest} for c in self._table.corpora],
                "held_out": {task: asdict(loss) for task, loss in losses.items()},
                "damaged": [vars(d) for _, d in sorted(self._reader.damaged.items())],
                "versions": {"x2i": __version__, "torch": torch.__version__},
            },
        }
        if stage_step < stage.steps:
            assert self._learner.optimizer is not None
            optimizer = self._learner.optimizer.state_dict()
            files[checkpoint.OPTIMIZER] = lambda path: torch.save(optimizer, path)
        self._ledger.flush(self._step)
        self._newest = checkpoint.write(checkpoint.folder(run.output, self._step), files)
        self._report(losses)
        ends, total = set(), 0
        for each in run.stages:
            ends.add(total := total + each.steps)
        checkpoint.prune(run.output, run.keep, ends)

    def _weights(self) -> dict[str, Any]:
        """The files of the weights: all of them, or the adapters alone."""
        ema = self._learner.ema
        if self._run.model.lora is None:
            state = self._model.state_dict()
            files: dict[str, Any] = {checkpoint.MODEL: lambda path: weights.save(state, path)}
            if ema is not None:
                tied = weights.aliases(state)
                averaged = {n: t for n, t in state.items() if n not in tied} | ema
                files[checkpoint.EMA] = lambda path: weights.save(averaged, path)
            return files
        files = {checkpoint.ADAPTER: self._save_adapter}
        if ema is not None:

            def save_averaged(path: Path) -> None:
                with self._learner.averaged():
                    self._save_adapter(path)

            files[checkpoint.EMA_ADAPTER] = save_averaged
        return files

    def _save_adapter(self, folder: Path) -> None:
        lora.save_adapter(self._model, folder, self._run.model.weights)

    def _load(self, place: Path) -> None:
        """Read the weights of a checkpoint of this run into the model."""
        if self._run.model.lora is None:
            weights.load(self._model, place)
        else:
            state = {lora.PREFIX + n: t for n, t in lora.adapter_state(self._model).items()}
            weights.copy_into(state, place / checkpoint.ADAPTER / lora.WEIGHTS)

    def _begin(self, place: int) -> None:
        """Begin a stage, now or (after a resume) with the weights that it began with already at hand."""
        self._learner.start_stage(place)
        if self._run.stages[place].preference is not None:
            self._learner.keep_reference()

    def _restore(self, path: Path) -> None:
        """The optimiser, the averaged weights and the reference of a checkpoint; the weights are read already."""
        place, start = self._run.locate(self._step)
        if start:
            if self._run.stages[place].preference is not None:
                self._load_beginning(place)
            self._begin(place)
            self._load(path)  # over those of the beginning
            assert self._learner.optimizer is not None
            state = torch.load(path / checkpoint.OPTIMIZER, map_location=self._device, weights_only=True)
            self._learner.optimizer.load_state_dict(state)
        ema = self._learner.ema
        if ema is not None and self._run.model.lora is None:
            weights.copy_into(ema, path / checkpoint.EMA)
        elif ema is not None:
            folder = path / checkpoint.EMA_ADAPTER
            weights.copy_into({lora.PREFIX + n: t for n, t in ema.items()}, folder / lora.WEIGHTS)

    def _load_beginning(self, place: int) -> None:
        """Read the weights that a stage began with: the end of the one before, or those of the very start."""
        before = sum(s.steps for s in self._run.stages[:place])
        if before:
            self._load(checkpoint.folder(self._run.output, before))
        else:
            fresh = self._build_model(self._described()[0], start=True)
            self._model.load_state_dict(fresh.state_dict())

    def _held_out(self, stage: Stage) -> dict[str, list[Example]]:
        out: dict[str, list[Example]] = {}
        for task, held_out in held_out_of(self._table, stage).items():
            for index in held_out.spread(self._run.held_out_samples):
                with contextlib.suppress(DamagedSample):  # logged when the trainer meets it
                    out.setdefault(task, []).append(self._reader.read(index, stage.side(task in self._table.chats)))
        return out

    def _preview(self, place: int) -> bytes | None:
        stage, processor = self._run.stages[place], self._processors[place]
        options, side = self._run.preview, stage.resolution
        chosen = preview.choose(self._reader, stage, options.per_task)
        painter = Painter(self._model, self._vae, processor) if self._model.draws else None
        rows = preview.rows_of(painter, chosen, options, side) if painter else []
        rows += preview.answers_of(self._model, processor, chosen, options, plain=stage.plain_captions)
        if not rows:
            return None
        picture = preview.grid(rows)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", optimize=True)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        self._writer.add_image("preview", pixels.view(picture.height, picture.width, 3), self._step, dataformats="HWC")
        return buffer.getvalue()

    def _entries(self, stage: Stage, report: StepReport) -> Iterator[Entry]:
        for row in report.rows:
            example, ref = row.example, self._table[row.example.sample]
            yield Entry(
                *(self._step, stage.name, example.draw, ref.place, ref.key, ref.task, ref.source, ref.image_id),
                *(row.loss, row.t, row.tokens, example.replaced),
            )

    def _log(self, stage: Stage, report: StepReport, rate: float) -> None:
        tasks = report.mean(lambda row: row.example.task)
        for task, value in {"": report.loss, **tasks}.items():
            self._smoothed[task] = _SMOOTH * self._smoothed.get(task, value) + (1 - _SMOOTH) * value
        add = self._writer.add_scalar
        add("train/loss", report.loss, self._step)
        for task, value in tasks.items():
            add(f"train/loss/{task}", value, self._step)
        for name, value in report.mean(_timestep_bin).items():
            add(f"train/loss_at/{name}", value, self._step)
        add("train/grad_norm", report.grad_norm, self._step)
        add("train/lr", report.lr, self._step)
        add("train/samples_per_second", rate, self._step)
        by_task = {t: v for t, v in self._smoothed.items() if t}
        self._progress.step(stage.name, self._step, self._smoothed[""], by_task)

    def _report(self, losses: dict[str, HeldOutLoss]) -> None:
        for task, loss in losses.items():
            self._writer.add_scalar(f"held_out/loss/{task}", loss.loss, self._step)
            self._writer.add_scalar(f"held_out/baseline/{task}", loss.baseline, self._step)
        self._writer.flush()
        assert self._newest is not None
        shown = "  ".join(f"{t} {v.loss:.3f} ({v.baseline:.3f})" for t, v in losses.items())
        told = f"; held-out loss (of a constant answer): {shown}" if shown else ""
        self._progress.note(f"checkpoint {self._newest.path}{told}")

    def _announce(self) -> None:
        parameters = sum(p.numel() for p in self._model.parameters())
        learn = {n: p.numel() for n, p in self._model.named_parameters()}
        training = sum(len(v) for v in self._table.train.values())
        held = sum(len(v) for v in self._table.held_out.values())
        where = f"goes on at step {self._step}" if self._step else "starts"
        self._progress.note(
            f"{self._run.output}: {where} on {self._device}; {parameters / 1e6:.1f} million parameters, "
            f"{training} samples to train on, {held} held out"
        )
        if self._table.apart:
            self._progress.note(
                f"{self._table.apart} samples are on neither side: a held-out image is among their inputs"
            )
        for path in self._table.derived:
            self._progress.note(
                f"{path}: an earlier x2i built it: its images' digests are computed at each start; `x2i build` on its "
                "recipe writes them into the manifest"
            )
        for place, stage in enumerate(self._run.stages):
            trained = sum(learn[n] for n in self._learner.trained(place))
            if trained < parameters:
                what = "adapters" if self._run.model.lora else ", ".join(stage.train or ())
                self._progress.note(f"stage {stage.name} trains {trained:,} of {parameters:,} parameters: {what}")
        unused = sorted(set(self._table.tasks) - {t for s in self._run.stages for t in tasks_of(self._table, s)})
        if unused:
            self._progress.note(f"tasks of the corpora that no stage trains: {', '.join(unused)}")

    def _described(self) -> tuple[ModelConfig, VAEConfig | None]:
        """The model's numbers and its autoencoder, from the run file or from beside the weights."""
        spec, base = self._run.model, self._base
        file = None if base is None or not (base / checkpoint.CONFIG).is_file() else checkpoint.describe(base)
        beside = None if file is None else registry.config_of(file.architecture, file.model, str(base))
        numbers = spec.config(beside)
        if numbers is None:
            raise RecipeError(f"model.weights: {spec.weights} does not say which model it is: give `preset`")
        return numbers, None if file is None else file.vae

    def _build_tokenizer(self, processor: type[Processor[Any]]) -> Tokenizer:
        if self._newest is not None:
            return tokens.load(self._newest.path)
        if self._run.tokenizer is not None:
            tasks = {task for stage in self._run.stages for task in tasks_of(self._table, stage)}
            return tokens.build(self._run.tokenizer, self._reader, processor, tasks)
        assert self._base is not None
        return tokens.load(self._base)

    def _build_model(self, numbers: ModelConfig, start: bool) -> Model[Any]:
        """The network; to `start`, with the parts of other models that the run begins with."""
        run, vocabulary = self._run, self._tokenizer.get_vocab_size()
        trained = run.tokenizer is not None and run.tokenizer.train is not None
        rows = vocabulary if trained else max(vocabulary, numbers.vocabulary)
        config = numbers.adapted(vocab_size=rows, latent_channels=self._vae.channels)
        seed = int(digest("weights/1", run.seed)[:15], 16)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = registry.build(config)
        if self._base is not None:
            weights.load(model, checkpoint.weights_of(self._base))
        elif start:
            self._load_parts(model)
        if run.model.lora is not None:
            lora.attach(model, run.model.lora, seed)
        return model

    def _load_parts(self, model: Model[Any]) -> None:
        """Fill parts of a fresh model from public checkpoints of other models. Raises RecipeError or X2IError."""
        for part, spec in self._run.model.pretrained.items():
            if part not in model.pretrained:
                known = ", ".join(model.pretrained) or "none"
                raise RecipeError(f"model.pretrained: no part {part!r} is found in other models; those are: {known}")
            path = checkpoint.fetched(spec)
            weights.load_part(model, path, weights.prefixed(model, path, model.pretrained[part]))
        model.begin(tuple(self._run.model.pretrained))

    def _check_stages(self) -> None:
        """Refuse what this model cannot learn. Raises RecipeError."""
        for place, stage in enumerate(self._run.stages):
            tasks = tasks_of(self._table, stage)
            chats = sorted(tasks & self._table.chats)
            pictures = sorted(tasks - self._table.chats)
            if chats and not self._model.answers:
                raise RecipeError(
                    f"stages.{stage.name}.mixture: samples of {', '.join(chats)} have no output image, and this model "
                    "writes no text: leave them out, or give it a head for text (model: {text_head: true})"
                )
            if pictures and not self._model.draws:
                raise RecipeError(
                    f"stages.{stage.name}.mixture: samples of {', '.join(pictures)} are to be drawn, and this model only "
                    "writes text: leave them out"
                )
            if stage.preference is not None and pictures:
                raise RecipeError(f"stages.{stage.name}.preference: {', '.join(pictures)} are drawn, not answered")
            try:
                if pictures:
                    self._processors[place].check_size(stage.resolution, stage.resolution)
            except X2IError as error:
                raise RecipeError(f"stages.{place}.resolution: {error}") from None

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Within the block the first SIGINT or SIGTERM asks for a checkpoint; the second one ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, frame: FrameType | None) -> None:
            self._stop = number
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._progress.note("stopping after this step; once more to stop at once")

        for each in before:
            signal.signal(each, ask)
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def _timestep_bin(row: RowReport) -> str | None:
    """The quarter of [0, 1] in which a picture's timestep lies."""
    if row.t is None:
        return None
    quarter = min(int(row.t * 4), 3)
    return f"t_{quarter / 4:.2f}_{(quarter + 1) / 4:.2f}"


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise RecipeError(f"device: {name!r} is none; give auto, cpu, cuda or cuda:N") from None
