"""One unit through its annotators: read, hash, check, decode once, annotate, write each one's Parquet file."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from x2i.base.files import atomic
from x2i.base.seeds import canonical_json, digest
from x2i.corpus.lake import ERRORS, KEYS, ROWS, Column, Lake
from x2i.pipelines.annotators.base import Annotator, Decoding, Item
from x2i.pipelines.images import BadImage, decode, read_header
from x2i.pipelines.sources.base import Problem, Row, Source, Unit

log = logging.getLogger(__name__)

#: Rows are worked through in chunks of at most so many rows, and so many bytes of pixels.
CHUNK_ROWS, CHUNK_BYTES = 64, 96 * 2**20


#: The problem of a row whose bytes could not be fetched this time: a later run tries its unit again.
UNREADABLE = "unreadable"


def again(rows: Path) -> Path:
    """The mark beside a unit's rows that some of them were unreadable."""
    return rows.with_suffix(".again")


def row_id(source: str, location: str) -> str:
    """A row's id: by source name and location, so that it stays when its neighbours change."""
    return digest("row/1", source, location)[:32]


@dataclass
class Tally:
    """What came of one unit."""

    rows: int = 0
    decoded: int = 0
    annotated: dict[str, int] = field(default_factory=dict)


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
    """A row on its way: an item if it is usable so far, a problem if it is not."""

    row: Row
    image_id: str | None
    item: Item | None = None
    problem: Problem | None = None


def annotate_unit(
    source: Source,
    unit: Unit,
    annotators: list[Annotator],
    lake: Lake,
    write_rows: bool,
    skip: Mapping[int, Problem],
    journal: Journal | None = None,
) -> Tally:
    """Annotate one unit and write one file per annotator (and the rows' own). Each appears whole or not at all.

    Args:
        skip: rows that must not be touched, with the reason; they get it as their problem.
        journal: given on a second attempt: rows are then taken one at a time, and noted before they are.

    Raises:
        OSError: the lake cannot be written (a full disk).
    """
    tally = Tally(annotated={a.name: 0 for a in annotators})
    need_pixels = any(a.needs == "pixels" for a in annotators)
    rows: list[dict[str, Any]] = []
    parts: dict[str, list[pa.Table]] = {a.name: [] for a in annotators}
    decoding = annotators[0].decoding if annotators else None
    for chunk in _chunks(source.read(unit), skip, need_pixels, decoding, journal):
        for work in chunk:
            rows.append(_row(source.name, unit.id, work))
            tally.decoded += work.item is not None and work.item.pixels is not None
        for annotator in annotators:
            table = _annotate(annotator, chunk, source.name)
            tally.annotated[annotator.name] += table["error"].null_count
            parts[annotator.name].append(table)
    tally.rows = len(rows)
    for annotator in annotators:
        schema = pa.schema([*KEYS, *annotator.columns, *ERRORS])
        table = pa.concat_tables(parts[annotator.name]) if rows else schema.empty_table()
        _write(table, lake.file(Column(annotator.name, annotator.fingerprint), unit.id))
    path = lake.file(Column("rows", source.fingerprint), unit.id)
    unreadable = any(row["problem"] == UNREADABLE for row in rows)
    if unreadable:
        path.parent.mkdir(parents=True, exist_ok=True)
        again(path).touch()
    if write_rows:  # last: where the rows are, the rest has been there at least once
        _write(pa.Table.from_pylist(rows, schema=ROWS), path)
    if not unreadable:
        again(path).unlink(missing_ok=True)
    if journal:
        journal.remove()
    return tally


