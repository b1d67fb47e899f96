"""Cells of tables: image columns as they come in Parquet files and Hugging Face datasets, and all the others.

An image cell is a struct {bytes, path} (Hugging Face's `Image`), the bytes themselves, or a string: a URL,
an absolute path, or a path relative to a root.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from x2i.base.errors import RecipeError
from x2i.pipelines.sources._files import Root, why
from x2i.pipelines.sources._text import TEXT_KEYS, Malformed, jsonable, pick
from x2i.pipelines.sources.base import Problem, Row

#: Names of image columns, where the types do not tell.
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "picture", "photo")
PATH_COLUMNS = ("image_path", "path", "file_path", "filepath", "file_name", "filename", "file", "image_url", "url")


#: A row of a table as Python values.
Record = dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """Which columns are what. `meta` holds numbers, texts, dates, truth values and lists of texts; no vectors."""

    image: str
    text: str | None
    meta: tuple[str, ...]

    @classmethod
    def of(cls, schema: pa.Schema, image: str | None, text: str | None, where: str) -> Columns:
        """Choose among the columns of a schema; `image` and `text` are the recipe's wishes.

        Raises:
            RecipeError: a column that is wished for is not there, or none looks like images; `where`
                opens the message, which lists the columns.
        """
        there = ", ".join(schema.names) or "none"
        for key, wish in (("image_column", image), ("text_column", text)):
            if wish is not None and wish not in schema.names:
                raise RecipeError(f"{where}: {key}: no column '{wish}'; there are: {there}")
        image = image or _image_column(schema)
        if image is None:
            raise RecipeError(f"{where}: no column looks like images; name it by `image_column`, one of: {there}")
        text = text or next((k for k in TEXT_KEYS if k in schema.names and k != image), None)
        whole = text is not None and _is_string(schema.field(text).type)
        meta = [f.name for f in schema if f.name != image and _is_scalar(f.type) and not (whole and f.name == text)]
        return cls(image, text, tuple(meta))

    @property
    def needed(self) -> list[str]:
        """All of them, for a reader that can leave the others out."""
        return list(dict.fromkeys([self.image, *([self.text] if self.text else []), *self.meta]))

    def rows(self, found: Sequence[Record | Problem], root: Root) -> Iterator[Row]:
        """A row for each record, in order, with index and location still to be set."""
        images = fetch([r[self.image] for r in found if not isinstance(r, Problem)], root)
        for record in found:
            row = Row(0, "", None)
            if isinstance(record, Problem):
                row.problem = record
            else:
                self._fill(row, record, next(images))
            yield row

    def _fill(self, row: Row, record: Record, data: bytes | Problem) -> None:
        row.meta = jsonable({k: record[k] for k in self.meta})
        try:
            row.text = pick({self.text: jsonable(record[self.text])}, self.text) if self.text else None
        except Malformed as error:
            row.problem = error.problem
        if isinstance(data, Problem):
            row.problem = data
        else:
            row.data = data


def records(batch: pa.RecordBatch, chosen: list[int]) -> list[Record | Problem]:
    """The chosen rows of a batch (or table), without copying more than these; a problem for one with a bad value."""
    if len(chosen) < batch.num_rows:
        batch = batch.take(pa.array(chosen, pa.int64()))
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date that Python has not
        if batch.num_rows > 1:
            return [r for i in range(batch.num_rows) for r in records(batch.slice(i, 1), [0])]
        reason = "bad_text" if isinstance(error, UnicodeDecodeError) else "bad_metadata"
        return [Problem(reason, f"a value cannot be read: {error}")]


def _image_column(schema: pa.Schema) -> str | None:
    structs = [f.name for f in schema if _is_image_struct(f.type)]
    binary = [n for n in IMAGE_COLUMNS if n in schema.names and _is_binary(schema.field(n).type)]
    named = [n for n in (*IMAGE_COLUMNS, *PATH_COLUMNS) if n in schema.names and _is_string(schema.field(n).type)]
    return next(iter([*structs, *binary, *named]), None)


def fetch(cells: Sequence[Any], root: Root) -> Iterator[bytes | Problem]:
    """The bytes of each image cell in order, read from `root` where a cell only names a file."""
    paths = [_path(cell) for cell in cells]
    named = root.read_many(p for p in paths if p is not None)
    for cell, path in zip(cells, paths, strict=True):
        if path is not None:
            yield checked(next(named))
        else:
            yield checked(cell.get("bytes") if isinstance(cell, dict) else cell)


def _path(cell: Any) -> str | None:
    """The path that a cell names, None if it holds the bytes, or nothing."""
    if isinstance(cell, dict):
        cell = cell.get("path") if cell.get("bytes") is None else None
    return cell if isinstance(cell, str) and cell else None


def checked(data: Any) -> bytes | Problem:
    """What was read as an image, or the problem that its error or its absence is."""
    if isinstance(data, FileNotFoundError):
        return Problem("missing_image", "the file that the row names is not there")
    if isinstance(data, OSError):
        return Problem("unreadable", why(data))
    if data is None:
        return Problem("missing_image", "the image is null")
    if not isinstance(data, bytes):
        return Problem("missing_image", f"{type(data).__name__} in the image column")
    return data or Problem("empty_file", "the image has no bytes")


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_image_struct(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind) and {"bytes", "path"} == {kind.field(i).name for i in range(kind.num_fields)})


def _is_scalar(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_string(kind.value_type)
    return not _is_binary(kind) and not pa.types.is_nested(kind)
