"""What a stage's mixture draws from: strata, tasks and samples of the table."""

from __future__ import annotations

from x2i.trainer.config import Stage
from x2i.trainer.index import HELD_OUT, TRAIN
from x2i.trainer.lengths import COLUMNS, tokens
from x2i.trainer.plan import StagePlan
from x2i.trainer.table import Samples, SampleTable

#: Row groups, evenly spaced, from which the mean length of a stratum's samples is taken.
_GROUPS = 16


def plan_of(table: SampleTable, stage: Stage, seed: int) -> StagePlan:
    """The stream of a stage. Raises RecipeError if its mixture names what has no training samples."""
    samples = table.samples(TRAIN, stage.mixture_by)
    mixture = dict(stage.mixture)
    if stage.mixture_unit == "tokens":
        for name in mixture.keys() & {n for n, s in samples.items() if len(s)}:
            mean = tokens(samples[name].some(COLUMNS, _GROUPS), stage).mean()
            mixture[name] /= float(f"{mean:.6g}")  # not to hang on the last bit of a sum
    return StagePlan(samples, mixture, stage.batch, seed, stage.name)


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
