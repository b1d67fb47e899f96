"""How full packs are, how often one holds more than its budget, and what a draw costs: made-up corpora, no shard.

python benchmarks/packing.py [--bound]

Three tasks as they are met: pictures drawn from 10 to 120 tokens of text; sequences of one to five example pictures and
one to be drawn; conversations about a picture of any shape, with texts of lognormal length (median 150 tokens). Texts grow
along the manifest, as where sources follow one another. A token is 16 x 16 pixels; pictures to draw are squares of 256,
and conversations show theirs with 256 as the shorter side; a tenth of what is drawn is shown without its condition.

Real texts differ from their estimates by what `x2i.corpus.text` says of tokenizers (0.7 times the root); or by 1.5 times
the root, as where a vocabulary is poor in the corpus's words. Fill: real tokens by budget, samples that do not fit left
out. "estimated" plans by estimates, as of large corpora; "counted" by the real counts, as of small ones
(`stages.pack.count`). "over": packs of which a sample must be left out when they are made; "left out": samples of which
this is true, and those for which the plan finds no room; both estimated, 0.7.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from x2i import corpus
from x2i.corpus.manifest import MADE, ManifestWriter
from x2i.trainer.lengths import Fit, Lengths, Measure
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
    parser.add_argument("--bound", action="store_true", help="also what no packing can exceed (a minute a row)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        opened = write(Path(folder), options.samples)
        columns = ["mixture", "budget", "planned", "estimated", "by tokens", "estimated, 1.5", "counted, 1.5", "over"]
        columns += ["left out", "samples in a pack", "start, CPU s", "CPU us a draw", *["bound"] * options.bound]
        print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
        for mixture in _MIXTURES:
            for budget in options.budgets:
                print(row(opened, mixture, Pack(tokens=budget, packs=options.packs), options.bound), flush=True)


@dataclass(frozen=True)
class Packed:
    """Four windows of steps. Shares: `fill` of the budget, `over` of the packs, `left` of the samples."""

    plan: PackPlan
    fill: float
    over: float
    left: float
    draws: float
    start: float
    cost: float


def row(opened: corpus.Corpus, mixture: dict[str, float], pack: Pack, bounded: bool) -> str:
    """A line of the table."""
    one, by_tokens = packed(opened, mixture, pack), packed(opened, mixture, pack, unit="tokens")
    poor = [packed(opened, mixture, pack, 1.5, counted=counted) for counted in (False, True)]
    told = " : ".join(f"{weight:g} {name}" for name, weight in mixture.items())
    fills = " | ".join(f"{found.fill:.1%}" for found in (one, by_tokens, *poor))
    figures = f"{one.plan.fill:.1%} | {fills} | {one.over:.2%} | {one.left:.2%} | {one.draws:.1f}"
    end = f" {bound(opened, mixture, pack):.1%} |" if bounded else ""
    return f"| {told} | {pack.tokens:,} | {figures} | {one.start:.2f} | {one.cost:.1f} |{end}"


def packed(
    opened: corpus.Corpus,
    mixture: dict[str, float],
    pack: Pack,
    spread: float = Fit().spread,
    unit: Literal["samples", "tokens"] = "samples",
    counted: bool = False,
) -> Packed:
    """Plan, and make the packs of real texts.

    Args:
        spread: of the texts' tokens, by the root of the estimate; `counted`: whether the plan knows them.
        unit: of the mixture's weights.
    """
    stage = Stage(name="one", resolution=256, steps=1, lr=1, pack=pack, mixture=mixture, mixture_unit=unit)
    table = table_of([opened], [stage], 0.0)
    texts = opened.manifest["text_tokens"].to_numpy()
    real = np.maximum(np.rint(texts + np.random.default_rng(1).normal(0, spread, len(texts)) * np.sqrt(texts)), 1)
    fit = Fit(spread=spread)
    lengths = Lengths(text=fit, said=fit, counted=real.astype(np.int32) if counted else None)
    began = time.process_time()
    plan = plan_of(table, stage, 0, lengths)
    assert isinstance(plan, PackPlan)
    start, began = time.process_time() - began, time.process_time()
    steps = [plan.step(n) for n in range(4 * plan.steps)]
    cost, draws = time.process_time() - began, sum(map(len, steps))
    truth = Measure(stage, Lengths(counted=real.astype(np.int32)))(opened.manifest)
    held, over, left = 0, 0, 0
    for step in steps:
        loads = np.zeros(pack.packs, np.int64)
        full = np.zeros(pack.packs, bool)
        for draw in step:
            place, length = draw.pack or 0, int((truth.bare if draw.dropped else truth.shown)[draw.sample])
            if loads[place] + length <= pack.tokens:
                loads[place] += length
            else:
                full[place], left = True, left + 1
        held, over = held + int(loads.sum()), over + int(full.sum())
    packs = len(steps) * pack.packs
    wanted = 4 * plan.window * (1 - _longer(opened, stage, mixture, plan.limit))
    shares = held / packs / pack.tokens, over / packs, (max(wanted - draws, 0) + left) / wanted
    return Packed(plan, *shares, draws / packs, start, 1e6 * cost / draws)


def _longer(opened: corpus.Corpus, stage: Stage, mixture: dict[str, float], limit: int) -> float:
    """Share of the draws whose sample is longer than a pack."""
    shown, tasks = Measure(stage)(opened.manifest).shown, opened.manifest["task_type"].to_numpy(zero_copy_only=False)
    whole = sum(mixture.values())
    return sum(weight / whole * float((shown[tasks == name] > limit).mean()) for name, weight in mixture.items())


def bound(opened: corpus.Corpus, mixture: dict[str, float], pack: Pack, unit: int = 8) -> float:
    """Share of the budget that no packing of these samples exceeds, their lengths known, in packs without end.

    The linear program over all ways to fill a pack (Gilmore and Gomory 1961), of lengths rounded down to `unit` tokens:
    what it needs of packs, by the dual of its last columns, is less than any packing needs.
    """
    from scipy.optimize import linprog

    stage = Stage(name="one", resolution=256, steps=1, lr=1, pack=pack, mixture=mixture)
    found, tasks = Measure(stage)(opened.manifest), opened.manifest["task_type"].to_numpy(zero_copy_only=False)
    lengths, weights = [], []
    for name, weight in mixture.items():
        mine = np.flatnonzero((tasks == name) & (found.shown <= pack.tokens))
        drop = stage.condition_dropout if name != "conversation" else 0.0
        for values, share in ((found.shown, 1 - drop), (found.bare, drop)):
            lengths.append(values[mine])
            weights.append(np.full(len(mine), share * weight / np.count_nonzero(tasks == name)))
    length, weight_of = np.concatenate(lengths), np.concatenate(weights)
    weight_of /= weight_of.sum()
    sizes, place = np.unique(length // unit, return_inverse=True)
    wanted, room = np.bincount(place, weight_of), pack.tokens // unit
    ways = [np.where(np.arange(len(sizes)) == n, room // size, 0) for n, size in enumerate(sizes.tolist())]
    while True:
        solved = linprog(np.ones(len(ways)), A_eq=np.array(ways).T, b_eq=wanted, method="highs")
        worth, way = _fullest(sizes, solved.eqlin.marginals, room)
        if worth < 1.0005:
            return min(float(length @ weight_of) / (solved.fun / max(worth, 1.0)) / pack.tokens, 1.0)
        ways.append(way)


def _fullest(sizes: np.ndarray, prices: np.ndarray, room: int) -> tuple[float, np.ndarray]:
    """The most that fits into a pack, by price, and how often each size is in it."""
    best, taken = np.zeros(room + 1), np.full(room + 1, -1)
    for space in range(1, room + 1):
        count = int(np.searchsorted(sizes, space, "right"))
        sums = best[space - sizes[:count]] + prices[:count]
        best[space] = best[space - 1]
        if count and sums.max() > best[space]:
            best[space], taken[space] = sums.max(), sums.argmax()
    way, space = np.zeros(len(sizes), np.int64), room
    while space > 0:
        if taken[space] < 0:
            space -= 1
        else:
            way[taken[space]] += 1
            space -= int(sizes[taken[space]])
    return float(best[room]), way


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
