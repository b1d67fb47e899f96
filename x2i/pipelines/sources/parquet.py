"""Parquet files with images in them: bytes, Hugging Face's struct {bytes, path}, or paths and URLs.

Columns of numbers, texts, dates and lists of texts go to `meta`; other images and vectors are left out.
Files that a row only names are not part of a unit's identity: change the table when they change.
"""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Collection, Iterator
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from x2i.base.errors import RecipeError
from x2i.pipelines.sources._cells import Columns, records
from x2i.pipelines.sources._filed import FiledSource
from x2i.pipelines.sources._files import File, Root
from x2i.pipelines.sources.base import Problem, Row, SourceConfig, Unit

ENDINGS = (".parquet",)

#: Rows decoded at a time: what bounds the memory, together with the size of a page.
BATCH = 32


class ParquetConfig(SourceConfig):
    """Parquet files, images inside or named."""

    kind: Literal["parquet"] = "parquet"
    path: str | list[str] = Field(
        description="the files: a path or fsspec URL, a pattern (data/train-*.parquet), a folder, or a list of these"
    )
    image_column: str | None = Field(
        None, description="the column of images, e.g. edited_image; default: the first that looks like it"
    )
    text_column: str | None = Field(
        None, description="the column of texts, e.g. re_caption; default: the first of caption, text, prompt"
    )
    root: str | None = Field(
        None,
        description="where relative paths in the image column start, e.g. s3://bucket/images; default: the file's folder",
    )
    unit_rows: int = Field(1000, ge=1, description="a unit is a run of row groups with about so many rows")


class Parquet(FiledSource):
    """Rows of Parquet files in order. A unit is some row groups of one file."""

    kind = "parquet"
    Config = ParquetConfig
    config: ParquetConfig
    endings = ENDINGS
    files = "Parquet files"

    def plan(self) -> Iterator[Unit]:
        """See `Source.plan`. A unit's `file` is [path, size, version], `groups` [from, to), `first` a row number."""
        found = self._find()
        fault: RecipeError | None = None
        sound = False
        for file in found.files:
            spec = {"file": list(file)}
            try:
                runs = self._runs(file)
            except _Unusable as error:
                yield Unit(self.name, spec | {"problem": str(error)}, rows=1)
            except RecipeError as error:
                fault = fault or error
                yield Unit(self.name, spec | {"problem": str(error)}, rows=1)
            else:
                sound = True
                for first, groups, rows in runs:
                    yield Unit(self.name, spec | {"groups": groups, "first": first}, rows=rows)
        if fault and not sound:
            raise fault  # no file has the columns: that is the recipe's mistake, not the files'

    def _runs(self, file: File) -> list[tuple[int, list[int], int]]:
        """(first row, row groups [from, to), rows) of each unit. Raises _Unusable, RecipeError."""
        with self._open(file.path) as table:
            self._columns(table, file.path)
            sizes = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
        runs: list[tuple[int, list[int], int]] = []
        start, first, rows = 0, 0, 0
        for i, size in enumerate(sizes):
            if rows and rows + size > self.config.unit_rows:
                runs.append((first, [start, i], rows))
                start, first, rows = i, first + rows, 0
            rows += size
        return [*runs, (first, [start, len(sizes)], rows)] if rows else runs

    def _columns(self, table: pq.ParquetFile, where: str) -> Columns:
        return Columns.of(table.schema_arrow, self.config.image_column, self.config.text_column, where)

    @contextlib.contextmanager
    def _open(self, path: str) -> Iterator[pq.ParquetFile]:
        """The file, read in small pieces. Raises _Unusable: it cannot be read, or is no Parquet file."""
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(self._root.open_parts(path))
                table = pq.ParquetFile(
                    file, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True, memory_map=False
                )
            except (pa.ArrowException, OSError, ValueError) as error:
                raise _Unusable(str(error)) from None
            yield table

    def read(self, unit: Unit, only: Collection[int] | None = None) -> Iterator[Row]:
        """See `Source.read`. Where a row group is broken, each of its rows from there on is a problem."""
        spec = unit.spec
        path = spec["file"][0]
        if "problem" in spec:
            if only is None or 0 in only:
                yield Row(0, path, None, problem=Problem("bad_parquet", spec["problem"]))
            return
        index = 0
        with contextlib.ExitStack() as stack:
            try:
                table = stack.enter_context(self._open(path))
                columns = self._columns(table, path)
            except (_Unusable, RecipeError) as error:  # it was fine when the plan was made
                problem = Problem("bad_parquet", str(error))
                yield from (_lost(spec, i, problem) for i in range(unit.rows or 1) if only is None or i in only)
                return
            for group in range(*spec["groups"]):
                size = table.metadata.row_group(group).num_rows
                wanted = [i for i in range(index, index + size) if only is None or i in only]
                if wanted:
                    yield from self._group(table, group, columns, spec, index, set(wanted))
                index += size

    def _group(
        self, table: pq.ParquetFile, group: int, columns: Columns, spec: dict[str, Any], index: int, wanted: set[int]
    ) -> Iterator[Row]:
        """The wanted rows of one row group, whose first has this index in the unit."""
        images = self._images(spec["file"][0])
        end = index + table.metadata.row_group(group).num_rows
        try:
            for batch in table.iter_batches(BATCH, row_groups=[group], columns=columns.needed, use_threads=False):
                chosen = [i for i in range(batch.num_rows) if index + i in wanted]
                found = records(batch, chosen)
                for i, row in zip(chosen, columns.rows(found, images), strict=True):
                    row.index, row.location = index + i, _location(spec, index + i)
                    yield row
                index += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            problem = Problem("bad_parquet", f"row group {group} is broken: {error}")
            yield from (_lost(spec, i, problem) for i in range(index, end) if i in wanted)

    def _images(self, path: str) -> Root:
        """Where the relative paths in a file's image column start."""
        return Root(self.config.root) if self.config.root else self._root.below(posixpath.dirname(path))


class _Unusable(Exception):
    """A file cannot be read as Parquet."""


def _location(spec: dict[str, Any], index: int) -> str:
    return f"{spec['file'][0]}#{spec['first'] + index}"


def _lost(spec: dict[str, Any], index: int, problem: Problem) -> Row:
    return Row(index, _location(spec, index), None, problem=problem)