def _chunks(
    rows: Iterator[Row],
    skip: Mapping[int, Problem],
    need_pixels: bool,
    decoding: Decoding | None,
    journal: Journal | None,
) -> Iterator[list[_Work]]:
    chunk: list[_Work] = []
    size = 0
    for row in rows:
        if journal:
            journal.mark(row.index)
            yield [_prepare(row, skip, need_pixels, decoding)]
            continue
        work = _prepare(row, skip, need_pixels, decoding)
        held = work.item.pixels.nbytes if work.item is not None and work.item.pixels is not None else 0
        if chunk and (len(chunk) >= CHUNK_ROWS or size + held > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(work)
        size += held
    if chunk:
        yield chunk


def _prepare(row: Row, skip: Mapping[int, Problem], need_pixels: bool, decoding: Decoding | None) -> _Work:
    image_id = hashlib.sha256(row.data).hexdigest() if row.data is not None else None
    work = _Work(row, image_id)
    if row.problem is None and row.data is None:
        row.problem = Problem("missing_image", "the source gave no bytes")
    work.problem = row.problem or skip.get(row.index)
    if work.problem is not None or row.data is None or image_id is None:
        return work
    if decoding is None:
        return work
    try:
        header = read_header(row.data, decoding.max_pixels)
    except BadImage as bad:
        work.problem = Problem(bad.reason, bad.detail)
        return work
    work.item = Item(image_id, row.text, row.data, header)
    if need_pixels:
        try:
            work.item.pixels = decode(row.data, header)
            work.item.pixels.flags.writeable = False
        except BadImage as bad:
            work.problem = Problem(bad.reason, bad.detail)
        except MemoryError:
            work.problem = Problem("out_of_memory", f"{header.width}x{header.height} did not fit into memory")
    return work


def _annotate(annotator: Annotator, chunk: list[_Work], source: str) -> pa.Table:
    """One annotator's rows of a chunk: values where it could run, nulls and the reason where not."""
    able = [
        i
        for i, w in enumerate(chunk)
        if w.item is not None and (annotator.needs == "header" or w.item.pixels is not None)
    ]
    values: list[dict[str, Any] | None] = [None] * len(chunk)
    errors: list[Problem | None] = [None if i in set(able) else w.problem for i, w in enumerate(chunk)]
    size = annotator.config.batch_size
    for start in range(0, len(able), size):
        batch = able[start : start + size]
        for i, made in zip(batch, _call(annotator, [chunk[i].item for i in batch]), strict=True):
            if isinstance(made, Problem):
                errors[i] = made
            else:
                values[i] = made
    empty = dict.fromkeys(annotator.columns.names)
    out = [
        {
            "row_id": row_id(source, w.row.location),
            **(v or empty),
            "error": e.reason if e else None,
            "error_detail": e.detail if e else None,
        }
        for w, v, e in zip(chunk, values, errors, strict=True)
    ]
    return pa.Table.from_pylist(out, schema=pa.schema([*KEYS, *annotator.columns, *ERRORS]))


def _call(annotator: Annotator, items: list[Any]) -> list[dict[str, Any] | Problem]:
    """Values of each item, or the problem that it made. A batch that fails is tried again one by one."""
    try:
        table = annotator(items)
    except Exception as error:  # whatever an annotator raises on an image is that image's problem
        if len(items) == 1:
            log.warning("%s failed on image %s", annotator.name, items[0].image_id, exc_info=True)
            return [Problem("annotator_failed", f"{annotator.name}: {type(error).__name__}: {error}")]
        return [made for item in items for made in _call(annotator, [item])]
    if table.num_rows != len(items):
        raise TypeError(f"annotator {annotator.name} gave {table.num_rows} rows for {len(items)} images")
    return list(table.select(annotator.columns.names).cast(annotator.columns).to_pylist())


def _row(source: str, unit: str, work: _Work) -> dict[str, Any]:
    row = work.row
    return {
        "row_id": row_id(source, row.location),
        "source": source,
        "unit": unit,
        "index": row.index,
        "location": clean(row.location),
        "image_id": work.image_id,
        "text": clean(row.text) if row.text is not None else None,
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


def _write(table: pa.Table, path: Path) -> None:
    with atomic(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
