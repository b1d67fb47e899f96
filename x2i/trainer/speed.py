"""How fast the loader is: a stage's samples in their order, decoded as training would have them, and not decoded."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from x2i import corpus
from x2i.base.errors import RecipeError
from x2i.trainer.config import RunConfig, load_run
from x2i.trainer.data import SampleReader
from x2i.trainer.loader import Loader
from x2i.trainer.mixture import plan_of, table_of


@dataclass(frozen=True)
class Speed:
    """One way of reading: how much, how long, at what cost. `peak_mb` is the process's until then."""

    what: str
    steps: int
    samples: int
    seconds: float
    rate: float
    megabytes: float
    cpu_ms: float
    peak_mb: float


def measure(run: str | Path | RunConfig, stage: str | None = None, steps: int = 200) -> list[Speed]:
    """Read `steps` steps of a stage: decoded, then as bytes alone.

    Raises:
        RecipeError: the run file is wrong, or has no such stage.
    """
    config = run if isinstance(run, RunConfig) else load_run(run)
    chosen = next((s for s in config.stages if stage in (None, s.name)), None) if stage else config.stages[-1]
    if chosen is None:
        raise RecipeError(f"--stage {stage}: the run has {', '.join(s.name for s in config.stages)}")
    steps = min(steps, chosen.steps)
    table = table_of([corpus.open(path) for path in config.corpora], [chosen], config.held_out)
    plan = plan_of(table, chosen, config.seed)
    draws = [draw for step in range(steps) for draw in plan.step(step)]
    size = sum(table[draw.sample].size for draw in draws)
    reader = SampleReader(table)
    short = chosen.model_copy(update={"steps": steps})

    def decoded() -> None:
        for _ in Loader(reader, plan, short, 0, config.reading):
            pass

    def raw() -> None:
        with ThreadPoolExecutor(config.reading.threads) as pool:
            for _ in pool.map(lambda draw: reader.text(draw.sample), draws):
                pass

    try:
        ways: list[tuple[str, Callable[[], None]]] = [("decoded and cut", decoded), ("bytes, checked", raw)]
        return [_timed(what, way, steps, len(draws), size) for what, way in ways]
    finally:
        reader.close()


def _timed(what: str, way: Callable[[], None], steps: int, samples: int, size: int) -> Speed:
    cpu, began = time.process_time(), time.monotonic()
    way()
    seconds, spent = time.monotonic() - began, time.process_time() - cpu
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Speed(
        *(what, steps, samples, seconds, samples / seconds, size / seconds / 1e6),
        *(spent / samples * 1000, most / 1e6),
    )
