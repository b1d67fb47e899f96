"""How `editing` is configured, what an edit is, and the scene that it changes: a row and the things in it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pydantic import Field

from x2i.corpus.sample import Picture
from x2i.pipelines.ranges import Shares
from x2i.pipelines.regions import Region, numbered, read, things
from x2i.pipelines.tasks import _maps
from x2i.pipelines.tasks._styles import STYLES
from x2i.pipelines.tasks.base import Selected, TaskConfig, holds_placeholder

Kind = Literal[
    "style", "unstyle", "remove_object", "add_object", "recolour", "recolour_all", "background_plain", "background_scene",
    "background_blur", "background_focus", "background_swap", "background_return",
]  # fmt: skip


class EditingConfig(TaskConfig):
    """Which edits, where the objects are, and what counts as changed."""

    tasks: tuple[Kind, ...] = Field(
        ("style", "unstyle", "recolour_all"),
        min_length=1,
        description="the edits to make, e.g. [style, add_object]; those of the default need no annotator",
    )
    styles: tuple[str, ...] = Field(
        tuple(STYLES), min_length=1, description="filters from which a row's is drawn, e.g. [sepia, cartoon]"
    )
    erase: str = Field("erase", description="annotator with the pictures without an object, e.g. erase")
    masks: str = Field("masks", description="annotator whose `masks` are those of the phrases' boxes, e.g. masks")
    phrases: str = Field("grounding.phrases", description="column of what the boxes hold, e.g. grounding.phrases")
    semantic: str | None = Field(
        None, description="annotator whose label map has the subject, instead of `masks`, e.g. semantic"
    )
    subjects: tuple[str, ...] = Field(
        ("person", "animal", "car", "bus", "truck", "van", "boat", "airplane", "bicycle", "minibike"),
        description="for that, classes that may be a subject, e.g. [person, animal]",
    )
    text: str = Field("rows.text", description="column of the caption that `background_scene` says, e.g. caption.long")
    object: Shares = Field(
        (0.01, 0.5), description="share of the picture that a recoloured object may have, e.g. [0.01, 0.5]"
    )
    subject: Shares = Field((0.05, 0.6), description="share of the picture that a subject may have, e.g. [0.05, 0.6]")
    colour: float = Field(
        0.6,
        gt=0,
        le=1,
        description="share of an object's coloured pixels that must have the colour that it is said to have, e.g. 0.6",
    )
    everywhere: Shares = Field(
        (0.03, 0.6), description="share of the picture that must have the colour of `recolour_all`, e.g. [0.03, 0.6]"
    )
    blur: Shares = Field(
        (0.015, 0.04), description="Gaussian blur of a background, as a share of the shorter side, e.g. [0.01, 0.02]"
    )
    gradient: float = Field(0.3, ge=0, le=1, description="share of plain backgrounds that are gradients, e.g. 0.3")
    share: float = Field(
        0.2, gt=0, le=1, description="share of the rows that get another's background, or lend theirs, e.g. 0.2"
    )
    changed: int = Field(
        4, ge=0, le=255, description="a pixel has changed if a value did by more than this, of 255, e.g. 4"
    )
    min_changed: float = Field(
        0.002, ge=0, le=1, description="edits that change less of the picture are left out, e.g. 0.002"
    )


@dataclass
class Edit:
    """What `build` makes a sample of. No output: the row's own picture."""

    words: dict[str, str]
    inputs: list[Picture]
    parameters: dict[str, Any]
    output: Picture | None = None
    mask: np.ndarray | None = None  # bool [height, width]
    others: tuple[Selected, ...] = ()


class Scene:
    """A row with its things, found when they are asked for."""

    def __init__(self, row: Selected, config: EditingConfig) -> None:
        self.row, self.config = row, config
        self.size = (row.picture.width, row.picture.height)

    @cached_property
    def things(self) -> list[Region] | None:
        """What has a phrase and masks; None where the annotators did not see the row."""
        config, row = self.config, self.row
        columns = (config.phrases, f"{config.masks}.masks", f"{config.masks}.box_index")
        phrases, codes, index = (row.value(c) for c in columns)
        if phrases is None or codes is None or index is None:
            return None
        found = read(self.size, None, phrases, numbered(codes, index))
        return [t for t in things(found) if not holds_placeholder(t.phrase)]

    @cached_property
    def subject(self) -> Region | str:
        """The largest thing that may be one, or why there is none."""
        found = self.things if self.config.semantic is None else self._classes()
        if found is None:
            return "not_annotated"
        least, most = self.config.subject
        fits = [t for t in found if least <= t.share <= most]
        return max(fits, key=lambda t: t.share) if fits else "no_subject"

    def _classes(self) -> list[Region] | None:
        stored, labels = (self.row.value(f"{self.config.semantic}.{c}") for c in ("map", "labels"))
        if stored is None or labels is None:
            return None
        classes = _maps.sized(_maps.stored(stored), self.size, labels=True)
        named = [(i["id"], i["name"].split(",")[0].split(";")[0].strip()) for i in labels]
        return [
            Region(self.size, name, codes=(classes == number,))
            for number, name in named
            if name in self.config.subjects
        ]
