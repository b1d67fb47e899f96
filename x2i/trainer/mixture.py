"""What a stage's mixture draws from: strata, tasks and samples of the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from x2i.base.errors import RecipeError
from x2i.corpus.corpus import Corpus
from x2i.trainer.bucketed import bucket_streams
from x2i.trainer.buckets import kept
from x2i.trainer.config import Shuffle
from x2i.trainer.index import HELD_OUT, TRAIN
from x2i.trainer.lengths import ASKED, COLUMNS, EARLIER, Fit, Lengths, Measure, calibrate, texts, tokens
from x2i.trainer.measured import MeasuredGroups, MeasuredSamples
from x2i.trainer.packing import PackPlan
from x2i.trainer.plan import STEPS, WINDOW, BucketPlan, Plan, StagePlan, Stream
from x2i.trainer.stage import Stage
from x2i.trainer.table import Cell, Samples, SampleTable

#: Row groups, evenly spaced, from which the mean length of a stratum's samples is taken.
_GROUPS = 16


def table_of(corpora: Sequence[Corpus], stages: Sequence[Stage], held_out: float) -> SampleTable:
    """The samples of these corpora, told apart as the stages need it. Raises RecipeError if there are none."""
    buckets = dict.fromkeys(s.buckets for s in stages if s.buckets and s.pack is None)
    return SampleTable(corpora, held_out, list(buckets), packed=any(s.pack is not None for s in stages))


def plan_of(
    table: SampleTable, stage: Stage, seed: int, lengths: Lengths | None = None, shuffle: Shuffle | None = None
) -> Plan:
    """The stream of a stage. Raises RecipeError if its mixture names what has no training samples.

    Args:
        lengths: what the run's model makes of samples; packed stages are planned by it. Default: a guess.
        shuffle: the run's.
    """
    shuffle = shuffle or Shuffle()
    if stage.pack is not None:
        return _packed(table, stage, seed, Measure(stage, lengths), shuffle)
    assert stage.batch is not None
    samples = table.samples(TRAIN, stage.mixture_by)
    mixture = dict(stage.mixture)
    if stage.mixture_unit == "tokens":
        for name in mixture.keys() & {n for n, s in samples.items() if len(s)}:
            mean = tokens(samples[name].some([*COLUMNS, *EARLIER], _GROUPS), stage).mean()
            mixture[name] /= float(f"{mean:.6g}")  # not to hang on the last bit of a sum
    plain = StagePlan(samples, mixture, stage.batch, seed, stage.name, shuffle=shuffle)
    return _bucketed(table, stage, seed, mixture, shuffle) if stage.buckets else plain


def calibrated(
    table: SampleTable, count: Callable[[int], int | None], number: int = ASKED, preferred: bool = False
) -> Fit:
    """What a tokenizer makes of the manifest's estimates of texts, asked of some training samples of all corpora.

    Args:
        count: tokens of a sample's text (its number in the table), without what stands for pictures; None to leave it
            out, as where it cannot be read.
        number: samples to ask, in row groups evenly spaced.
        preferred: whether it counts a sample's text with either answer, together.
    """
    chosen = np.unique(np.linspace(0, len(table.sizes) - 1, min(_GROUPS, len(table.sizes))).astype(int)).tolist()
    pairs: list[tuple[float, float]] = []
    for group in chosen:
        rows = np.flatnonzero(table.kinds(group) % 3 == TRAIN)
        some = rows[np.unique(np.linspace(0, len(rows) - 1, min(number // len(chosen) + 1, len(rows))).astype(int))]
        estimates = texts(table.lengths(group), preferred)
        told = [(row, count(table.first(group) + row)) for row in some.tolist()]
        pairs += [(float(estimates[row]), float(real)) for row, real in told if real is not None]
    return calibrate(pairs)


def checked(table: SampleTable, stage: Stage) -> None:
    """Raise RecipeError if a stage's mixture names what has no training samples."""
    there = {name for name, samples in table.samples(TRAIN, stage.mixture_by).items() if len(samples)}
    if missing := [name for name in stage.mixture if name not in there]:
        known = ", ".join(sorted(there)) or "none"
        raise RecipeError(
            f"stages.{stage.name}.mixture: the corpora have no training samples of {', '.join(missing)}; they have {known}"
        )


