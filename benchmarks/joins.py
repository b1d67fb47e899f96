"""How large the reads of a training run are: the plan's order and the loader's look-ahead, simulated; no shard is read.

    python benchmarks/joins.py --rows 1_000_000

A made-up corpus: shards of 1,024 samples of 113 KB (log-normal), of one task, or of seven: those of each side by side in a
shard, as x2i writes them, or strewn. The order is the plan's (`x2i.trainer.mixture.plan_of`), the rows are those of one rank, and the reads are those
that the loader makes (`x2i.trainer.ranges.Window`) with so many samples looked at ahead. Over `STEPS` steps in the middle of
an epoch: reads of a sample, the mean read, bytes read of those wanted, and the most that was held in memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from plan import texts
from rich.console import Console
from rich.table import Table

from x2i import corpus
from x2i.corpus.manifest import ROW_GROUP, STORED, ManifestWriter
from x2i.trainer.config import Reading, Shuffle
from x2i.trainer.mixture import plan_of, table_of
from x2i.trainer.plan import Draw, Plan
from x2i.trainer.ranges import Block, Window
from x2i.trainer.shares import Shares
from x2i.trainer.stage import Pack, Stage
from x2i.trainer.table import SampleRef, SampleTable

SIZE, SHARD, TASKS, STEPS = 113_000, 1024, 7, 96


@dataclass(frozen=True)
class Case:
    """Who reads what: `layout` of the corpus, samples or packs in a step, how many ranks."""

    name: str
    layout: str
    ranks: int
    batch: int | None = None
    pack: Pack | None = None
    buckets: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Found:
    """Per sample reads; bytes of a read; bytes read of those wanted; most bytes held."""

    reads: float
    size: float
    waste: float
    held: int


BUCKETS = ((512, 512), (576, 448), (448, 576), (640, 384), (384, 640))

CASES = (
    Case("one task, 256 a step", "one", 1, 256),
    Case("the same, 1 of 8 ranks, 1,024 a step", "one", 8, 1024),
    Case("7 tasks, evenly, 256 a step", "seven", 1, 256),
    Case("the same, 1 of 8 ranks, 1,024 a step", "seven", 8, 1024),
    Case("one task, 5 buckets, 256 a step", "one", 1, 256, buckets=BUCKETS),
    Case("7 tasks, strewn in each shard, 256 a step", "strewn", 1, 256),
    Case("one task, 2 packs of 16k", "one", 1, pack=Pack(tokens=16_384, packs=2)),
    Case("the same, 1 of 8 ranks, 16 packs", "one", 8, pack=Pack(tokens=16_384, packs=16)),
)


def main() -> None:
    """Print a table for each order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--look", default="1024,4096,16384", help="samples looked at ahead, with commas")
    options = parser.parse_args()
    looks = [int(look) for look in options.look.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        corpora = {layout: written(Path(folder) / layout, options.rows, layout) for layout in {c.layout for c in CASES}}
        for shuffle in (Shuffle(block=1), Shuffle()):
            table = Table(
                title=f"blocks of {shuffle.block}, window {shuffle.window:,}: reads, MB, read of wanted, MB held"
            )
            for column in ("", *(f"{look:,} ahead" for look in looks)):
                table.add_column(column, justify="right" if column else "left")
            for case in CASES:
                found = [simulated(case, corpora[case.layout], shuffle, look) for look in looks]
                told = (f"{f.reads:.2f}, {f.size / 1e6:.2f}, {f.waste:.2f}, {f.held / 1e6:.0f}" for f in found)
                table.add_row(case.name, *told)
            Console(width=120).print(table)


def simulated(case: Case, opened: corpus.Corpus, shuffle: Shuffle, look: int) -> Found:
    """One rank's reads."""
    tasks = [f"task_{n}" for n in range(1 if case.layout == "one" else TASKS)]
    stage = Stage(
        name="one",
        resolution=512,
        steps=1,
        lr=1,
        batch=case.batch,
        pack=case.pack,
        mixture=dict.fromkeys(tasks, 1.0),
        buckets=case.buckets,
    )
    table = table_of([opened], [stage], 0.01)
    plan = plan_of(table, stage, 0, shuffle=shuffle)
    share = Shares(case.ranks // 2, case.ranks, set()).take
    per_step = case.batch or plan.batch  # type: ignore[attr-defined]
    return run(plan, share, table, int(len(table) / per_step / 2), look)


def run(plan: Plan, share: Callable[[list[Draw]], list[Draw]], table: SampleTable, first: int, look: int) -> Found:
    """The loader's choice of reads, from a step on; what is before the first sample of the second third is warm-up."""
    reading = Reading()
    window = Window(reading.join_gap_kib << 10, reading.join_mib << 20)
    limit = reading.prefetch_mib << 20
    blocks: dict[int, Block] = {}
    refs: dict[int, SampleRef] = {}
    ahead: list[list[int]] = []
    number = step = held = most = reads = size = wanted = samples = 0
    for turn in range(STEPS):
        while not ahead or sum(map(len, ahead)) < look:
            dues = []
            for draw in share(plan.step(first + step)):
                refs[number] = table[draw.sample]
                window.add(number, refs[number])
                dues.append(number)
                number += 1
            ahead.append(dues)
            step += 1
        for due in ahead.pop(0):
            if due not in blocks:
                block, numbers = window.take(due, refs[due], max(limit - held, 0) // 2)
                blocks.update(dict.fromkeys(numbers, block))
                held, most = held + block.size, max(most, held + block.size)
                if turn >= STEPS // 3:
                    reads, size = reads + 1, size + block.size
            if turn >= STEPS // 3:
                samples, wanted = samples + 1, wanted + refs[due].size
            block = blocks.pop(due)
            if block.done():
                held -= block.size
    return Found(reads / samples, size / max(reads, 1), size / wanted, most)


def written(folder: Path, rows: int, layout: str) -> corpus.Corpus:
    """A corpus of which there is the manifest alone."""
    folder.mkdir(parents=True)
    (folder / "corpus.json").write_text(json.dumps({"format": 1, "digest": "0", "name": "made-up"}))
    random = np.random.default_rng(0)
    shared = texts(random)
    with ManifestWriter(folder / "manifest.parquet") as writer:
        for start in range(0, rows, ROW_GROUP):
            task = random.integers(0, 1 if layout == "one" else TASKS, ROW_GROUP)
            if layout == "seven":
                task = np.sort(task.reshape(-1, SHARD), axis=1).ravel()
            size = np.clip(random.lognormal(np.log(SIZE) - 0.08, 0.4, ROW_GROUP), 10_000, 1_000_000).astype(np.int64)
            shard = (start + np.arange(ROW_GROUP)) // SHARD
            within = np.arange(ROW_GROUP) % SHARD == 0
            end = np.cumsum(size)
            offset = end - size - np.repeat((end - size)[within], SHARD)
            width, height = (pa.array(random.integers(256, 1024, ROW_GROUP), pa.int32()) for _ in range(2))
            columns: dict[str, Any] = shared | {
                "shard": pa.array([f"shards/{n:06d}.tar" for n in shard.tolist()]),
                "offset": pa.array(offset),
                "size": pa.array(size),
                "task_type": pa.array([f"task_{n}" for n in task.tolist()]),
                "source": pa.array(["made-up"] * ROW_GROUP),
                "output_size": pa.StructArray.from_arrays([width, height], names=["width", "height"]),
                "split": pa.array(random.integers(0, 2**32, ROW_GROUP, dtype=np.uint32)),
                "split_others": pa.nulls(ROW_GROUP, pa.uint32()),
                "text_tokens": pa.array(np.clip(random.lognormal(3.7, 0.5, ROW_GROUP), 8, 400), pa.int32(), safe=False),
                "rejected_tokens": pa.nulls(ROW_GROUP, pa.int32()),
            }
            writer.write(pa.table([columns[n] for n in STORED.names], schema=STORED).slice(0, rows - start))
    return corpus.open(folder)


if __name__ == "__main__":
    main()
