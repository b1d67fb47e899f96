"""How fast the loader is: a stage's samples in their order, decoded in full, reduced and not at all."""

from __future__ import annotations

import resource
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from x2i import corpus
from x2i.base.errors import RecipeError
from x2i.trainer import checkpoint, turns
from x2i.trainer.config import Decode, RunConfig, load_run
from x2i.trainer.data import Example, SampleReader
from x2i.trainer.loader import Loader
from x2i.trainer.mixture import plan_of, table_of
from x2i.trainer.plan import Plan
from x2i.trainer.run import LOGS
from x2i.trainer.stage import Stage
from x2i.trainer.table import SampleTable

#: Steps from which a training step's seconds are taken, and what the trainer calls their parts.
_STEPS, _PARTS = 200, ("seconds/encoding", "seconds/compute")

#: Seconds between two looks at the memory.
_EVERY = 0.2


@dataclass(frozen=True)
class Speed:
    """One way of reading: how much, how long, at what cost.

    Attributes:
        what: `full` or `reduced`, as `decode` of a run; `none`: bytes that are checked, and their JSON.
        rate: samples per second.
        megabytes: read per second.
        cpu_ms: of this process, for one sample.
        reads: for one sample; less than one where neighbours were read at once.
        peak_mb: this process's largest PSS meanwhile (its resident set where that is not told), with all that it has
            imported.
    """

    what: str
    steps: int
    samples: int
    seconds: float
    rate: float
    megabytes: float
    cpu_ms: float
    reads: float
    peak_mb: float


class Undecoded(SampleReader):
    """Reads and checks, and leaves the pictures as they are."""

    def _decode(self, ref: Any, form: Any, members: Any) -> Example:
        record = self._record(members)
        said = turns.messages(record) if "output_image" not in record else ()
        text, rejected = str(record.get("instruction", "")), record.get("rejected_response")
        return Example(-1, ref.key, ref.task, text, (), None, said, rejected, form.sample)


def measure(run: str | Path | RunConfig, stage: str | None = None, steps: int = 200) -> list[Speed]:
    """Read `steps` steps of a stage: decoded in full, reduced, and as bytes alone. Nothing is kept between samples.

    Raises:
        RecipeError: the run file is wrong, or has no such stage.
    """
    config, chosen = _stage(run, stage)
    short = chosen.model_copy(update={"steps": min(steps, chosen.steps)})
    (table, plan), reading = _planned(config, chosen), config.reading
    found = []
    ways: tuple[Decode | Literal["none"], ...] = ("full", "reduced", "none")
    for what in ways:
        given: dict[str, Any] = {"verify": reading.verify, "open_files": reading.open_files}
        reader = Undecoded(table, **given) if what == "none" else SampleReader(table, 0, what, **given)
        try:
            with _peak() as peak:
                cpu, began = time.process_time(), time.monotonic()
                samples = sum(map(len, Loader(reader, plan, short, 0, reading)))
                seconds, spent = time.monotonic() - began, time.process_time() - cpu
        finally:
            reader.close()
        shards = reader.shards
        found.append(
            Speed(
                *(what, short.steps, samples, seconds, samples / seconds, shards.bytes_read / seconds / 1e6),
                *(spent / samples * 1000, shards.reads / samples, peak[0] / 1e6),
            )
        )
    return found


def guessed(run: str | Path | RunConfig, stage: str | None = None) -> bool:
    """Whether a stage's packs are planned by a guess of their lengths, for the run has no checkpoint to ask yet."""
    config, chosen = _stage(run, stage)
    return chosen.pack is not None and not checkpoint.all_of(config.output)


def _planned(config: RunConfig, stage: Stage) -> tuple[SampleTable, Plan]:
    """The samples and a stage's order; of packs as the run has it, by its newest checkpoint's tokenizer and numbers."""
    corpora = [corpus.open(path) for path in config.corpora]
    found = checkpoint.all_of(config.output)
    if stage.pack is not None and found:
        from x2i.trainer.setup import Setup

        setup = Setup(config, corpora, found[-1], "cpu", share=(0, 1))  # of the model the numbers alone, no weights
        return setup.table, setup.plans[config.stages.index(stage)]
    table = table_of(corpora, [stage], config.held_out)
    return table, plan_of(table, stage, config.seed, shuffle=config.shuffle)


def trained(run: str | Path | RunConfig, stage: str | None = None) -> float | None:
    """Seconds of a training step of this stage, as the run's own logs have them; None if it did not get there.

    The median over the stage's last steps, and of the step alone: without the wait for its samples.
    """
    config, chosen = _stage(run, stage)
    logs = config.output / LOGS
    if not logs.is_dir():
        return None
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logs), size_guidance={"scalars": 0}).Reload()
    if not set(_PARTS) <= set(events.Tags()["scalars"]):
        return None
    place = config.stages.index(chosen)
    there = range(config.first(place) + 1, config.end(place) + 1)  # steps are counted from 1
    parts = [[e.value for e in events.Scalars(name) if e.step in there][-_STEPS:] for name in _PARTS]
    seconds = [sum(each) for each in zip(*parts, strict=False)]
    return statistics.median(seconds) if seconds else None


def _stage(run: str | Path | RunConfig, stage: str | None) -> tuple[RunConfig, Stage]:
    config = run if isinstance(run, RunConfig) else load_run(run)
    if stage is None:
        return config, config.stages[-1]
    for each in config.stages:
        if each.name == stage:
            return config, each
    raise RecipeError(f"--stage {stage}: the run has {', '.join(s.name for s in config.stages)}")


@contextmanager
def _peak() -> Iterator[list[int]]:
    """The largest PSS in bytes within the block, in a list of one."""
    largest, done = [_pss()], threading.Event()

    def watch() -> None:
        while not done.wait(_EVERY):
            largest[0] = max(largest[0], _pss())

    watching = threading.Thread(target=watch, name="x2i-memory", daemon=True)
    watching.start()
    try:
        yield largest
    finally:
        done.set()
        watching.join()
        largest[0] = max(largest[0], _pss())


def _pss() -> int:
    """Proportional set size in bytes; where Linux's files are not, the most that was resident so far."""
    try:
        with open("/proc/self/smaps_rollup") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))
    except (OSError, StopIteration):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most * (1 if sys.platform == "darwin" else 1024)
