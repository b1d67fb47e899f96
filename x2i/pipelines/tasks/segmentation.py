"""`segmentation`: the picture is the input, the picture with what is asked for painted in a colour the output.

X2I (OmniGen, arXiv 2409.11340, section 3) paints the target blue, with RefCOCO, ADE20K and ReasonSeg as sources; here it
comes from `grounding` and `masks`, or from a map of classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from x2i.corpus.sample import Sample
from x2i.pipelines.ranges import Shares
from x2i.pipelines.regions import VAGUE, Region, alike, is_vague, together
from x2i.pipelines.tasks import _maps
from x2i.pipelines.tasks._masks import mask_of, painted
from x2i.pipelines.tasks._nouns import inside
from x2i.pipelines.tasks._regions import regions, told
from x2i.pipelines.tasks.base import Selected, Skipped, Task, TaskConfig, holds_placeholder, picture_of

Kind = Literal["referring_segmentation", "semantic_segmentation", "reasoning_segmentation"]
Colour = Literal["blue", "red", "green", "yellow", "magenta", "cyan", "orange", "purple", "white", "black"]
#: RGB.
COLOURS: dict[str, tuple[int, int, int]] = {
    "blue": (0, 0, 255),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "yellow": (255, 255, 0),
    "magenta": (255, 0, 255),
    "cyan": (0, 255, 255),
    "orange": (255, 128, 0),
    "purple": (128, 0, 192),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}


class SegmentationConfig(TaskConfig):
    """Which tasks, what is painted, and how."""

    tasks: tuple[Kind, ...] = Field(
        ("referring_segmentation",), min_length=1, description="the tasks to make, e.g. [semantic_segmentation]"
    )
    boxes: str = Field(
        "grounding.boxes", description="column of boxes, with `phrases` and `scores` beside it, e.g. grounding.boxes"
    )
    masks: str = Field("masks", description="annotator (`masks`) of those boxes' masks, e.g. masks")
    semantic: str = Field("semantic", description="annotator (`semantic`) of the map of classes, e.g. semantic")
    question: str | None = Field(
        None,
        description="for reasoning: column of questions, one a box or one text a row, e.g. rows.meta.question",
    )
    colours: tuple[Colour, ...] = Field(
        ("blue",), min_length=1, description="colours of which one is drawn, e.g. [blue] as in X2I, or [red, green]"
    )
    alpha: float = Field(1.0, gt=0, le=1, description="opacity of the paint, e.g. 0.5 to let the object show through")
    min_change: float = Field(
        24.0, ge=0, description="mean change of the painted pixels, of 255; a blue thing is not painted blue, e.g. 24"
    )
    area: Shares = Field((0.005, 0.6), description="share of the picture that may be painted, e.g. [0.005, 0.6]")
    min_score: float = Field(
        0.35, ge=0, le=1, description="phrases with a box that is less sure make no sample, e.g. 0.35"
    )
    min_iou: float = Field(
        0.8, ge=0, le=1, description="phrases with a mask of less predicted IoU make no sample, e.g. 0.8"
    )
    most: int = Field(1, ge=1, description="samples that a row and a task may have, e.g. 3")
    unwanted: tuple[str, ...] = Field(
        VAGUE, description="last words of phrases that are not asked for: pronouns and the like, e.g. [it, photo]"
    )

    @field_validator("masks", "semantic")
    @classmethod
    def _annotator(cls, value: str) -> str:
        return value.partition(".")[0]  # a column of it names it, too

    @model_validator(mode="after")
    def _asked(self) -> SegmentationConfig:
        if "reasoning_segmentation" in self.tasks and self.question is None:
            raise ValueError(
                "reasoning_segmentation needs `question`: a column of questions that describe what a box holds by its "
                "role, e.g. rows.meta.question; without one there is referring_segmentation"
            )
        return self


class Target:
    """What is asked for, where it is, and what is noted of it."""

    def __init__(self, key: str, said: str, mask: np.ndarray, parameters: dict[str, Any], variant: str) -> None:
        self.key, self.said, self.mask, self.parameters, self.variant = key, said, mask, parameters, variant


class Segmentation(Task):
    """The painted picture and the mask are PNGs as large as the stored picture; outside the mask no pixel changes.

    A phrase with several boxes paints them all, or makes no sample if one of them is not fit.
    """

    name = "segmentation"
    Config = SegmentationConfig
    config: SegmentationConfig
    words: ClassVar = {
        "referring_segmentation": ("image", "object", "colour"),
        "referring_segmentation.several": ("image", "object", "colour"),
        "semantic_segmentation": ("image", "object", "colour"),
        "reasoning_segmentation": ("image", "question", "colour"),
    }

    def task_types(self) -> list[str]:
        return list(self.config.tasks)

    @property
    def reads(self) -> Mapping[str, str]:
        config, out = self.config, dict[str, str]()
        if {"referring_segmentation", "reasoning_segmentation"} & set(config.tasks):
            name, _, column = config.boxes.partition(".")
            kind = "regions" if name == "regions" else "grounding"
            out |= {f"{name}.{c}": f"{name}: {{kind: {kind}}}" for c in (column, "scores", "phrases")}
            masks = f"{config.masks}: {{kind: masks, boxes: {config.boxes}}}"
            out |= {f"{config.masks}.{c}": masks for c in ("masks", "box_index", "predicted_iou")}
        if "semantic_segmentation" in config.tasks:
            out |= {f"{config.semantic}.{c}": f"{config.semantic}: {{kind: semantic}}" for c in ("map", "labels")}
        if "reasoning_segmentation" in config.tasks and config.question and not config.question.startswith("rows."):
            out[config.question] = f"{config.question.partition('.')[0]}: {{kind: caption}}"
        return out

    def build(self, row: Selected) -> Iterator[Sample | Skipped]:
        for task_type in self.config.tasks:
            rng = row.generator(task_type)
            targets = getattr(self, f"_{task_type.partition('_')[0]}")(row)
            if isinstance(targets, str):
                yield Skipped(task_type, targets)
                continue
            made = 0
            reason = "nothing_to_paint"
            for number in rng.permutation(len(targets)):
                sample = self._sample(task_type, row, targets[number], rng)
                if isinstance(sample, Sample):
                    yield sample
                    made += 1
                    if made == self.config.most:
                        break
                else:
                    reason = sample
            if not made:
                yield Skipped(task_type, reason)

    def _sample(self, task_type: str, row: Selected, target: Target, rng: np.random.Generator) -> Sample | str:
        share = float(target.mask.mean())
        if not self.config.area[0] <= share <= self.config.area[1]:
            return "too_small" if share < self.config.area[0] else "too_large"
        before = row.pixels[target.mask].astype(np.int16)
        for number in rng.permutation(len(self.config.colours)):
            colour = self.config.colours[number]
            change = self.config.alpha * float(np.abs(before - np.array(COLOURS[colour], np.int16)).mean())
            if change >= self.config.min_change:
                break
        else:
            return "of_that_colour_already"
        word = "question" if target.key.startswith("reasoning") else "object"
        instruction = self.instructions.draw(target.key, rng, colour=colour, **{word: target.said})
        parameters = target.parameters | {"colour": colour, "alpha": self.config.alpha, "share": round(share, 4)}
        output = picture_of(painted(row.pixels, target.mask, COLOURS[colour], self.config.alpha))
        mask = mask_of(target.mask)
        return row.sample(
            task_type, instruction, [row.picture], parameters, output=output, mask=mask, variant=target.variant
        )

    def _referring(self, row: Selected) -> list[Target] | str:
        found = self._phrases(row)
        if isinstance(found, str):
            return found
        kind = "referring_segmentation"
        return [
            Target(
                kind if len(region.index) == 1 else f"{kind}.several",
                inside(region.phrase),
                region.mask,
                _noted(region),
                region.phrase,
            )
            for region in found
        ]

    def _reasoning(self, row: Selected) -> list[Target] | str:
        found = self._phrases(row)
        if isinstance(found, str):
            return found
        questions = told(row, self.config.question) if self.config.question else None
        if not questions:
            return "no_question"
        if isinstance(questions, str) and len(found) > 1:
            return "several_objects"  # the question does not say which of them is meant
        out = []
        for region in found:
            asked = questions if isinstance(questions, str) else _at(questions, region.index)
            if asked and asked.strip() and not holds_placeholder(asked):
                noted = _noted(region) | {"question": self.config.question}
                asked = asked.strip()
                out.append(Target("reasoning_segmentation", asked, region.mask, noted, asked))
        return out or "no_question"

    def _semantic(self, row: Selected) -> list[Target] | str:
        data, labels = (row.value(f"{self.config.semantic}.{c}") for c in ("map", "labels"))
        if data is None or labels is None:
            return "not_annotated"
        classes = _maps.sized(_maps.stored(data), row.size, labels=True)
        out = []
        for label in labels:
            name = _class_name(label["name"])
            mask = classes == label["id"]
            if mask.any() and name:
                noted = {"object": name, "class": int(label["id"])}
                out.append(Target("semantic_segmentation", name, mask, noted, str(label["id"])))
        return out or "no_class"

    def _phrases(self, row: Selected) -> list[Region] | str:
        """Each phrase that is fit, with all its boxes, in the annotator's order; or why there is none."""
        found = regions(row, self.config.boxes, masks=self.config.masks)
        if found is None:
            return "not_annotated"
        if not found:
            return "no_box"
        reason = "vague_phrase"
        out = []
        for phrase, members in alike(found, lambda r: r.phrase.casefold()).items():
            region = together(members)
            if is_vague(phrase, self.config.unwanted) or holds_placeholder(phrase):
                continue
            if region.score < self.config.min_score:
                reason = "unsure_box"
            elif not region.masked or (region.quality or 0.0) < self.config.min_iou:
                reason = "poor_mask"
            else:
                out.append(region)
        return out or reason


def _noted(region: Region) -> dict[str, Any]:
    boxes = [[round(v, 4) for v in box] for box in region.boxes]
    return {"object": region.phrase, "boxes": boxes, "box_index": list(region.index)}


def _at(questions: Any, indices: Iterable[int]) -> str | None:
    """The first question that one of these boxes has."""
    return next((questions[i] for i in indices if i < len(questions) and isinstance(questions[i], str)), None)


def _class_name(name: str) -> str:
    """A class's first name: ADE20K's have synonyms, as in `person, individual` or `door;double door`."""
    return name.partition(",")[0].partition(";")[0].strip()
