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
from x2i.base.errors import Stopped
from x2i.corpus.corpus import Corpus
from x2i.model import lora, weights
from x2i.model.config import ModelFile
from x2i.model.sampling import Painter
from x2i.trainer import checkpoint, preview, tokens
from x2i.trainer.checkpoint import Checkpoint
from x2i.trainer.config import RunConfig, Stage
from x2i.trainer.learner import HeldOutLoss, Learner, RowReport, StepReport
from x2i.trainer.ledger import Entry, Ledger
from x2i.trainer.loader import Loader
from x2i.trainer.progress import Progress
from x2i.trainer.run import LOGS, Result, result_of
from x2i.trainer.setup import Setup

log = logging.getLogger(__name__)

#: Share of the old value in the losses that are shown.
_SMOOTH = 0.95


class Session:
    """Builds everything that a run needs, then runs it. All random choices derive from the run's seed."""

    def __init__(self, run: RunConfig, corpora: list[Corpus], newest: Checkpoint | None, progress: Progress) -> None:
        self._run = run
        self._progress = progress
        self._setup = Setup(run, corpora, newest)
        self._newest = newest
        self._step = newest.step if newest else 0
        self._learner = Learner(run, self._setup.model, self._setup.device)
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
            self._setup.reader.close()
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
            damaged=[vars(d) for _, d in sorted(self._setup.reader.damaged.items())],
        )

    def _stage(self, place: int, start: int) -> None:
        """Train one stage from step `start` of it to its end, with checkpoints on the way."""
        run, stage, plan = self._run, self._run.stages[place], self._setup.plans[place]
        if start == 0:
            self._begin(place)
            self._smoothed = {}
        loader = Loader(self._setup.reader, plan, stage, start, run.reading)
        for number, examples in enumerate(loader, start):
            began = time.monotonic()
            batches = self._setup.batchers[place].training(examples, run.seed, stage)
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
                losses = self._learner.held_out(self._setup.batchers[place], self._setup.held_out(stage), stage)
                picture = self._preview(place)
            if picture is not None:
                files[checkpoint.PREVIEW] = picture
        files |= self._weights() | {
            checkpoint.CONFIG: ModelFile(
                architecture=self._setup.model.config.architecture,
                model=self._setup.processors[place].config.model_dump(mode="json"),
                vae=self._setup.vae_config if self._setup.model.draws else None,
                max_text_tokens=run.max_text_tokens,
                resolution=stage.resolution,
                chat_resolution=stage.chat_resolution,
                base=None if run.model.lora is None else self._setup.weights,
            ).model_dump(mode="json"),
            tokens.FILE: self._setup.tokenizer.to_str(pretty=True).encode(),
            checkpoint.TRAINER: {
                "format": 1,
                "step": self._step,
                "stage": stage.name,
                "stage_step": stage_step,
                "seed": run.seed,
                "run": run.digest,
                "weights": self._setup.weights,
                "corpora": [{"path": str(c.path), "digest": c.digest} for c in self._setup.table.corpora],
                "held_out": {task: asdict(loss) for task, loss in losses.items()},
                "damaged": [vars(d) for _, d in sorted(self._setup.reader.damaged.items())],
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
            state = self._setup.model.state_dict()
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
        lora.save_adapter(self._setup.model, folder, self._setup.weights)

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
                self._setup.load_beginning(place)
            self._begin(place)
            self._setup.load(path)  # over those of the beginning
            assert self._learner.optimizer is not None
            self._learner.optimizer.load_state_dict(checkpoint.optimizer_of(path, self._setup.device))
        ema = self._learner.ema
        if ema is not None and self._run.model.lora is None:
            weights.fill(ema, path / checkpoint.EMA)
        elif ema is not None:
            folder = path / checkpoint.EMA_ADAPTER
            weights.fill({lora.PREFIX + n: t for n, t in ema.items()}, folder / lora.WEIGHTS)

    def _preview(self, place: int) -> bytes | None:
        stage, processor = self._run.stages[place], self._setup.processors[place]
        options, side = self._run.preview, stage.resolution
        chosen = preview.choose(self._setup.reader, stage, options.per_task)
        painter = Painter(self._setup.model, self._setup.vae, processor) if self._setup.model.draws else None
        rows = preview.rows_of(painter, chosen, options, side) if painter else []
        rows += preview.answers_of(self._setup.model, processor, chosen, options, plain=stage.plain_captions)
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
            example, ref = row.example, self._setup.table[row.example.sample]
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
        parameters = sum(p.numel() for p in self._setup.model.parameters())
        learn = {n: p.numel() for n, p in self._setup.model.named_parameters()}
        training = sum(len(v) for v in self._setup.table.train.values())
        held = sum(len(v) for v in self._setup.table.held_out.values())
        where = f"goes on at step {self._step}" if self._step else "starts"
        self._progress.note(
            f"{self._run.output}: {where} on {self._setup.device}; {parameters / 1e6:.1f} million parameters, "
            f"{training} samples to train on, {held} held out"
        )
        if self._setup.table.apart:
            self._progress.note(
                f"{self._setup.table.apart} samples are on neither side: a held-out image is among their inputs"
            )
        for path in self._setup.table.derived:
            self._progress.note(
                f"{path}: an earlier x2i built it: its images' digests are computed at each start; `x2i build` on its "
                "recipe writes them into the manifest"
            )
        for place, stage in enumerate(self._run.stages):
            trained = sum(learn[n] for n in self._learner.trained(place))
            if trained < parameters:
                what = "adapters" if self._run.model.lora else ", ".join(stage.train or ())
                self._progress.note(f"stage {stage.name} trains {trained:,} of {parameters:,} parameters: {what}")
        unused = sorted(set(self._setup.table.tasks) - self._setup.tasks)
        if unused:
            self._progress.note(f"tasks of the corpora that no stage trains: {', '.join(unused)}")

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
