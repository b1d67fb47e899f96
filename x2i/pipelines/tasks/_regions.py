"""The regions of a row: the boxes that its annotators found or its source brought."""

from __future__ import annotations

from typing import Any

from x2i.pipelines.regions import Region, numbered, read
from x2i.pipelines.tasks.base import Selected


def told(row: Selected, column: str) -> Any:
    """A value by its column's name; `rows.meta.KEY` is what the source says of the row."""
    kept = column.removeprefix("rows.meta.")
    return row.meta.get(kept) if kept != column else row.value(column)


def regions(
    row: Selected, boxes: str, name: str | None = None, masks: str | None = None, text: str | None = None
) -> list[Region] | None:
    """The boxes of a row; None where its annotators did not see it.

    Args:
        boxes: a column of what `regions.read` takes. The `scores` and `phrases` beside boxes are theirs.
        name: what all boxes hold; None: their phrases.
        masks: annotator (`masks`) of these boxes' masks; boxes of which it has none go without.
        text: the text that GRIT's spans are of.
    """
    given = told(row, boxes)
    if given is None:
        return None
    beside = boxes.rpartition(".")[0]
    of_source = boxes.startswith("rows.")
    scores, phrases = (None, None) if of_source else (row.value(f"{beside}.{c}") for c in ("scores", "phrases"))
    codes = {}
    if masks is not None:
        columns = [row.value(f"{masks}.{c}") for c in ("masks", "box_index", "predicted_iou")]
        if columns[0] is None or columns[1] is None:
            return None
        codes = numbered(*columns)
    size = (row.picture.width, row.picture.height)
    return read(
        size, given if isinstance(given, list) else [], phrases if name is None else name, codes, scores, text or ""
    )
