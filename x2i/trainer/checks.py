"""What a run's stages ask of its model and its samples: refused before the first step."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from x2i.base.errors import RecipeError, X2IError
from x2i.model.base import Model, Processor
from x2i.trainer.config import RunConfig
from x2i.trainer.data import DamagedSample, SampleReader
from x2i.trainer.mixture import tasks_of, training_of
from x2i.trainer.stage import Stage
from x2i.trainer.table import SampleTable

#: Samples of a task that are read to see whether they tell which answer is worse.
_ASKED = 16


def check_stages(
    run: RunConfig, table: SampleTable, model: Model[Any], processors: Sequence[Processor[Any]], reader: SampleReader
) -> None:
    """Refuse what a model cannot learn.

    Args:
        run: the run file; `table`: its samples; `reader`: reads them.
        model: to be trained; `processors`: make its inputs, by stage.

    Raises:
        RecipeError: a stage has samples that the model cannot draw, cannot answer, or not in that size; or none that say
            which answer is worse, where that is to be learned.
    """
    for place, stage in enumerate(run.stages):
        tasks = tasks_of(table, stage)
        chats, pictures = sorted(tasks & table.chats), sorted(tasks - table.chats)
        if chats and not model.answers:
            raise RecipeError(
                f"stages.{stage.name}.mixture: samples of {', '.join(chats)} have no output image, and this model "
                "writes no text: leave them out, or give it a head for text (model: {text_head: true})"
            )
        if pictures and not model.draws:
            raise RecipeError(
                f"stages.{stage.name}.mixture: samples of {', '.join(pictures)} are to be drawn, and this model only "
                "writes text: leave them out"
            )
        if stage.preference is not None and pictures:
            raise RecipeError(f"stages.{stage.name}.preference: {', '.join(pictures)} are drawn, not answered")
        if stage.preference is not None:
            _check_preferences(table, reader, stage)
        try:
            if pictures:
                processors[place].check_size(stage.resolution, stage.resolution)
        except X2IError as error:
            raise RecipeError(f"stages.{place}.resolution: {error}") from None
        for width, height in stage.buckets if pictures else ():
            try:
                processors[place].check_size(height, width)
            except X2IError as error:
                raise RecipeError(f"stages.{place}.buckets: [{width}, {height}]: {error}") from None


def _check_preferences(table: SampleTable, reader: SampleReader, stage: Stage) -> None:
    """Refuse a stage for whose samples nobody says which answer is worse: no manifest tells. Raises RecipeError."""
    strata: dict[str, list[int]] = {}
    for task, samples in training_of(table, stage).items():
        strata.setdefault(task if stage.mixture_by == "task" else "the mixture", []).extend(samples.spread(_ASKED))
    for name, chosen in strata.items():
        worse = []
        for sample in chosen:
            with contextlib.suppress(DamagedSample):  # logged when the trainer meets it
                worse.append(reader.read(sample, 8).rejected)
        if worse and not any(worse):
            raise RecipeError(
                f"stages.{stage.name}.preference: {len(worse)} samples of {name} were read, and none has a "
                "rejected_response to learn from: name other tasks in the mixture, or build a corpus that has them (the "
                "task diagnose makes them with `rejected: true`)"
            )
