"""Rows of published pairs, (instruction, pictures, output): what their importers share, and those that come as Parquet.

The instruction gets the placeholders of its input images, as OmniGen's own records of edits have them. Where a record
holds several wordings one is drawn by the record's content; all of them stay in `meta`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow.parquet as pq
from pydantic import Field

from x2i.base.errors import RecipeError
from x2i.base.seeds import generator
from x2i.corpus.sample import PLACEHOLDER, placeholder
from x2i.pipelines.sources._cells import Columns, Record, fetch
from x2i.pipelines.sources._files import Root
from x2i.pipelines.sources._text import Malformed, jsonable
from x2i.pipelines.sources.base import Problem, Row, SourceConfig, Unit
from x2i.pipelines.sources.parquet import Parquet

#: The task type of an edit where the dataset has none of its own.
EDIT = "image_edit"

#: Reads a picture by the path that a record gives.
Get = Callable[[str], bytes | Problem]


def edit(text: Any) -> str:
    """The instruction of an edit of one picture. Raises Malformed: there is no text, or it speaks of more pictures.

    An instruction that places its picture itself is left as it is.
    """
    text = worded([text])
    if numbers := set(PLACEHOLDER.findall(text)) - {"1"}:
        raise Malformed("bad_instruction", f"1 input image, but the placeholders' numbers are {sorted(numbers)}")
    return text if PLACEHOLDER.search(text) else f"{placeholder(1)} {text}"


def worded(texts: Any, *content: Any) -> str:
    """One of the wordings that are not empty, drawn by `content` (JSON types). Raises Malformed: there is none."""
    given = texts if isinstance(texts, list | tuple) else [texts]
    usable = [t.strip() for t in jsonable(given) if isinstance(t, str) and t.strip()]
    if not usable:
        raise Malformed("bad_instruction", "no instruction")
    if len(usable) == 1:
        return str(usable[0])
    return str(usable[int(generator("wording/1", *jsonable(content)).integers(len(usable)))])


def instructed(row: Row, task_type: Any, instruction: str) -> None:
    """Make a row an X2I sample by its text and task type; a dataset's null is an edit, a record's own stays."""
    row.text = row.meta["instruction"] = instruction
    if isinstance(task_type, str) and task_type.strip():
        row.meta["task_type"] = task_type
    else:
        row.meta.setdefault("task_type", EDIT)


def unusable(data: bytes, what: str) -> Problem | None:
    """The problem of a picture that cannot even be opened. (The output is looked at with every row's image.)"""
    from x2i.pipelines.images import BadImage, read_header

    try:
        read_header(data)
    except BadImage as bad:
        return Problem(bad.reason, f"{what}: {bad.detail}")
    return None


@dataclass
class Draft:
    """A row whose pictures are still to be read: paths where the row will have bytes.

    `mask` may be a path at which there is nothing: then there is no mask.
    """

    location: str
    task_type: Any = EDIT
    text: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    output: str | None = None
    mask: str | None = None
    problem: Problem | None = None

    def paths(self) -> list[str]:
        """All that are to be read."""
        return [*self.inputs, *(p for p in (self.output, self.mask) if p)]

    def row(self, index: int, get: Get) -> Row:
        """The row, its pictures read. What is wrong with a picture is told before what is wrong with the text."""
        row = Row(index, self.location, None, meta=jsonable(self.meta))
        if self.text is not None:
            instructed(row, self.task_type, self.text)
        problems: list[Problem] = []
        if self.output is None:
            problems += [] if self.problem else [Problem("no_output_image", "no picture is named as the output")]
        elif isinstance(data := get(self.output), bytes):
            row.data = data
        else:
            problems.append(_of(self.output, data))
        for path in self.inputs:
            if not isinstance(data := get(path), bytes):
                problems.append(_of(path, data))
            elif bad := unusable(data, path):
                problems.append(bad)
            else:
                row.inputs.append((path, data))
        if self.mask:
            if isinstance(data := get(self.mask), bytes):
                row.mask = data
                problems += [bad] if (bad := unusable(data, self.mask)) else []
            elif data.reason != "missing_image":
                problems.append(_of(self.mask, data))
        row.problem = next(iter(problems), self.problem)
        return row


def _of(path: str, problem: Problem) -> Problem:
    return problem if path in problem.detail else Problem(problem.reason, f"{path}: {problem.detail}")


class TableConfig(SourceConfig):
    """What the configuration of pairs in Parquet files has."""

    path: str | list[str] = Field(
        description="the Parquet files: a path or fsspec URL, a pattern (data/train-*.parquet), a folder, or a list of these"
    )
    root: str | None = Field(
        None, description="where relative paths in image columns start, if it is not the file's folder"
    )
    unit_rows: int = Field(500, ge=1, description="a unit is a run of row groups with about so many rows")


class PairTable(Parquet):
    """Rows of Parquet files in which every row is a pair. Columns that hold no picture go to `meta`."""

    source: ClassVar[str]
    output: ClassVar[str]
    masks: ClassVar[str | None] = None
    Config: ClassVar[type[SourceConfig]] = TableConfig  # type: ignore[assignment]
    config: TableConfig  # type: ignore[assignment]

    @abc.abstractmethod
    def describe(self, record: Record) -> tuple[Any, str]:
        """A record's task type and instruction. Raises Malformed."""

    def about(self, record: Record) -> dict[str, Any]:
        """What `meta` shall say besides the columns."""
        return {}

    def mask(self, data: bytes, source: bytes | None) -> bytes:
        """The published mask as a picture that is white where the edit changed something. Raises Malformed."""
        return data

    def _columns(self, table: pq.ParquetFile, where: str) -> Columns:
        names = table.schema_arrow.names
        for name in (self.source, self.output):
            if name not in names:
                raise RecipeError(
                    f"{where}: not the layout of {self.kind}: no column '{name}'; there are: {', '.join(names)}"
                )
        images = (self.source, self.output, self.masks)
        return _PairColumns(self.output, None, tuple(n for n in names if n not in images), self, tuple(names))

    def read(self, unit: Unit, only: Collection[int] | None = None) -> Iterator[Row]:
        """See `Source.read`."""
        for row in super().read(unit, only):
            row.inputs = [(f"{row.location}:{column}", data) for column, data in row.inputs]
            yield row


@dataclass(frozen=True)
class _PairColumns(Columns):
    """The columns of a table of pairs, and the rows that they make."""

    table: PairTable
    names: tuple[str, ...]

    @property
    def needed(self) -> list[str]:
        """All: none of these tables has a column that nobody wants."""
        return list(self.names)

    def rows(self, found: Sequence[Record | Problem], root: Root) -> Iterator[Row]:
        """A row for each record, in order, with index and location still to be set."""
        sound = [r for r in found if not isinstance(r, Problem)]
        columns = (self.table.output, self.table.source, self.table.masks)
        pictures = zip(*(fetch([r.get(c or "") for r in sound], root) for c in columns), strict=True)
        for record in found:
            row = Row(0, "", None)
            if isinstance(record, Problem):
                row.problem = record
            else:
                self._pair(row, record, *next(pictures))
            yield row

    def _pair(
        self, row: Row, record: Record, output: bytes | Problem, source: bytes | Problem, mask: bytes | Problem
    ) -> None:
        table = self.table
        row.meta = jsonable({k: record[k] for k in self.meta} | table.about(record))
        problems: list[Problem] = []
        try:
            instructed(row, *table.describe(record))
        except Malformed as error:
            problems.append(error.problem)
        if isinstance(source, Problem):
            problems.insert(0, _of(table.source, source))
        elif bad := unusable(source, table.source):
            problems.insert(0, bad)
        else:
            row.inputs = [(table.source, source)]
        if isinstance(output, Problem):
            problems.insert(0, _of(table.output, output))
        else:
            row.data = output
        problems += self._mask(row, record, mask)
        row.problem = next(iter(problems), None)

    def _mask(self, row: Row, record: Record, mask: bytes | Problem) -> list[Problem]:
        cell = record.get(self.table.masks) if self.table.masks else None
        if cell is None or (isinstance(cell, dict) and not any(cell.values())):
            return []
        if isinstance(mask, Problem):
            return [_of(str(self.table.masks), mask)]
        if bad := unusable(mask, str(self.table.masks)):
            return [bad]
        try:
            row.mask = self.table.mask(mask, row.inputs[0][1] if row.inputs else None)
        except Malformed as error:
            return [error.problem]
        return []
