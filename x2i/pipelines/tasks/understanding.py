"""`understanding`: questions about a picture and their answers, from its caption and its annotations.

Samples carry `messages` and `objects` as ms-swift reads them: `<image>` for the picture, `<ref-object>` and `<bbox>` for
what is spoken of, boxes as shares of the picture's sides (`bbox_type: norm1`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from x2i.corpus.sample import Sample
from x2i.pipelines.tasks.base import Selected, Skipped, Task, TaskConfig, caption, holds_placeholder

Kind = Literal["describe", "locate", "count", "read", "classify"]
Talk = tuple[list[dict[str, str]], dict[str, Any] | None, dict[str, Any]]  # messages, objects, parameters


class UnderstandingConfig(TaskConfig):
    """Which questions are asked, and where the answers are."""

    tasks: tuple[Kind, ...] = Field(("describe",), min_length=1, description="the tasks to make, e.g. [describe, read]")
    text: str = Field("rows.text", description="column of the caption that `describe` answers with, e.g. caption.long")
    objects: str = Field(
        "grounding", description="annotator whose `boxes` (and `phrases`) `locate` and `count` ask for, e.g. faces"
    )
    object_name: str | None = Field(
        None, description="what the boxes hold where that annotator has no `phrases`, e.g. face"
    )
    ocr: str = Field("ocr", description="annotator whose `texts` and `confidence` `read` answers with, e.g. ocr")
    classes: str = Field("classes", description="annotator whose `top` and `top_score` `classify` answers with")
    min_score: float = Field(
        0.5, ge=0, le=1, description="boxes that are less sure are not asked for, e.g. 0.95 for those of `faces`"
    )
    min_class: float = Field(0.5, ge=0, le=1, description="`top_score` that a class must have, e.g. 0.5")
    min_confidence: float = Field(
        0.9, ge=0, le=1, description="pictures with a line of text that is read with less are not asked for, e.g. 0.9"
    )
    max_objects: int = Field(3, ge=1, description="objects that one conversation of `locate` asks for, e.g. 3")
    max_count: int = Field(20, ge=1, description="larger numbers than this are not asked for, e.g. 20")


class Understanding(Task):
    """One conversation per row and task, with no output image."""

    name = "understanding"
    Config = UnderstandingConfig
    config: UnderstandingConfig
    words: ClassVar = {"describe": (), "locate": ("object",), "count": ("object",), "read": (), "classify": ()}

    @property
    def reads(self) -> Mapping[str, str]:
        config, out = self.config, dict[str, str]()
        kind = "grounding" if config.object_name is None else "faces"
        if {"locate", "count"} & set(config.tasks):
            columns = ["boxes", "scores"] + ["phrases"] * (config.object_name is None)
            out |= {f"{config.objects}.{c}": f"{config.objects}: {{kind: {kind}}}" for c in columns}
        if "read" in config.tasks:
            out |= {f"{config.ocr}.{c}": f"{config.ocr}: {{kind: ocr}}" for c in ("texts", "confidence")}
        if "classify" in config.tasks:
            out |= {f"{config.classes}.{c}": f"{config.classes}: {{kind: classes}}" for c in ("top", "top_score")}
        if "describe" in config.tasks and not config.text.startswith("rows."):
            out[config.text] = f"{config.text.partition('.')[0]}: {{kind: caption}}"
        return out

    def task_types(self) -> list[str]:
        return list(self.config.tasks)

    def build(self, row: Selected) -> Iterator[Sample | Skipped]:
        for kind in self.config.tasks:
            talk: Callable[..., Talk | str] = getattr(self, f"_{kind}")
            made = talk(row, row.generator(kind))
            if isinstance(made, str):
                yield Skipped(kind, made)
            else:
                messages, objects, parameters = made
                yield row.conversation(kind, messages, parameters, objects=objects)

    def _describe(self, row: Selected, rng: np.random.Generator) -> Talk | str:
        text = caption(row, self.config.text)
        if text is None:
            return "no_text"
        if holds_placeholder(text) or _marked(text):
            return "text_has_placeholders"
        return self._ask("describe", rng, text), None, {"text": self.config.text}

    def _locate(self, row: Selected, rng: np.random.Generator) -> Talk | str:
        found = self._objects(row)
        if not found:
            return self._none(row)
        names = list(found)
        drawn = [names[i] for i in sorted(rng.permutation(len(names))[: self.config.max_objects])]
        messages: list[dict[str, str]] = []
        refs, boxes = [], []
        for name in drawn:
            here = found[name]
            said = self.instructions.draw("locate", rng, object="<ref-object>")
            messages += [_user(said, not messages), _assistant(", ".join(["<bbox>"] * len(here)))]
            refs.append(name)
            boxes += [[round(float(v), 4) for v in box] for box in here]
        return messages, {"ref": refs, "bbox": boxes, "bbox_type": "norm1"}, {"objects": self.config.objects}

    def _count(self, row: Selected, rng: np.random.Generator) -> Talk | str:
        found = {name: boxes for name, boxes in self._objects(row).items() if len(boxes) <= self.config.max_count}
        if not found:
            return self._none(row)
        name = list(found)[int(rng.integers(len(found)))]
        return self._ask("count", rng, str(len(found[name])), object=name), None, {"objects": self.config.objects}

    def _read(self, row: Selected, rng: np.random.Generator) -> Talk | str:
        texts, sure = row.value(f"{self.config.ocr}.texts"), row.value(f"{self.config.ocr}.confidence")
        if texts is None:
            return "not_annotated"
        if texts and (min(sure) < self.config.min_confidence or all(len(t.strip()) < 2 for t in texts)):
            return "unsure_text"  # to leave a line out would teach not to read it
        if not texts or any(_marked(t) for t in texts):
            return "no_text_in_picture"
        return self._ask("read", rng, "\n".join(texts)), None, {"ocr": self.config.ocr}

    def _classify(self, row: Selected, rng: np.random.Generator) -> Talk | str:
        top, score = row.value(f"{self.config.classes}.top"), row.value(f"{self.config.classes}.top_score")
        if top is None:
            return "not_annotated"
        if score < self.config.min_class:
            return "unsure_class"
        return self._ask("classify", rng, str(top)), None, {"score": round(float(score), 4)}

    def _ask(self, key: str, rng: np.random.Generator, answer: str, **words: str) -> list[dict[str, str]]:
        return [_user(self.instructions.draw(key, rng, **words), True), _assistant(answer)]

    def _none(self, row: Selected) -> str:
        return "no_object" if row.value(f"{self.config.objects}.boxes") is not None else "not_annotated"

    def _objects(self, row: Selected) -> dict[str, list[Any]]:
        """The boxes that are sure enough, by what they hold, in the annotator's order."""
        column = self.config.objects
        boxes, scores = row.value(f"{column}.boxes") or [], row.value(f"{column}.scores") or []
        name = self.config.object_name
        names = [name] * len(boxes) if name is not None else row.value(f"{column}.phrases") or []
        found: dict[str, list[Any]] = {}
        for box, score, said in zip(boxes, scores, names, strict=True):
            if score >= self.config.min_score and said and not _marked(said):
                found.setdefault(said, []).append(box)
        return found


def _marked(text: str) -> bool:
    """Whether a text holds what a trainer would replace."""
    return any(mark in text for mark in ("<image>", "<bbox>", "<ref-object>", "<video>", "<audio>"))


def _user(text: str, first: bool) -> dict[str, str]:
    return {"role": "user", "content": f"<image>{text}" if first else text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
