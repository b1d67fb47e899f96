"""Tombstones: the images that must not come back, and what becomes of the rows that hold them.

    corpus.json            `forgotten`: a list of {"image_id": SHA-256 of the bytes, "why": a word}
    LAKE/forgotten.jsonl   the same, a line each, for every recipe on this lake

A tombstone says which image and why in one word: no name, no address, no time. It acts after all other rules of a
selection, so that a picture which fell as the forgotten one's duplicate does not come up in its place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from x2i.base.errors import RecipeError, X2IError
from x2i.base.files import write_text, writing
from x2i.base.seeds import canonical_json
from x2i.base.sql import connect, identifier, literal

if TYPE_CHECKING:
    import duckdb

#: Stage and reason of a row that holds a forgotten image; the reason of one whose samples all held a partner's.
FORGOTTEN, LOST = "forgotten", "lost_samples"

FILE = "forgotten.jsonl"

#: Why it fell, of a row: its own image, one of its inputs, all its partners.
OWN, INPUT = "its image was forgotten", "an image among its inputs was forgotten"
PARTNER = "each of its samples held another image, which was forgotten"

#: Columns of the selection that stay as they are: which row it was. What is not of the verdict, either, is emptied.
_WHICH = ("row_id", "source", "unit", "index", "location", "image_id")
_ROWS = 10_000


def of_corpus(info: Mapping[str, Any]) -> dict[str, str]:
    """Why each image was forgotten, by image id, as `corpus.json` has it."""
    return {t["image_id"]: t["why"] for t in info.get("forgotten", ())}


def of_lake(lake: Path) -> dict[str, str]:
    """The same of a lake. Raises X2IError if its list is damaged."""
    path = lake / FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return {t["image_id"]: t["why"] for t in map(json.loads, lines)}
    except FileNotFoundError:
        return {}
    except (ValueError, LookupError, TypeError) as error:
        raise X2IError(
            f"{path}: damaged ({error}): each line is to be an object like {_line('0' * 64, 'asked')}. "
            "Mend the line; nothing is built while it cannot be told what was forgotten."
        ) from None


def listed(tombstones: Mapping[str, str]) -> list[dict[str, str]]:
    """As `corpus.json` lists them, in the order of the images' ids."""
    return [{"image_id": i, "why": tombstones[i]} for i in sorted(tombstones)]


def bury(lake: Path, tombstones: Mapping[str, str]) -> dict[str, str]:
    """Add tombstones to a lake's list, and return all that it holds then. An image keeps its first reason.

    Raises:
        X2IError: the list is damaged, or another process holds its lock for a minute.
    """
    from filelock import FileLock, Timeout

    there = of_lake(lake)
    if tombstones.keys() <= there.keys():
        return there
    try:
        with FileLock(lake / f".{FILE}.lock", timeout=60):
            merged = {**tombstones, **of_lake(lake)}
            write_text(lake / FILE, "".join(_line(i, merged[i]) + "\n" for i in sorted(merged)))
    except Timeout:
        raise X2IError(f"{lake / FILE}: another process has been writing it for a minute. Try again.") from None
    return merged


