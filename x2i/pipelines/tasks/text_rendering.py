"""`text_rendering`: the instruction quotes the text that is to be seen in the picture, as the annotator `ocr` read it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from x2i.corpus.sample import Sample
from x2i.pipelines.tasks._captions import quoted, sentence
from x2i.pipelines.tasks.base import Selected, Skipped, Task, TaskConfig, caption, holds_placeholder

#: What a photographer or an agency leaves on a picture: nothing that a model should learn to draw.
_MARK = re.compile(r"©|\(c\)|copyright|www\.|https?:|\.(com|net|org)\b|@\w+\.\w", re.IGNORECASE)


class TextRenderingConfig(TaskConfig):
    """Which lines are quoted, and which pictures are left out."""

    ocr: str = Field("ocr", description="annotator whose `texts`, `boxes` and `confidence` are read, e.g. ocr")
    text: str = Field("rows.text", description="column of the caption, e.g. caption.short")
    min_confidence: float = Field(0.9, ge=0, le=1, description="lines that are less sure are not quoted, e.g. 0.9")
    min_area: float = Field(
        0.002, ge=0, lt=1, description="nor lines whose box has a smaller share of the picture, e.g. 0.002"
    )
    min_letters: int = Field(
        2, gt=0, description="nor lines with fewer letters and digits, which are often none, e.g. 2"
    )
    max_unread: float = Field(
        0.25, ge=0, le=1, description="most of the text's area that lines may have which are not quoted, e.g. 0.25"
    )
    max_lines: int = Field(6, gt=0, description="pictures with more lines to quote make no sample, e.g. 6")
    max_words: int = Field(16, gt=0, description="nor those with more words, e.g. 16")
    max_chars: int = Field(120, gt=0, description="nor those with more characters, e.g. 120")
    marks: bool = Field(
        False, description="whether pictures with a copyright sign or a web address make samples, too, e.g. true"
    )
    languages: list[str] | None = Field(
        None,
        description="ISO 639-1 codes, e.g. [en]: text of another language makes no sample; null: any. Text too short "
        "to tell its language stays",
    )


@dataclass(frozen=True)
class _Line:
    text: str
    confidence: float
    box: Sequence[float]  # shares

    @property
    def area(self) -> float:
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


class TextRendering(Task):
    """The caption and the lines in reading order, or the lines alone where there is no caption."""

    name = "text_rendering"
    Config = TextRenderingConfig
    config: TextRenderingConfig
    words: ClassVar = {"text_rendering": ("text", "quoted"), "text_rendering.bare": ("quoted",)}

    def task_types(self) -> list[str]:
        return [self.name]

    @property
    def reads(self) -> Mapping[str, str]:
        name = self.config.ocr
        out = {f"{name}.{c}": f"{name}: {{kind: ocr}}" for c in ("texts", "boxes", "confidence", "language")}
        captions = self.config.text.partition(".")[0]
        return out if captions == "rows" else out | {self.config.text: f"{captions}: {{kind: caption}}"}

    def build(self, row: Selected) -> Iterator[Sample | Skipped]:
        text = caption(row, self.config.text)
        chosen = self._lines(row)
        if isinstance(chosen, str):
            yield Skipped(self.name, chosen)
            return
        if holds_placeholder(text) or any(holds_placeholder(line.text) for line in chosen):
            yield Skipped(self.name, "text_has_placeholders")
            return
        key = self.name if text else f"{self.name}.bare"
        said = ", ".join(quoted(line.text) for line in chosen)
        instruction = self.instructions.draw(key, row.generator(self.name), text=sentence(text or ""), quoted=said)
        width, height = row.picture.width, row.picture.height
        lines = [
            {
                "text": line.text,
                "confidence": round(float(line.confidence), 4),
                "box": [round(s * n) for s, n in zip(line.box, (width, height) * 2, strict=True)],
            }
            for line in chosen
        ]
        parameters: dict[str, Any] = {"lines": lines, "language": row.value(f"{self.config.ocr}.language")}
        yield row.sample(self.name, instruction, parameters=parameters)

    def _lines(self, row: Selected) -> list[_Line] | str:
        """The lines to quote, or why the picture makes no sample."""
        config = self.config
        texts, confidence, boxes = (row.value(f"{config.ocr}.{c}") for c in ("texts", "confidence", "boxes"))
        if texts is None:
            return "not_annotated"
        lines = [_Line(*values) for values in zip(texts, confidence, boxes, strict=True)]
        if not config.marks and any(_MARK.search(line.text) for line in lines):
            return "watermark"
        chosen = [line for line in lines if self._sure(line)]
        if not chosen:
            return "no_text_in_picture" if not lines else "text_unsure"
        language = row.value(f"{config.ocr}.language")
        if config.languages is not None and language is not None and language not in config.languages:
            return "other_language"
        whole = sum(line.area for line in lines)
        if whole - sum(line.area for line in chosen) > config.max_unread * whole:
            return "text_unsure"
        words = sum(len(line.text.split()) for line in chosen)
        chars = sum(len(line.text) for line in chosen)
        if len(chosen) > config.max_lines or words > config.max_words or chars > config.max_chars:
            return "too_much_text"
        return chosen

    def _sure(self, line: _Line) -> bool:
        sure = line.confidence >= self.config.min_confidence and line.area >= self.config.min_area
        return sure and sum(c.isalnum() for c in line.text) >= self.config.min_letters
