"""What importers of published datasets share: records in JSONL files or JSON lists, tables with nested columns.

A source of records has rows whose images lie in files beside the records. A unit is a run of whole
records of one file, found again by their bytes, so that reading a unit reads nothing else of the file.
"""

from __future__ import annotations

import abc
import codecs
import hashlib
import io
import json
import posixpath
import re
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from typing import IO, Any, ClassVar, NamedTuple

import pyarrow.parquet as pq

from x2i.pipelines.sources._cells import Columns, fetch
from x2i.pipelines.sources._filed import FiledSource
from x2i.pipelines.sources._files import File, Root, why
from x2i.pipelines.sources._text import Malformed, parse_object
from x2i.pipelines.sources.base import Problem, Row, Unit
from x2i.pipelines.sources.parquet import Parquet

#: Bytes read at a time, and the longest element of a JSON list: a longer one is a broken list.
CHUNK, LONGEST = 4 * 2**20, 64 * 2**20

#: What may stand before an element of a list: the file's byte order mark (as Latin-1), blanks, a comma.
_BETWEEN = re.compile("(?:\xef\xbb\xbf)?[\\s,]*", re.ASCII)


#: Endings of files of JSON lines.
LINES = (".jsonl", ".jsonl.txt", ".ndjson")


class Piece(NamedTuple):
    """One record's bytes [`start`, `start + len(data)`) in its file; `number` is its line (from 1) or index (from 0)."""

    number: int
    start: int
    data: bytes


def elements(file: IO[bytes], number: int = 0, inside: bool = False) -> Iterator[Piece]:
    """The elements of a JSON list, one by one, in bounded memory.

    Args:
        number: that of the first.
        inside: the file is an excerpt: it begins within the list, and need not end with it.

    Raises:
        Malformed: it is no list, or broken from here on.
    """
    decoder = json.JSONDecoder(strict=False)
    # in Latin-1 every byte is a character: places in the text are places in the file, and JSON's own signs are ASCII
    text, base, at, ended, excerpt = "", 0, 0, False, inside
    while True:
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
        failure = "it ends within the list"
        if at < len(text):
            if not inside:
                if text[at] != "[":
                    raise Malformed("bad_metadata", "no JSON list")
                inside, at = True, at + 1
                continue
            if text[at] == "]":
                return
            try:
                _, end = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:  # also a number of thousands of digits
                failure = str(error)
            else:
                yield Piece(number, base + at, text[at:end].encode("latin-1"))
                number, at = number + 1, end
                continue
        if ended or len(text) - at > LONGEST:
            if excerpt and at == len(text):
                return
            raise Malformed("bad_metadata", f"the JSON list is broken after {number} elements: {failure}")
        more = file.read(CHUNK)
        ended = not more
        text, base, at = text[at:] + more.decode("latin-1"), base + at, 0


def lines(file: IO[bytes], number: int = 1) -> Iterator[Piece]:
    """The lines that are not empty, of which the first has this number."""
    start = 0
    for line in file:
        if line.strip():
            yield Piece(number, start, line)
        start, number = start + len(line), number + 1


