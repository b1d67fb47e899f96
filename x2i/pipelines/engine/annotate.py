"""One unit through its annotators: read, hash, check, decode once, annotate, write each one's Parquet file."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from x2i.base.files import atomic, in_turn
from x2i.base.seeds import canonical_json, digest
from x2i.corpus.lake import ERRORS, KEYS, ROWS, Column, Lake, read_table
from x2i.pipelines.annotators.base import Annotator, Item
from x2i.pipelines.calling import call
from x2i.pipelines.engine.ahead import ahead, in_threads
from x2i.pipelines.engine.known import Known
from x2i.pipelines.images import BadImage, decode, read_header
from x2i.pipelines.sources.base import Problem, Row, Source, Unit

log = logging.getLogger(__name__)

#: Rows are worked through in chunks of at most so many rows (or the largest batch), and so many bytes of pixels (or
#: this many a row of that batch, so that large pictures do not keep a GPU's batches small).
CHUNK_ROWS, CHUNK_BYTES, ROW_BYTES = 64, 96 * 2**20, 4 * 2**20

#: The problem of a row whose bytes could not be fetched this time: a later run tries its unit again.
UNREADABLE = "unreadable"


def again(rows: Path) -> Path:
    """The mark beside a unit's rows that some of them were unreadable."""
    return rows.with_suffix(".again")


def row_id(source: str, location: str) -> str:
    """A row's id: by source name and location, so that it stays when its neighbours change."""
    return digest("row/1", source, location)[:32]


@dataclass
class Want:
    """An annotator, where its values go, and which rows of the unit it is to see (indices; None: all)."""

    annotator: Annotator
    column: Column
    only: frozenset[int] | None = None

    def takes(self, index: int) -> bool:
        """Whether the row of this index is wanted."""
        return self.only is None or index in self.only


@dataclass
class Tally:
    """What came of one unit. `calls` are (rows, seconds) per call of an annotator; `reading` are seconds to decoded pixels."""

    rows: int = 0
    decoded: int = 0
    annotated: dict[str, int] = field(default_factory=dict)
    calls: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    reading: float = 0.0


class Journal:
    """The row in hand, on disk, so that the death of a process can be laid at the right door."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def mark(self, index: int) -> None:
        """This row is being worked on now."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(str(index))

    def read(self) -> int | None:
        """The row that was being worked on, if any was."""
        try:
            return int(self._path.read_text())
        except (FileNotFoundError, ValueError):
            return None

    def remove(self) -> None:
        """Forget."""
        self._path.unlink(missing_ok=True)


@dataclass
class _Work:
    """A row on its way. `problem`: nothing can be had of it. `unusable`: its image cannot be used."""

    row: Row
    id: str
    image_id: str | None
    item: Item
    problem: Problem | None = None
    unusable: Problem | None = None


def annotate_unit(
    source: Source,
    unit: Unit,
    wants: Sequence[Want],
    lake: Lake,
    write_rows: bool,
    skip: Mapping[int, Problem],
    journal: Journal | None = None,
    inputs: Mapping[str, Column] | None = None,
    threads: int = 1,
    overlap: bool = False,
) -> Tally:
    """Annotate one unit and write one file per annotator (and the rows' own). Each appears whole or not at all.

    Args:
        wants: in an order in which each annotator comes after those that it reads. What an annotator reads is
            taken from the others' values of this very call, or from their files.
        skip: rows that must not be touched, with the reason; they get it as their problem.
        journal: given on a second attempt: rows are then taken one at a time, and noted before they are.
        inputs: where the values of annotators lie that `wants` read, by name.
        threads: decode in so many.
        overlap: read and decode the next chunk while the annotators (on a GPU) work on this one.

    Raises:
        OSError: the lake cannot be written (a full disk).
    """
    names = [w.column.name for w in wants]
    tally = Tally(annotated=dict.fromkeys(names, 0), calls={n: [] for n in names})
    known = Known(lake, unit.id, source.fingerprint, [w.annotator for w in wants], inputs or {})
    parts: dict[str, list[pa.Table]] = {n: [] for n in names}
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    for chunk in _chunks(
        _works(source, unit, wants, lake, write_rows, skip, journal, threads), wants, journal, overlap
    ):
        tally.reading += time.perf_counter() - began
        rows += [_row(source.name, unit.id, work) for work in chunk] if write_rows else []
        tally.rows += len(chunk)
        tally.decoded += sum(w.item is not None and w.item.pixels is not None for w in chunk)
        for want in wants:
            table = _annotate(want, chunk, known, tally)
            known.add(want.column.name, table)
            parts[want.column.name].append(table)
        began = time.perf_counter()
    for want in wants:
        path = lake.file(want.column, unit.id, source.fingerprint)
        tally.bytes[want.column.name] = _write_values(want, parts[want.column.name], path)
    if write_rows:  # last: where the rows are, the rest has been there at least once
        _write_rows(rows, lake.file(Column("rows", source.fingerprint), unit.id))
    if journal:
        journal.remove()
    return tally


