"""How full packs are, how often one holds more than its budget, and what a draw costs: made-up corpora, no shard.

python benchmarks/packing.py

Three tasks as they are met: pictures drawn from 10 to 120 tokens of text; sequences of one to five example pictures and
one to be drawn; conversations about a picture of any shape, with texts of lognormal length (median 150 tokens). Texts grow
along the manifest, as where sources follow one another. A token is 16 x 16 pixels; pictures to draw are squares of 256,
and conversations show theirs with 256 as the shorter side; a tenth of what is drawn is shown without its condition.

Real texts differ from their estimates by what `x2i.corpus.text` says of tokenizers (0.7 times the root). "fill": real
tokens by budget, samples that do not fit left out; "over": packs of which a sample must be left out for that.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from x2i import corpus
from x2i.corpus.manifest import MADE, ManifestWriter
from x2i.trainer.lengths import Fit, Measure
from x2i.trainer.mixture import plan_of, table_of
from x2i.trainer.packing import PackPlan
from x2i.trainer.stage import Pack, Stage

_MIXTURES: tuple[dict[str, float], ...] = (
    {"drawing": 1},
    {"sequence": 1},
    {"conversation": 1},
    {"drawing": 4, "sequence": 1},
    {"drawing": 2, "sequence": 1, "conversation": 1},
)


def main() -> None:
    """Write a manifest, plan packs of it, and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=40_000, help="of all tasks")
    parser.add_argument("--budgets", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--packs", type=int, default=8, help="in a step")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        opened = write(Path(folder), options.samples)
        print(
            "| mixture | budget | planned | fill | over | samples in a pack | start, CPU s | CPU us a draw |\n"
            + "|---" * 8
            + "|"
        )
        for mixture in _MIXTURES:
            for budget in options.budgets:
                print(row(opened, mixture, Pack(tokens=budget, packs=options.packs)), flush=True)


def row(opened: corpus.Corpus, mixture: dict[str, float], pack: Pack) -> str:
    """A line of the table: four windows of steps."""
    stage = Stage(name="one", resolution=256, steps=1, lr=1, pack=pack, mixture=mixture)
    table = table_of([opened], [stage], 0.0)
    began = time.process_time()
    plan = plan_of(table, stage, 0)
    assert isinstance(plan, PackPlan)
    start, began = time.process_time() - began, time.process_time()
    steps = [plan.step(n) for n in range(4 * plan.steps)]
    cost, draws = time.process_time() - began, sum(map(len, steps))
    found = Measure(stage)(opened.manifest)
    real = found.shown + np.rint(
        np.random.default_rng(1).normal(0, Fit().spread, len(found.text)) * np.sqrt(found.text)
    )
    held, over = 0.0, 0
    for step in steps:
        loads = np.zeros(pack.packs)
        full = np.zeros(pack.packs, bool)
        for draw in step:
            place, length = draw.pack or 0, float((found.bare if draw.dropped else real)[draw.sample])
            if loads[place] + length <= pack.tokens:
                loads[place] += length
            else:
                full[place] = True
        held, over = held + loads.sum(), over + int(full.sum())
    packs = len(steps) * pack.packs
    told = " : ".join(f"{weight:g} {name}" for name, weight in mixture.items())
    figures = f"{plan.fill:.2%} | {held / packs / pack.tokens:.2%} | {over / packs:.2%} | {draws / packs:.1f}"
    return f"| {told} | {pack.tokens:,} | {figures} | {start:.2f} | {1e6 * cost / draws:.1f} |"


def write(folder: Path, samples: int) -> corpus.Corpus:
    """A corpus without shards: half drawings, a quarter sequences, a quarter conversations."""
    random = np.random.default_rng(0)
    many, few = samples // 2, samples // 4
    rows = [_row(n, "drawing", int(10 + 90 * n / many + random.integers(0, 21)), 0, (640, 480)) for n in range(many)]
    rows += [_row(n, "sequence", int(random.integers(20, 80)), 1 + 5 * n // few, (512, 512)) for n in range(few)]
    for n in range(few):
        words = min(int(random.lognormal(4.6 + 0.8 * n / few, 0.7)), 1500) + 1
        rows.append(_row(n, "conversation", words, 1, None, random.integers(200, 900, 2).tolist()))
    with ManifestWriter(folder / "manifest.parquet", 1024) as manifest:
        manifest.write(pa.Table.from_pylist(rows, MADE))
    (folder / "corpus.json").write_text(json.dumps({"format": 1, "digest": "0", "name": "made-up"}))
    return corpus.open(folder)


def _row(
    number: int, task: str, text: int, inputs: int, output: tuple[int, int] | None, shown: tuple[int, int] = (512, 512)
) -> dict[str, Any]:
    key = f"{task}-{number}"
    sides = [dict(zip(("width", "height"), size, strict=True)) for size in (shown, output or shown)]
    return {
        **dict.fromkeys(("shard", "sha256", "row_id", "source", "location"), "none"),
        "key": key,
        "task_type": task,
        "offset": 0,
        "size": 0,
        "scores": [],
        "members": [],
        "images": [key],
        "instruction_chars": 4 * text,
        "text_tokens": text,
        "image_id": key,
        "input_sizes": sides[:1] * inputs,
        "output_size": sides[1] if output else None,
    }


if __name__ == "__main__":
    main()
