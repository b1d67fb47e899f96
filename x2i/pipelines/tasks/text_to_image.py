"""`text_to_image`: a caption is the instruction, the picture is the output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from pydantic import Field, field_validator

from x2i.corpus.sample import Sample
from x2i.pipelines.tasks.base import Selected, Skipped, Task, TaskConfig, caption, holds_placeholder


class TextToImageConfig(TaskConfig):
    """Which captions, in what proportion, and limits on them."""

    captions: dict[str, float] = Field(
        {"rows.text": 1.0},
        min_length=1,
        description="columns of captions and how often each is drawn, among those that a row has, e.g. "
        "{rows.text: 1, caption.long: 2, caption.short: 1}",
    )
    min_chars: int = Field(3, ge=0, description="shorter captions make no sample, e.g. 3")
    max_chars: int = Field(4000, gt=0, description="longer captions make no sample, e.g. 4000")

    @field_validator("captions")
    @classmethod
    def _columns(cls, value: dict[str, float]) -> dict[str, float]:
        for column, weight in value.items():
            if column.count(".") != 1:
                raise ValueError(f"{column!r} is no column: annotator.column, or rows.text")
            if weight <= 0:
                raise ValueError(f"{column}: {weight} of a proportion; leave the column out, or give it more than 0")
        return value


class TextToImage(Task):
    """One sample per row that has a caption; the caption as it is. Its parameters say which column it is from."""

    name = "text_to_image"
    Config = TextToImageConfig
    config: TextToImageConfig

    def task_types(self) -> list[str]:
        return [self.name]

    @property
    def reads(self) -> Mapping[str, str]:
        names = {column: column.partition(".")[0] for column in self.config.captions}
        return {column: f"{name}: {{kind: caption}}" for column, name in names.items() if name != "rows"}

    def build(self, row: Selected) -> Iterator[Sample | Skipped]:
        usable: dict[str, str] = {}
        problems: list[str] = []
        for column in self.config.captions:
            text = caption(row, column)
            problem = self._problem(text)
            if text is not None and problem is None:
                usable[column] = text
            elif problem is not None:
                problems.append(problem)
        if not usable:
            # what keeps a text out says more than that another is missing
            yield Skipped(self.name, next((p for p in problems if p != "no_text"), "no_text"))
            return
        weights = np.array([self.config.captions[column] for column in usable])
        drawn = row.generator(self.name).choice(len(usable), p=weights / weights.sum())
        column = list(usable)[int(drawn)]
        yield row.sample(self.name, usable[column], parameters={"text": column})

    def _problem(self, text: str | None) -> str | None:
        if text is None:
            return "no_text"
        if holds_placeholder(text):
            return "text_has_placeholders"
        if len(text) < self.config.min_chars:
            return "text_too_short"
        return "text_too_long" if len(text) > self.config.max_chars else None