def _works(
    source: Source,
    unit: Unit,
    wants: Sequence[Want],
    lake: Lake,
    write_rows: bool,
    skip: Mapping[int, Problem],
    journal: Journal | None,
    threads: int,
) -> Iterator[_Work]:
    """The rows that anything is wanted of, ready for it. Without bytes, from the lake, if only columns are needed."""
    only: frozenset[int] | None = None
    if not write_rows and all(w.only is not None for w in wants):
        only = frozenset().union(*(w.only or () for w in wants))
    if not write_rows and all(w.annotator.needs == "row" for w in wants):
        works = _from_lake(lake, source, unit, only, skip)
        return works if journal is None else _noted(works, journal)
    prepare = _Preparer(source, wants, skip, journal)
    read = source.read(unit, only)
    return in_threads(prepare, read, threads) if threads > 1 and journal is None else map(prepare, read)


def _noted(works: Iterator[_Work], journal: Journal) -> Iterator[_Work]:
    for work in works:
        journal.mark(work.row.index)
        yield work


def _chunks(
    works: Iterator[_Work], wants: Sequence[Want], journal: Journal | None, overlap: bool
) -> Iterator[list[_Work]]:
    if journal is not None:
        return ([work] for work in works)
    batch = max((w.annotator.config.batch_size for w in wants), default=0)
    chunks = _cut(works, max(CHUNK_ROWS, batch), max(CHUNK_BYTES, ROW_BYTES * batch))
    return ahead(chunks) if overlap else chunks


def _cut(works: Iterator[_Work], most: int, most_bytes: int) -> Iterator[list[_Work]]:
    chunk: list[_Work] = []
    size = 0
    for work in works:
        held = work.item.pixels.nbytes if work.item is not None and work.item.pixels is not None else 0
        if chunk and (len(chunk) >= most or size + held > most_bytes):
            yield chunk
            chunk, size = [], 0
        chunk.append(work)
        size += held
    if chunk:
        yield chunk


def _from_lake(
    lake: Lake, source: Source, unit: Unit, only: frozenset[int] | None, skip: Mapping[int, Problem]
) -> Iterator[_Work]:
    table = read_table(lake.file(Column("rows", source.fingerprint), unit.id))
    for r in table.select(
        ["row_id", "index", "location", "image_id", "text", "meta", "problem", "problem_detail"]
    ).to_pylist():
        if only is None or r["index"] in only:
            said = Problem(r["problem"], r["problem_detail"]) if r["problem"] else None
            row = Row(r["index"], r["location"], None, r["text"], problem=said)
            yield _Work(
                row,
                r["row_id"],
                r["image_id"],
                Item(r["image_id"] or "", r["text"], meta=r["meta"]),
                said or skip.get(row.index),
            )


class _Preparer:
    """Makes a row ready for what is wanted of it: hash, header, pixels; and does no more than that."""

    def __init__(
        self, source: Source, wants: Sequence[Want], skip: Mapping[int, Problem], journal: Journal | None
    ) -> None:
        self._source, self._skip, self._journal = source.name, skip, journal
        self._headers = [w for w in wants if w.annotator.needs != "row"]
        self._pixels = [w for w in wants if w.annotator.needs == "pixels"]
        self._metas = any("rows.meta" in w.annotator.reads for w in wants)

    def __call__(self, row: Row) -> _Work:
        if self._journal:
            self._journal.mark(row.index)
        image_id = hashlib.sha256(row.data).hexdigest() if row.data is not None else None
        if row.problem is None and row.data is None:
            row.problem = Problem("missing_image", "the source gave no bytes")
        problem = row.problem or self._skip.get(row.index)
        text = clean(row.text) if row.text is not None else None
        item = Item(image_id or "", text, meta=_json(row.meta) if self._metas else "{}")
        work = _Work(row, row_id(self._source, row.location), image_id, item, problem)
        if problem is None and row.data is not None and any(w.takes(row.index) for w in self._headers):
            work.unusable = self._open(work.item, row)
        return work

    def _open(self, item: Item, row: Row) -> Problem | None:
        """Fill in the item's bytes, header and pixels, as far as they are needed; what kept it from them."""
        decoding = self._headers[0].annotator.decoding
        assert row.data is not None
        try:
            item.header, item.data = read_header(row.data, decoding.max_pixels), row.data
            if any(w.takes(row.index) for w in self._pixels):
                item.pixels = decode(row.data, item.header, decoding.shorter_side)
                item.pixels.flags.writeable = False
        except BadImage as bad:
            return Problem(bad.reason, bad.detail)
        except MemoryError:
            return Problem("out_of_memory", f"{item.header.width}x{item.header.height} did not fit into memory")
        return None


