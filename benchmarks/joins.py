"""How many reads a sample takes when neighbours that are due soon are read at once: the plan's order, simulated.

    python benchmarks/joins.py

Corpora of samples of 113 KB each, in shards of 1,000, one stratum; the order is the plan's (`x2i.trainer.plan`), the joins
are the loader's (`x2i.trainer.ranges.Window`), and nothing is read. Over `STEPS` steps in the middle of an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from x2i.trainer.plan import StagePlan
from x2i.trainer.ranges import Window
from x2i.trainer.table import SampleRef

SIZE, SHARD, GROUP, STEPS = 113_000, 1000, 16_384, 120


@dataclass(frozen=True)
class Rows:
    """A stratum of all rows of a manifest."""

    rows: int

    @property
    def counts(self) -> np.ndarray:
        """Rows of each row group."""
        return np.array([min(GROUP, self.rows - start) for start in range(0, self.rows, GROUP)])

    sizes = counts

    def at(self, entry: int, rank: int) -> int:
        """The row."""
        return entry * GROUP + rank

    def task(self, sample: int) -> str:
        """One for all."""
        return "task"


def reads(rows: int, batch: int, steps: int, gap: int) -> tuple[float, float]:
    """Reads of a sample, and bytes read for one that is wanted, with so many steps looked at ahead."""
    plan, window = StagePlan({"all": Rows(rows)}, {"all": 1}, batch, 0, "joins"), Window(gap, 8 << 20)
    corpus: Any = type("Somewhere", (), {"path": Path("corpus")})()
    served: set[int] = set()
    blocks = size = 0
    first = rows // 2 // batch
    refs: dict[int, SampleRef] = {}

    def look(step: int) -> None:
        for draw in plan.step(step):
            shard, place = divmod(draw.sample, SHARD)
            where = (corpus, "", "", str(shard), place * SIZE, SIZE, "", (), "", "", 0)
            refs[draw.index] = SampleRef(*where)
            window.add(draw.index, refs[draw.index])

    for step in range(first, first + steps):
        look(step)
    for step in range(first, first + STEPS):
        look(step + steps)
        for index in range(step * batch, (step + 1) * batch):
            if index not in served:
                block, numbers = window.take(index, refs[index], 32 << 20)
                served.update(numbers)
                blocks, size = blocks + 1, size + block.size
    return blocks / len(served), size / len(served) / SIZE


def main() -> None:
    """Print the table."""
    table = Table(title="reads of a sample, and bytes read of those wanted")
    for column in ("samples", "a step", "alone", *(f"{s} steps" for s in (4, 16, 64)), "64 steps, gap 1 MiB"):
        table.add_column(column, justify="right")
    for rows in (2_000, 20_000, 100_000, 524_288, 10_000_000):
        for batch in (64, 256, 1024):
            found = [reads(rows, batch, s, 64 << 10) for s in (0, 4, 16, 64)] + [reads(rows, batch, 64, 1 << 20)]
            table.add_row(f"{rows:,}", str(batch), *(f"{a:.2f}, {b:.2f}" for a, b in found))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
