"""What a run tells of itself while it runs: smoothed losses, rates, and where the time of its steps goes."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from x2i.base.files import writing
from x2i.base.seeds import digest
from x2i.trainer.config import RunConfig, WandB
from x2i.trainer.evaluation import HeldOutLoss, timestep_bin
from x2i.trainer.peak import mfu
from x2i.trainer.record import LOGS
from x2i.trainer.reports import RowReport, StepReport

if TYPE_CHECKING:
    from PIL.Image import Image

#: Share of the old value in the losses that are shown.
_SMOOTH = 0.95

#: Steps whose speed is shown on the console.
_LAST = 20

#: What a step consists of; evaluation, previews and checkpoints stand between steps.
_STEP = ("data", "encoding", "compute")


@dataclass(frozen=True)
class Work:
    """What a step holds on all ranks: FLOPs that it needs (`x2i.trainer.flops`), and tokens without padding."""

    flops: float
    tokens: float


class Meter:
    """Measures steps. `smoothed` has the losses of the last steps by task, and of all under "".

    Args:
        devices: on which the steps are computed.
        peak: FLOP/s of each, if known.
    """

    def __init__(self, devices: int = 1, peak: float | None = None) -> None:
        self.smoothed: dict[str, float] = {}
        self._devices, self._peak = devices, peak
        self._laps: dict[str, float] = {}
        self._began = time.monotonic()
        self._last: deque[tuple[float, float, int, Work]] = deque(maxlen=_LAST)

    def start(self) -> None:
        """The clock runs from here."""
        self._began = time.monotonic()

    def lap(self, what: str) -> None:
        """What was done since the last call was this."""
        now = time.monotonic()
        self._laps[what] = self._laps.get(what, 0.0) + now - self._began
        self._began = now

    def step(self, report: StepReport, work: Work) -> dict[str, float]:
        """A step is done: everything that is told of it, by name. The laps begin anew."""
        tasks, times = report.mean(lambda row: row.task), report.mean(_bin)
        for task, value in {"": report.loss, **tasks}.items():
            self.smoothed[task] = _SMOOTH * self.smoothed.get(task, value) + (1 - _SMOOTH) * value
        laps, self._laps = self._laps, {}
        whole = max(sum(laps.get(what, 0.0) for what in _STEP), 1e-9)
        self._last.append((whole, laps.get("data", 0.0), len(report.rows), work))
        share = mfu(work.flops, whole, self._devices, self._peak)
        return {
            "train/loss": report.loss,
            **{f"train/loss/{task}": value for task, value in tasks.items()},
            **{f"train/loss_at/{name}": value for name, value in times.items()},
            "train/grad_norm": report.grad_norm,
            "train/lr": report.lr,
            **{f"train/lr/{part}": rate for part, rate in report.rates.items()},
            "train/samples_per_second": len(report.rows) / whole,
            "train/images_per_second": sum(row.t is not None for row in report.rows) / whole,
            "train/tokens_per_second": work.tokens / whole,
            "train/tflops_per_second": work.flops / whole / 1e12,
            **({} if share is None else {"train/mfu": share}),
            **({} if report.fill is None else {"train/fill": report.fill, "train/left_out": len(report.left_out)}),
            **{f"seconds/{what}": seconds for what, seconds in laps.items()},
        }

    @property
    def speed(self) -> str:
        """The last steps in a few words."""
        seconds = sum(s for s, *_ in self._last) or 1e-9
        waited = sum(w for _, w, *_ in self._last) / seconds
        rows = sum(r for *_, r, _ in self._last) / seconds
        flops, tokens = (sum(getattr(work, n) for *_, work in self._last) for n in ("flops", "tokens"))
        share = mfu(flops, seconds, self._devices, self._peak)
        told = [f"{rows:,.1f} samples/s", f"{tokens / seconds:,.0f} tokens/s"]
        return " · ".join([*told, *([] if share is None else [f"MFU {share:.0%}"]), f"data {waited:.0%}"])


def _bin(row: RowReport) -> str | None:
    return None if row.t is None else timestep_bin(row.t)


class Logs:
    """TensorBoard's files, and Weights & Biases where the run asks for it. Of rank 0."""

    def __init__(self, run: RunConfig, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = run.output / LOGS
        self._writer = SummaryWriter(self._folder, purge_step=step or None)
        self._wandb = None if run.wandb is None else _joined(run, run.wandb)

    def step(self, scalars: dict[str, float], step: int) -> None:
        """The figures of a step."""
        with writing(self._folder):
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)
        if self._wandb is not None and scalars:
            self._wandb.log(scalars, step=step)

    def held_out(self, losses: dict[str, HeldOutLoss], step: int) -> None:
        """The losses of a checkpoint."""
        scalars: dict[str, float] = {}
        for task, loss in losses.items():
            scalars |= {f"held_out/loss/{task}": loss.loss, f"held_out/baseline/{task}": loss.baseline}
            scalars |= {f"held_out/loss_at/{name}/{task}": value for name, value in loss.by_time.items()}
        self.step(scalars, step)
        with writing(self._folder):
            self._writer.flush()

    def picture(self, name: str, picture: Image, step: int) -> None:
        """A picture in RGB."""
        import numpy as np

        pixels: Any = np.asarray(picture)
        with writing(self._folder):
            self._writer.add_image(name, pixels, step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(picture)}, step=step)

    def close(self) -> None:
        """Nothing follows."""
        with writing(self._folder):
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def _joined(run: RunConfig, spec: WandB) -> Any:
    """The run at Weights & Biases: the same one after a resume, for its id follows from the run's identity and folder.

    Steps that are told twice (after a crash) keep their first figures there.
    """
    import wandb

    folder = run.output / LOGS
    folder.mkdir(parents=True, exist_ok=True)
    return wandb.init(
        project=spec.project,
        name=spec.name or run.output.name,
        entity=spec.entity,
        mode=spec.mode,
        id=digest("wandb/1", run.digest, str(run.output))[:16],
        resume="allow",
        dir=str(folder),
        config=run.identity(),
    )