def _annotate(want: Want, chunk: list[_Work], known: Known, tally: Tally) -> pa.Table:
    """One annotator's rows of a chunk: values where it could run, nulls and the reason where not."""
    annotator = want.annotator
    works = [w for w in chunk if want.takes(w.row.index)]
    columns, upstream = known.columns(annotator, [w.id for w in works], [w.item for w in works])
    problems = [w.problem or _unusable(annotator, w) or u for w, u in zip(works, upstream, strict=True)]
    able = [i for i, problem in enumerate(problems) if problem is None]
    called = call(annotator, [works[i].item for i in able], columns.take(pa.array(able, pa.int64())))
    tally.calls[want.column.name] += called.calls
    at: list[int | None] = [None] * len(works)
    for place, i in enumerate(able):
        at[i], problems[i] = place, called.problems[place]
    tally.annotated[want.column.name] += sum(p is None for p in problems)
    values = called.values.take(pa.array(at, pa.int64()))
    arrays = {
        "row_id": pa.array([w.id for w in works], pa.string()),
        **dict(zip(values.column_names, values.columns, strict=True)),
        "error": pa.array([p.reason if p else None for p in problems], pa.string()),
        "error_detail": pa.array([p.detail if p else None for p in problems], pa.string()),
    }
    return pa.table(arrays, schema=pa.schema([*KEYS, *annotator.columns, *ERRORS]))


def _unusable(annotator: Annotator, work: _Work) -> Problem | None:
    """What keeps an annotator from a row's image: nothing, if it needs none; or a header, and that is there."""
    if annotator.needs == "row" or (annotator.needs == "header" and work.item.data):
        return None
    return work.unusable


def _row(source: str, unit: str, work: _Work) -> dict[str, Any]:
    row = work.row
    return {
        "row_id": work.id,
        "source": source,
        "unit": unit,
        "index": row.index,
        "location": clean(row.location),
        "image_id": work.image_id,
        "text": work.item.text,
        "meta": _json(row.meta),
        "inputs": [hashlib.sha256(data).hexdigest() for _, data in row.inputs],
        "problem": row.problem.reason if row.problem else None,
        "problem_detail": clean(row.problem.detail) if row.problem else None,
    }


def clean(text: str) -> str:
    """Text that UTF-8 can hold: lone surrogates (odd file names, broken JSON escapes) are spelt out."""
    return text.encode("utf-8", "backslashreplace").decode()


def _json(meta: dict[str, Any]) -> str:
    """Metadata as JSON that any reader takes: dates and the like as text, NaN and infinities as null."""
    plain = json.loads(json.dumps(meta, default=str), parse_constant=lambda _: None)
    return clean(canonical_json(plain))


def _write_values(want: Want, parts: list[pa.Table], path: Path) -> int:
    """Write an annotator's values for the unit; those of other rows that are there already stay. Returns bytes written."""
    schema = pa.schema([*KEYS, *want.annotator.columns, *ERRORS])
    table = pa.concat_tables(parts) if parts else schema.empty_table()
    size = table.nbytes
    with in_turn(path.parent):  # another recipe's build may add rows to the same file
        if want.only is not None and path.exists():
            old = read_table(path, schema=schema)
            stay = pc.invert(pc.is_in(old["row_id"], value_set=table["row_id"].combine_chunks()))
            table = pa.concat_tables([old.filter(stay), table]).sort_by("row_id")
        _write(table, path)
    return size


def _write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    unreadable = any(row["problem"] == UNREADABLE for row in rows)
    if unreadable:
        path.parent.mkdir(parents=True, exist_ok=True)
        again(path).touch()
    _write(pa.Table.from_pylist(rows, schema=ROWS), path)
    if not unreadable:
        again(path).unlink(missing_ok=True)


def _write(table: pa.Table, path: Path) -> None:
    with atomic(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
