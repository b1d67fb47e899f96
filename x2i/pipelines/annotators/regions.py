"""`regions`: boxes with phrases that a source brings itself, in the form in which `grounding` gives its own.

GRIT (Peng et al. 2023, "Kosmos-2", https://arxiv.org/abs/2306.14824) publishes `noun_chunks` and `ref_exps`, lists of
[start, end, x1, y1, x2, y2, score]: characters of its caption, and a box in shares of width and height. With them `masks`,
`repaint`, `segmentation` and `subject` need no detector.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from pydantic import Field

from x2i.pipelines.annotators._boxes import BOXES
from x2i.pipelines.annotators.base import Annotator, AnnotatorConfig, Item
from x2i.pipelines.boxes import area, place

_SPAN = pa.struct({"text": pa.string(), "start": pa.int32(), "end": pa.int32()})


class RegionsConfig(AnnotatorConfig):
    """Where in the source's metadata they are."""

    key: str = Field("noun_chunks", description="metadata with the list of boxes, e.g. ref_exps")
    caption: str = Field("caption", description="metadata with the text that their characters are of, e.g. caption")
    min_score: float = Field(0.0, ge=0, le=1, description="boxes that are less sure are left out, e.g. 0.65")


class Regions(Annotator):
    """A list per row, the surest box first; rows without such metadata have empty lists. No image is read.

    The columns are those of `grounding`; besides, `spans` are the phrases' places in the caption, which `phrase_index`
    counts. Entries that are no [start, end, x1, y1, x2, y2, score], or that lie outside the caption or hold nothing, are
    left out.
    """

    name = "regions"
    needs = "row"
    Config = RegionsConfig
    columns = pa.schema(
        {
            "boxes": BOXES,
            "phrases": pa.list_(pa.string()),
            "scores": pa.list_(pa.float32()),
            "phrase_index": pa.list_(pa.int32()),
            "spans": pa.list_(_SPAN),
        }
    )

    @property
    def reads(self) -> tuple[str, ...]:
        return ("rows.meta",)

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        return pa.Table.from_pylist([self._row(json.loads(item.meta)) for item in batch], schema=self.columns)

    def _row(self, meta: dict[str, Any]) -> dict[str, Any]:
        caption, entries = meta.get(self.config.caption), meta.get(self.config.key)
        text = caption if isinstance(caption, str) else ""
        found = []
        for entry in entries if isinstance(entries, list) else []:
            there = place(entry)
            if there is None or there[2] is None:
                continue
            box, score, (start, end) = there[0], there[1], there[2]
            if 0 <= start < end <= len(text) and area(box) > 0 and score >= self.config.min_score:
                found.append((score, box, (start, end)))
        found.sort(key=lambda f: -f[0])  # of equals the source's first
        spans = sorted({span for _, _, span in found})
        return {
            "boxes": [box for _, box, _ in found],
            "phrases": [text[start:end].strip() for _, _, (start, end) in found],
            "scores": [score for score, _, _ in found],
            "phrase_index": [spans.index(span) for _, _, span in found],
            "spans": [{"text": text[start:end], "start": start, "end": end} for start, end in spans],
        }
