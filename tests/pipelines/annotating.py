"""Helpers for tests of annotators: real photographs as a batch, and a call whose table is checked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pyarrow as pa

from x2i.pipelines.annotators.base import Annotator, Batch, Item
from x2i.pipelines.images import decode, encode, read_header
from x2i.pipelines.quickstart import photographs


@cache
def _files() -> dict[str, bytes]:
    return photographs()


def photo(name: str) -> bytes:
    """The file of a packaged photograph by the start of its name, e.g. "astronaut", "chelsea", "coffee"."""
    return next(data for file, data in sorted(_files().items()) if file.startswith(name) and not file.endswith(".txt"))


def item(data: bytes, text: str | None = None, image_id: str = "0" * 64) -> Item:
    """An item as the engine makes it from a file's bytes."""
    header = read_header(data)
    return Item(image_id, text, data, header, decode(data, header))


def drawn(pixels: Any) -> bytes:
    """A PNG of uint8 [height, width, 3] RGB pixels."""
    return encode(pixels, "png")


def batch(files: Sequence[bytes], texts: Sequence[str | None] = (), columns: dict[str, Any] | None = None) -> Batch:
    """A batch of image files, their texts, and the columns of other annotators (`{"clip.embedding": array}`)."""
    said = list(texts) or [None] * len(files)
    items = [item(f, t, f"{i:064x}") for i, (f, t) in enumerate(zip(files, said, strict=True))]
    return Batch(items, pa.table(columns or {}))


def rows(texts: Sequence[str | None], columns: dict[str, Any] | None = None) -> Batch:
    """A batch without images, for annotators that need only columns."""
    return Batch([Item(f"{i:064x}", t) for i, t in enumerate(texts)], pa.table(columns or {}))


def run(annotator: Annotator, given: Batch) -> pa.Table:
    """Set up, call, and check that the table is what the annotator promised."""
    annotator.setup()
    table = annotator(given)
    assert table.num_rows == len(given)
    assert table.cast(annotator.columns).schema.equals(annotator.columns)
    assert annotator.heavy <= set(annotator.columns.names)
    return table