def check_word(why: str) -> str:
    """`why`, if it is one plain word. Raises RecipeError."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", why):
        raise RecipeError(
            f"--why {why!r}: one word of a-z, 0-9 and _, e.g. consent, takedown, licence (no names, no dates)"
        )
    return why


def find_hits(connection: duckdb.DuckDBPyConnection, rows: str, image_ids: Collection[str]) -> None:
    """Create the tables `tombs` (image_id) and `hits` (row_id, own: whether it is its own image) of a connection.

    Args:
        rows: SQL for a table with `row_id`, `image_id` and `inputs`.
    """
    ids = pa.table({"image_id": pa.array(sorted(image_ids), pa.string())})
    connection.register("_tombs", ids)
    connection.execute("create or replace temp table tombs as select image_id from _tombs")
    connection.unregister("_tombs")
    connection.execute(
        f"""create or replace temp table hits as
        select row_id, bool_or(own) as own from (
            select row_id, true as own from {rows} where image_id in (select image_id from tombs)
            union all
            select row_id, false as own from (select row_id, unnest(inputs) as image_id from {rows})
            where image_id in (select image_id from tombs)
        ) group by row_id"""
    )


def write_selection(
    rows: Path,
    out: Path,
    tombstones: Collection[str] = (),
    fallen: Collection[Mapping[str, str]] = (),
    lost: Collection[str] = (),
) -> None:
    """Write verdicts with what came after the selection: assembly, then tombstones, which empty the rows that they hit.

    Args:
        rows: the selection's verdicts, or a published selection.
        fallen: `row_id`, `reason`, `detail` of rows of which nothing could be made.
        lost: ids of rows that have no samples left, because of another image.
    """
    schema = pa.schema([("row_id", pa.string()), ("reason", pa.string()), ("detail", pa.string())])
    with connect() as connection:
        connection.register("fallen", pa.Table.from_pylist([dict(f) for f in fallen], schema=schema))
        connection.register("lost", pa.table({"row_id": pa.array(sorted(lost), pa.string())}))
        table = f"read_parquet({literal(rows)})"
        find_hits(connection, table, tombstones)
        reader = connection.sql(
            f"""select v.* exclude ("x2i place") replace ({", ".join(_columns(connection, table))})
            from (select *, row_number() over () as "x2i place" from {table}) v
            left join fallen f on f.row_id = v.row_id
            left join lost l on l.row_id = v.row_id
            left join hits h on h.row_id = v.row_id
            order by "x2i place"
            """
        ).to_arrow_reader(_ROWS)
        with writing(out), pq.ParquetWriter(out, reader.schema, compression="zstd") as writer:
            for batch in regroup(reader, _ROWS):
                writer.write_table(batch)


def _columns(connection: duckdb.DuckDBPyConnection, table: str) -> Iterator[str]:
    """`expression as column` of every column that may change."""
    gone, lost, fell = "h.row_id is not null", "l.row_id is not null", "f.row_id is not null"

    def verdict(forgotten: str, partner: str, assembly: str, else_: str) -> str:
        return (
            f"case when {gone} then {forgotten} when {lost} then {partner} when {fell} then {assembly} else {else_} end"
        )

    stage = literal(FORGOTTEN)
    yield f"v.kept and not ({gone} or {lost} or {fell}) as kept"
    yield f"{verdict(stage, stage, literal('assembly'), 'v.stage')} as stage"
    yield f"{verdict(stage, literal(LOST), 'f.reason', 'v.reason')} as reason"
    own = f"if(h.own, {literal(OWN)}, {literal(INPUT)})"
    yield f"{verdict(own, literal(PARTNER), 'f.detail', 'v.detail')} as detail"
    described = connection.sql(f"select * from {table} limit 0")
    known = {*_WHICH, "kept", "stage", "reason", "detail"}
    for name, kind in zip(described.columns, described.types, strict=True):
        column = f"v.{identifier(name)}"
        if name in known:
            continue
        if kind.id == "struct":
            fields = (f"{identifier(f)} := if({gone}, null, {column}.{identifier(f)})" for f, _ in kind.children)
            yield f"struct_pack({', '.join(fields)}) as {identifier(name)}"
        else:
            empty = {"meta": "'{}'", "inputs": "[]"}.get(name, "null")
            yield f"case when {gone} then {empty} else {column} end as {identifier(name)}"


def regroup(reader: pa.RecordBatchReader, size: int) -> Iterator[pa.Table]:
    """Tables of exactly `size` rows (the last may be shorter), however the reader cuts its batches."""
    held: list[pa.RecordBatch] = []
    count = 0
    for batch in reader:
        held.append(batch)
        count += batch.num_rows
        while count >= size:
            table = pa.Table.from_batches(held, reader.schema)
            yield table.slice(0, size)
            held = table.slice(size).to_batches()
            count -= size
    if count:
        yield pa.Table.from_batches(held, reader.schema)


def _line(image_id: str, why: str) -> str:
    return canonical_json({"image_id": image_id, "why": why})