def _packed(table: SampleTable, stage: Stage, seed: int, measure: Measure, shuffle: Shuffle) -> PackPlan:
    """A plan of packs, by the lengths that a model makes of the samples."""
    assert stage.pack is not None
    checked(table, stage)
    groups = MeasuredGroups(table, measure)
    codes: dict[str, list[int]] = {}
    for code, cell in enumerate(table.cells):
        codes.setdefault(table.name(cell, stage.mixture_by), []).append(code)
    found = {name: MeasuredSamples(groups, codes[name], TRAIN) for name in stage.mixture if name in codes}
    samples = {name: each for name, each in found.items() if len(each.sizes)}
    return PackPlan(
        *(samples, stage.mixture, stage.pack, seed, stage.name),
        by_tokens=stage.mixture_unit == "tokens",
        dropout=stage.condition_dropout,
        shuffle=shuffle,
    )


def _bucketed(table: SampleTable, stage: Stage, seed: int, mixture: dict[str, float], shuffle: Shuffle) -> BucketPlan:
    """A plan for each bucket.

    What would get less than half a step in a window of steps, or of a stratum less than half a draw in a window of
    draws, is served by the neighbouring bucket: whole steps and draws would repeat few samples over and over.
    """
    assert stage.batch is not None
    place, sizes, batch = table.buckets.index(stage.buckets), stage.buckets, stage.batch

    def samples_of(bucket: int, of: Callable[[Cell], int | None]) -> dict[str, Samples]:
        found = table.samples(TRAIN, stage.mixture_by, lambda cell: of(cell) == bucket)
        return {name: samples for name, samples in found.items() if name in mixture and len(samples)}

    counts = {
        (name, bucket): len(samples)
        for bucket in range(len(sizes))
        for name, samples in samples_of(bucket, lambda cell: cell.buckets[place]).items()
    }
    total = sum(mixture.values())
    weight = {name: w / total / sum(n for (m, _), n in counts.items() if m == name) for name, w in mixture.items()}

    def shares(serving: dict[tuple[str, int], int]) -> dict[int, dict[str, float]]:
        out: dict[int, dict[str, float]] = {bucket: {} for bucket in sorted(set(serving.values()))}
        for (name, bucket), count in counts.items():
            part = out[serving[name, bucket]]
            part[name] = part.get(name, 0.0) + weight[name] * count
        return out

    each = {bucket: sum(part.values()) for bucket, part in shares({c: c[1] for c in counts}).items()}
    large = kept(each, sizes, 0.5 / STEPS)
    serving = {(name, bucket): large[bucket] for name, bucket in counts}
    parts = shares(serving)
    for name in mixture:
        own = {bucket: part[name] / sum(part.values()) for bucket, part in parts.items() if name in part}
        here = kept(own, sizes, 0.5 / WINDOW)
        serving |= {(n, bucket): here[by] for (n, bucket), by in serving.items() if n == name}

    def named(cell: Cell) -> str:
        return table.name(cell, stage.mixture_by)

    def served(cell: Cell) -> int | None:
        return serving.get((named(cell), cell.buckets[place]))

    plans, parts = {}, shares(serving)
    streams: dict[tuple[str, int], Stream] = {}
    for name in sorted(mixture):
        codes = {c: b for c, cell in enumerate(table.cells) if (b := served(cell)) is not None and named(cell) == name}
        mine = sorted(set(codes.values()))
        wide = max(round(shuffle.window * mixture[name] / total), 1)
        made = bucket_streams(
            *(table, {code: mine.index(bucket) for code, bucket in codes.items()}, TRAIN, (seed, stage.name, name)),
            *(shuffle.block, wide, len(mixture)),
        )
        streams |= {(name, bucket): stream for bucket, stream in zip(mine, made, strict=True)}
    for bucket, part in parts.items():
        width, height = sizes[bucket]
        plans[width, height] = StagePlan(
            *(samples_of(bucket, served), part, batch, seed, f"{stage.name}/{width}x{height}"),
            streams={name: streams[name, bucket] for name in part},
        )
    return BucketPlan(plans, {sizes[b]: sum(part.values()) for b, part in parts.items()}, seed, stage.name)


def tasks_of(table: SampleTable, stage: Stage) -> set[str]:
    """The tasks that a stage draws."""
    return {cell.task for cell in table.cells if table.name(cell, stage.mixture_by) in stage.mixture}


def training_of(table: SampleTable, stage: Stage) -> dict[str, Samples]:
    """By task, the samples that a stage draws from."""
    return _of(table, stage, TRAIN)


def held_out_of(table: SampleTable, stage: Stage) -> dict[str, Samples]:
    """By task, the samples that a stage is evaluated on: those that it would draw from if they were not held out."""
    return _of(table, stage, HELD_OUT)


def _of(table: SampleTable, stage: Stage, side: int) -> dict[str, Samples]:
    tasks = tasks_of(table, stage)
    found = table.samples(side, of=lambda cell: table.name(cell, stage.mixture_by) in stage.mixture)
    return {task: samples for task, samples in found.items() if task in tasks}