class Records(FiledSource):
    """A source whose units are runs of JSON records; its configuration has `unit_rows`, the records in one.

    A unit's `file` is a path, its bytes are [`start`, `end`), `number` is that of its first record, `list` says whether
    it lies in a JSON list, `sha256` is the digest of its records: a file that has grown has its last unit read again,
    and the new ones. A unit with a `problem` is one row.
    """

    def count(self, data: bytes) -> int:
        """How many rows a record gives."""
        return 1

    def plan(self) -> Iterator[Unit]:
        """See `Source.plan`."""
        for file in self._find().files:
            try:
                yield from self._units(file)
            except OSError as error:
                yield self._fault(file, Problem("unreadable", why(error)))

    def _units(self, file: File) -> Iterator[Unit]:
        with self._root.open(file.path) as opened:
            listed = (
                file.path.lower().endswith(".json")
                and opened.read(2**16).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
            )
            opened.seek(0)
            pieces = elements(opened) if listed else lines(opened)
            empty = True
            while True:
                run: list[Piece] = []
                broken: Malformed | None = None
                try:
                    for piece in islice(pieces, self.config.unit_rows):
                        run.append(piece)
                except Malformed as error:
                    broken = error
                if run:
                    empty = False
                    spec = {"file": file.path, "start": run[0].start, "end": run[-1].start + len(run[-1].data)}
                    spec |= {"number": run[0].number, "list": listed}
                    spec["sha256"] = hashlib.sha256(b"\n".join(p.data for p in run)).hexdigest()
                    yield Unit(self.name, spec, rows=sum(self.count(p.data) for p in run))
                if broken:
                    yield self._fault(file, broken.problem)
                if broken or not run:
                    break
            if empty and not broken:
                yield self._fault(file, Problem("empty_file", "no record in it"))

    def _fault(self, file: File, problem: Problem) -> Unit:
        spec = {"file": file.path, "version": list(file[1:]), "problem": [problem.reason, problem.detail]}
        return Unit(self.name, spec, rows=1)

    def pieces(self, unit: Unit) -> list[Piece]:
        """A unit's records, their numbers those in the file. Raises Malformed: they cannot be had."""
        spec = unit.spec
        if "problem" in spec:
            raise Malformed(*spec["problem"])
        try:
            data = self._root.read_range(spec["file"], spec["start"], spec["end"])
        except OSError as error:
            raise Malformed("unreadable", why(error)) from None
        if len(data) != spec["end"] - spec["start"]:
            raise Malformed("unreadable", "the file has become shorter")
        excerpt = io.BytesIO(data)
        if not spec["list"]:
            return list(lines(excerpt, spec["number"]))
        try:
            return list(elements(excerpt, spec["number"], True))
        except Malformed as error:
            raise Malformed("unreadable", str(error)) from None

    def lost(self, unit: Unit, index: int) -> str:
        """The location of a row of a unit whose records cannot be had."""
        spec = unit.spec
        return f"{spec['file']}#" + ("(file)" if "problem" in spec else f"{spec['number']}+{index}")


class RecordSource(Records):
    """Rows out of JSON records. A subclass says what a record's rows are."""

    endings: ClassVar[tuple[str, ...]] = (".json", ".jsonl")
    files = "JSON files"

    @abc.abstractmethod
    def fill(self, row: Row, record: dict[str, Any], part: int, file: str) -> Problem | None:
        """Fill in the `part`-th row of a record of this file; the problem, if there is one. Raises Malformed."""

    def read(self, unit: Unit, only: Collection[int] | None = None) -> Iterator[Row]:
        """See `Source.read`."""
        try:
            pieces = self.pieces(unit)
        except Malformed as error:
            for index in range(unit.rows or 1):
                if only is None or index in only:
                    yield Row(index, self.lost(unit, index), None, problem=error.problem)
            return
        index = 0
        for piece in pieces:
            parts = self.count(piece.data)
            for part in range(parts):
                if only is None or index in only:
                    location = f"{unit.spec['file']}#{piece.number}" + (f".{part}" if parts > 1 else "")
                    yield self._row(index, location, piece.data, part, unit.spec["file"])
                index += 1

    def _row(self, index: int, location: str, data: bytes, part: int, file: str) -> Row:
        row = Row(index, location, None)
        try:
            row.problem = self.fill(row, parse_object(data), part, file)
        except Malformed as error:
            row.problem = error.problem
        return row


def below(path: str) -> str:
    """A record's path as it is looked for; a URL is one."""
    return path if "://" in path else posixpath.normpath(path)


def load(row: Row, root: Root, inputs: Sequence[str], output: str | None) -> Problem | None:
    """Read a row's images: the inputs, in order, and its own, if it has one. The first problem, if there is one."""
    names = [*inputs, *([output] if output else [])]
    problem: Problem | None = None
    for number, (path, data) in enumerate(zip(names, fetch([below(n) for n in names], root), strict=True)):
        if isinstance(data, Problem):
            problem = problem or Problem(data.reason, f"{path}: {data.detail}")
        elif number < len(inputs):
            row.inputs.append((path, data))
        else:
            row.data = data
    return problem


class Tables(Parquet):
    """Parquet files all of whose columns go to `meta`, nested ones too, but the one of images (`image_column`)."""

    def _columns(self, table: pq.ParquetFile, where: str) -> Columns:
        chosen = Columns.of(table.schema_arrow, self.config.image_column, None, where)
        return Columns(chosen.image, None, tuple(n for n in table.schema_arrow.names if n != chosen.image))
