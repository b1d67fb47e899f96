"""The columns of other annotators that a batch brings."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from x2i.base.errors import X2IError
from x2i.pipelines.annotators.base import Batch, Item


def column(batch: Sequence[Item], name: str, annotator: str) -> pa.ChunkedArray:
    """A column by name, e.g. `clip.embedding`, a value per row; `rows.text` is the caption.

    Raises:
        X2IError: the batch does not bring it.
    """
    if isinstance(batch, Batch) and name in batch.columns.column_names:
        return batch.columns[name]
    if name == "rows.text":
        return pa.chunked_array([pa.array([i.text for i in batch], pa.string())])
    raise X2IError(
        f"annotator {annotator}: the batch lacks the column {name}; is it the column of an annotator that the recipe has?"
    )


def texts(batch: Sequence[Item], name: str, annotator: str) -> list[str | None]:
    """A column of texts; None where there is none."""
    return [None if v is None else str(v) for v in column(batch, name, annotator).to_pylist()]
