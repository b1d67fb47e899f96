"""What a stage's mixture draws from: strata, tasks and samples of the table."""

from __future__ import annotations

from collections.abc import Sequence

from x2i.corpus.corpus import Corpus
from x2i.trainer.buckets import kept
from x2i.trainer.config import Stage
from x2i.trainer.index import HELD_OUT, TRAIN
from x2i.trainer.lengths import COLUMNS, tokens
from x2i.trainer.plan import OPEN, STEPS, BucketPlan, StagePlan
from x2i.trainer.table import Samples, SampleTable

#: Row groups, evenly spaced, from which the mean length of a stratum's samples is taken.
_GROUPS = 16


def table_of(corpora: Sequence[Corpus], stages: Sequence[Stage], held_out: float) -> SampleTable:
    """The samples of these corpora, told apart as the stages need it. Raises RecipeError if there are none."""
    return SampleTable(corpora, held_out, list(dict.fromkeys(s.buckets for s in stages if s.buckets)))


def plan_of(table: SampleTable, stage: Stage, seed: int) -> StagePlan | BucketPlan:
    """The stream of a stage. Raises RecipeError if its mixture names what has no training samples."""
    samples = table.samples(TRAIN, stage.mixture_by)
    mixture = dict(stage.mixture)
    if stage.mixture_unit == "tokens":
        for name in mixture.keys() & {n for n, s in samples.items() if len(s)}:
            mean = tokens(samples[name].some(COLUMNS, _GROUPS), stage).mean()
            mixture[name] /= float(f"{mean:.6g}")  # not to hang on the last bit of a sum
    plain = StagePlan(samples, mixture, stage.batch, seed, stage.name)
    return _bucketed(table, stage, seed, mixture) if stage.buckets else plain


def _bucketed(table: SampleTable, stage: Stage, seed: int, mixture: dict[str, float]) -> BucketPlan:
    """A plan for each bucket. One that would not get half a step in a window leaves its samples to its neighbour."""
    place = table.buckets.index(stage.buckets)
    total = {name: len(s) for name, s in table.samples(TRAIN, stage.mixture_by).items()}
    weight = {name: w / sum(mixture.values()) / total[name] for name, w in mixture.items()}  # of one sample

    def of(chosen: set[int]) -> dict[str, Samples]:
        found = table.samples(TRAIN, stage.mixture_by, of=lambda cell: cell.buckets[place] in chosen)
        return {name: found[name] for name in mixture if len(found[name])}

    shares = {b: sum(weight[name] * len(s) for name, s in of({b}).items()) for b in range(len(stage.buckets))}
    serving = kept({b: share for b, share in shares.items() if share}, stage.buckets, 0.5 / STEPS)
    plans, parts = {}, {}
    for bucket in sorted(set(serving.values())):
        samples = of({b for b, by in serving.items() if by == bucket})
        weights = {name: weight[name] * len(s) for name, s in samples.items()}
        size = stage.buckets[bucket]
        name = f"{stage.name}/{size[0]}x{size[1]}"
        opened = OPEN // len(set(serving.values()))
        plans[size] = StagePlan(samples, weights, stage.batch, seed, name, open_samples=opened)
        parts[size] = sum(weights.values())
    return BucketPlan(plans, parts, seed, stage.name)


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
