"""Annotators that paint over a picture's objects: which columns have these, how they are read, what a model is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from x2i.pipelines.annotators._columns import column
from x2i.pipelines.annotators._torch import ModelConfig
from x2i.pipelines.annotators.base import Item
from x2i.pipelines.regions import Region, numbered, read


class ObjectsConfig(ModelConfig):
    """Where the objects' boxes, phrases and masks are, and how a pipeline of `_diffusers` paints."""

    prompt: str
    avoid: str
    strength: float

    boxes: str = Field("grounding.boxes", description="column of boxes, e.g. faces.boxes")
    phrases: str | None = Field(
        "grounding.phrases",
        description="column of what each box holds, e.g. grounding.phrases; null: one word for all, given beside",
    )
    masks: str | None = Field(
        "masks.masks", description="column of a mask for each box, e.g. masks.masks; null: the whole box is meant"
    )

    size: int = Field(512, ge=16, description="longer side of what a model sees, in pixels, e.g. 1024")
    steps: int = Field(30, ge=1, description="a model's steps of denoising, e.g. 30")
    guidance: float = Field(7.5, ge=0, description="weight of a model's prompt, e.g. 7.5; 2.5 for Kontext")
    quality: int = Field(95, ge=50, le=100, description="of the JPEGs that are kept, e.g. 95")

    @property
    def _index(self) -> str | None:
        return f"{self.masks.partition('.')[0]}.box_index" if self.masks else None

    @property
    def columns(self) -> tuple[str, ...]:
        """All that is read."""
        return tuple(c for c in (self.boxes, self.phrases, self.masks, self._index) if c)

    def cells(self, batch: Sequence[Item], annotator: str) -> list[dict[str, Any]]:
        """The columns' values, by row. Raises X2IError: the batch does not bring one."""
        values = (column(batch, name, annotator).to_pylist() for name in self.columns)
        return [dict(zip(self.columns, row, strict=True)) for row in zip(*values, strict=True)]

    def regions(self, cells: Mapping[str, Any], size: tuple[int, int], noun: str | None) -> list[Region]:
        """The objects of a row's cells in a picture of size (width, height).

        Args:
            noun: what the boxes hold where there is no column of phrases.
        """
        masks = numbered(cells[self.masks], cells[self._index]) if self.masks and self._index else {}
        return read(size, cells[self.boxes] or [], cells[self.phrases] if self.phrases else noun, masks)

    def asked(self, phrase: str, seed: int) -> dict[str, Any]:
        """What a pipeline of `_diffusers` is told of a phrase's object, beside its pixels."""
        return {
            "prompt": self.prompt.replace("{object}", phrase),
            "avoid": self.avoid.replace("{object}", phrase),
            "longest": self.size,
            "steps": self.steps,
            "guidance": self.guidance,
            "strength": self.strength,
            "seed": seed,
        }
