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

from x2i import __version__
from x2i.base.errors import RecipeError, Stopped
from x2i.base.seeds import digest
from x2i.base.weights import Weights
from x2i.corpus.corpus import Corpus
from x2i.model import vae as vaes
from x2i.model import weights
from x2i.model.config import PRESETS, ModelFile
from x2i.model.omnigen import OmniGen
from x2i.model.prompt import PromptEncoder
from x2i.model.sampling import Painter
from x2i.trainer import checkpoint, preview, tokens
from x2i.trainer.batch import Batcher
from x2i.trainer.checkpoint import Checkpoint
from x2i.trainer.config import RunConfig, Stage
from x2i.trainer.data import DamagedSample, Example, Loader, SampleReader
from x2i.trainer.learner import HeldOutLoss, Learner, StepReport
from x2i.trainer.plan import StagePlan
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
        for stage in run.stages:
            if mute := sorted(self._table.unfit.keys() & stage.mixture.keys() - set(self._table.tasks)):
                raise RecipeError(
                    f"stages.{stage.name}.mixture: samples of {', '.join(mute)} have no output image, and only pictures are "
                    "learned here: leave it out"
                )
        self._plans = [StagePlan(self._table.train, s.mixture, s.batch, run.seed, s.name) for s in run.stages]
        self._device = _device(run.device)
        self._reader = SampleReader(self._table, run.reading.cache_mib << 20)
        self._vae = vaes.build(run.vae).to(self._device)
        self._tokenizer = tokens.build(run.tokenizer, self._reader) if newest is None else tokens.load(newest.path)
        self._model = self._build_model()
        self._check_resolutions()
        encoder = PromptEncoder(self._tokenizer, run.max_text_tokens)
        self._batcher = Batcher(self._model, self._vae, encoder, self._device)
        self._painter = Painter(self._model, self._vae, encoder)
        self._newest = newest
        self._step = newest.step if newest else 0
        if newest is not None:
            weights.load(self._model, newest.path)
        elif run.model.weights is not None:
            weights.load(self._model, Weights(run.model.weights).fetch())
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
            self._learner.start_stage(stage)
            self._smoothed = {}
        loader = Loader(self._reader, plan, stage, start, run.reading)
        for number, examples in enumerate(loader, start):
            began = time.monotonic()
            batch = self._batcher.training(examples, run.seed, stage)
            report = self._learner.step(batch, stage, number, self._step)
            self._step += 1
            self._log(stage, report, stage.batch / (time.monotonic() - began))
            last = number + 1 == stage.steps
            if last or self._step % run.checkpoint_every == 0:
                self._checkpoint(stage, number + 1, full=True)
            elif self._stop:
                self._checkpoint(stage, number + 1, full=False)
            if self._stop:
                return

    def _checkpoint(self, stage: Stage, stage_step: int, full: bool) -> None:
        """Write a checkpoint; a full one has held-out losses and a preview."""
        run = self._run
        losses: dict[str, HeldOutLoss] = {}
        files: dict[str, Any] = {}
        if full:
            with self._learner.averaged():
                losses = self._learner.held_out(self._batcher, self._held_out(stage))
                picture = self._preview(stage)
            if picture is not None:
                files[checkpoint.PREVIEW] = picture
        files |= {
            checkpoint.MODEL: lambda path: weights.save(self._model.state_dict(), path),
            checkpoint.CONFIG: ModelFile(
                model=self._model.config, vae=run.vae, max_text_tokens=run.max_text_tokens, resolution=stage.resolution
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
        if self._learner.ema is not None:
            state = self._model.state_dict() | self._learner.ema
            files[checkpoint.EMA] = lambda path: weights.save(state, path)
        if stage_step < stage.steps:
            assert self._learner.optimizer is not None
            optimizer = self._learner.optimizer.state_dict()
            files[checkpoint.OPTIMIZER] = lambda path: torch.save(optimizer, path)
        self._newest = checkpoint.write(checkpoint.folder(run.output, self._step), files)
        self._report(losses)
        ends, total = set(), 0
        for each in run.stages:
            ends.add(total := total + each.steps)
        checkpoint.prune(run.output, run.keep, ends)

    def _restore(self, path: Path) -> None:
        """The optimiser and the averaged weights of a checkpoint; the weights are read already."""
        place, start = self._run.locate(self._step)
        if start:
            self._learner.start_stage(self._run.stages[place])
            assert self._learner.optimizer is not None
            state = torch.load(path / checkpoint.OPTIMIZER, map_location=self._device, weights_only=True)
            self._learner.optimizer.load_state_dict(state)
        if self._learner.ema is not None:
            averaged = OmniGen(self._model.config)
            weights.load(averaged, path / checkpoint.EMA)
            self._learner.ema = {n: p.detach().to(self._device) for n, p in averaged.named_parameters()}

    def _held_out(self, stage: Stage) -> dict[str, list[Example]]:
        out: dict[str, list[Example]] = {}
        for task in sorted(stage.mixture):
            for index in self._table.held_out[task][: self._run.held_out_samples]:
                with contextlib.suppress(DamagedSample):  # logged when the trainer meets it
                    out.setdefault(task, []).append(self._reader.read(int(index), stage.resolution))
        return out

    def _preview(self, stage: Stage) -> bytes | None:
        options, side = self._run.preview, stage.resolution
        chosen = preview.choose(self._reader, sorted(stage.mixture), options.per_task, side)
        rows = preview.rows_of(self._painter, chosen, options, side)
        if not rows:
            return None
        picture = preview.grid(rows)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", optimize=True)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        self._writer.add_image("preview", pixels.view(picture.height, picture.width, 3), self._step, dataformats="HWC")
        return buffer.getvalue()

    def _log(self, stage: Stage, report: StepReport, rate: float) -> None:
        for task, value in {"": report.loss, **report.by_task}.items():
            self._smoothed[task] = _SMOOTH * self._smoothed.get(task, value) + (1 - _SMOOTH) * value
        add = self._writer.add_scalar
        add("train/loss", report.loss, self._step)
        for task, value in report.by_task.items():
            add(f"train/loss/{task}", value, self._step)
        add("train/grad_norm", report.grad_norm, self._step)
        add("train/lr", report.lr, self._step)
        add("train/samples_per_second", rate, self._step)
        by_task = {t: v for t, v in self._smoothed.items() if t}
        self._progress.step(stage.name, self._step, self._smoothed[""], by_task)

    def _report(self, losses: dict[str, HeldOutLoss]) -> None:
        for task, loss in losses.items():
            self._writer.add_scalar(f"held_out/loss/{task}", loss.loss, self._step)
            self._writer.add_scalar(f"held_out/mean_velocity/{task}", loss.mean_velocity, self._step)
        self._writer.flush()
        assert self._newest is not None
        shown = "  ".join(f"{t} {v.loss:.3f} ({v.mean_velocity:.3f})" for t, v in losses.items())
        told = f"; held-out loss (of predicting the mean): {shown}" if shown else ""
        self._progress.note(f"checkpoint {self._newest.path}{told}")

    def _announce(self) -> None:
        parameters = sum(p.numel() for p in self._model.parameters())
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
        if self._table.unfit:
            unfit = ", ".join(f"{task} ({count})" for task, count in sorted(self._table.unfit.items()))
            self._progress.note(f"left out, for they have no output image to train on: {unfit}")
        unused = sorted(set(self._table.tasks) - {t for s in self._run.stages for t in s.mixture})
        if unused:
            self._progress.note(f"tasks of the corpora that no stage trains: {', '.join(unused)}")

    def _build_model(self) -> OmniGen:
        spec = self._run.model
        if spec.preset not in PRESETS:
            raise RecipeError(f"model: no preset {spec.preset!r}; known: {', '.join(PRESETS)}")
        given = {k: v for k, v in spec.model_dump(exclude={"preset", "weights"}).items() if v is not None}
        if "heads" in given:
            given["kv_heads"] = given["heads"]
        preset, vocabulary = PRESETS[spec.preset], self._tokenizer.get_vocab_size()
        trained = self._run.tokenizer.train is not None
        given["vocab_size"] = vocabulary if trained else max(vocabulary, preset.vocab_size)
        given["in_channels"] = self._vae.channels
        config = type(preset).model_validate(preset.model_dump() | given)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(digest("weights/1", self._run.seed)[:15], 16))
            return OmniGen(config)

    def _check_resolutions(self) -> None:
        config = self._model.config
        side = self._vae.shrink * config.patch_size
        for place, stage in enumerate(self._run.stages):
            if stage.resolution % side or stage.resolution // side > config.pos_embed_max_size:
                raise RecipeError(
                    f"stages.{place}.resolution: {stage.resolution} must be a multiple of {side} (vae {self._vae.shrink} "
                    f"x patch {config.patch_size}), and at most {side * config.pos_embed_max_size}"
                )

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


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise RecipeError(f"device: {name!r} is none; give auto, cpu, cuda or cuda:N") from None
