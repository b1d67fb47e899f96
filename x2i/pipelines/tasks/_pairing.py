"""Subjects and their photographs, as DuckDB's tables: who is alone in which picture, who is with whom, who may go with whom.

Each function works on the connection of `Task.groups`. Every choice is by an MD5 of the seed and the pictures' ids, so that
it does not depend on the order of rows. Work grows with the number of pictures, not with its square: a picture meets
the next few of its subject, in a circle.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from x2i.base.errors import RecipeError, X2IError
from x2i.base.seeds import canonical_json
from x2i.base.sql import identifier, literal
from x2i.pipelines.select.lookalikes import lookalikes
from x2i.pipelines.select.names import MENTIONS, Name
from x2i.pipelines.select.verify_pairs import Candidate

if TYPE_CHECKING:
    import duckdb

#: subject, row_id, image_id: pictures of one subject alone. row_id, image_id, subject, nth: pictures of several.
SINGLES, TOGETHER = "x2i singles", "x2i together"

#: Rows of an answer that are fetched at a time.
FETCHED = 10_000
#: So many more pictures are looked at than are asked for, because some are too near.
SPARE = 8


def column(name: str) -> str:
    """The SQL of a column that tasks read, `rows.text` or `annotator.column`, in `kept`."""
    table, _, part = name.partition(".")
    return identifier(part) if table == "rows" else identifier(table, part)


def subject(where: str) -> str:
    """The SQL of a row's subject: `folder`, `folder.N` (the Nth of the location's folders), or `meta.KEY`."""
    kind, _, part = where.partition(".")
    if kind == "meta":
        return f"json_extract_string(meta, {literal('$.' + canonical_json(part))})"
    if part:
        return f"nullif(split_part(regexp_extract(location, '^(.*)/', 1), '/', {int(part)}), '')"
    return "nullif(regexp_extract(location, '^(.*)/', 1), '')"


def by_column(connection: duckdb.DuckDBPyConnection, where: str, fewest: int, most: int | None) -> int:
    """Make `SINGLES` of what the sources say; how many subjects have enough pictures, and not too many."""
    bounds = f"count(distinct image_id) >= {int(fewest)}" + (
        f" and count(distinct image_id) <= {int(most)}" if most else ""
    )
    connection.execute(
        f"""create or replace temp table "{SINGLES}" as
            with told as (select source || ' ' || ({subject(where)}) as subject, row_id, image_id from kept)
            select * from told where subject in (select subject from told where subject is not null group by subject having {bounds})"""
    )
    _none_together(connection)
    return _count(connection)


def by_name(
    connection: duckdb.DuckDBPyConnection, names: Iterable[Name], most: int, fewest_together: int, faces: str | None
) -> None:
    """Make `SINGLES` and `TOGETHER` of the table of mentions.

    A picture is one of a subject alone where its caption has no other name at all, wanted or not; it is one of several
    where all its names, at most `most`, are wanted, and these occur together in `fewest_together` pictures.

    Args:
        faces: an annotator with `count`: singles have one face, others as many as names, or more.
    """
    connection.register("x2i wanted", pa.table({"name": pa.array([n.key for n in names], pa.string())}))
    one = many = ""
    if faces is not None:
        counted = f"(select row_id, {identifier(faces)}.count as faces from kept)"
        one = f"semi join (from {counted} where faces = 1) using (row_id)"
        many = f"semi join (from wanted join {counted} using (row_id) where faces >= names) using (row_id)"
    connection.execute(
        f"""create or replace temp table "x2i peopled" as
                select row_id, count(*) as names, count(*) filter (name in (select name from "x2i wanted")) as known,
                       string_agg(name, chr(31) order by name) as who
                from "{MENTIONS}" group by row_id;
            create or replace temp table "{SINGLES}" as
                select name as subject, row_id, image_id from "{MENTIONS}"
                semi join (from "x2i peopled" where names = 1 and known = 1) using (row_id) {one};
            create or replace temp table "{TOGETHER}" as
                with wanted as (
                    select row_id, names, who from "x2i peopled" where names between 2 and {int(most)} and known = names
                ), often as (
                    select who from wanted join (select row_id, image_id from kept) using (row_id)
                    group by who having count(distinct image_id) >= {int(fewest_together)}
                )
                select row_id, image_id, name as subject, nth from "{MENTIONS}"
                semi join (from wanted semi join often using (who)) using (row_id) {many}"""
    )
    connection.unregister("x2i wanted")


def by_pairs(connection: duckdb.DuckDBPyConnection, rows: pa.Table) -> None:
    """Make `SINGLES` of pairs that are known, `a` and `b` (row ids): each row is a subject, its partners are the singles."""
    connection.register("x2i found", rows)
    connection.execute(
        f"""create or replace temp table "{SINGLES}" as
            with sides as (select a, b from "x2i found" union select b, a from "x2i found")
            select a as subject, b as row_id, image_id from sides join kept on kept.row_id = b"""
    )
    connection.unregister("x2i found")
    _none_together(connection)


def alike(
    connection: duckdb.DuckDBPyConnection,
    columns: Sequence[str],
    neighbours: int,
    least: float | None,
    near: int | None,
) -> pa.Table:
    """Pairs of rows `a` and `b` that stand out for each other by columns of embeddings (`lookalikes`), with their `score`.

    Rows without an embedding have no partner. Holds all embeddings, at 4 bytes a number.

    Raises:
        X2IError: a column has embeddings of different lengths, or none at all.
    """
    tables = [c.partition(".")[0] for c in columns]
    joins = " ".join(f"join {identifier('lake', t)} t{i} using (row_id)" for i, t in enumerate(tables))
    parts = [f"t{i}.{identifier(c.partition('.')[2])}" for i, c in enumerate(columns)]
    value = "k.phash.hash" if near is not None else "0::ubigint"
    found: pa.Table = connection.sql(
        f"""select row_id, k.image_id as image_id, {value} as hash, {", ".join(f"{p} as e{i}" for i, p in enumerate(parts))}
            from kept k {joins} where {" and ".join(f"{p} is not null" for p in parts)}
            order by k.image_id, row_id"""
    ).to_arrow_table()
    arrays = [_matrix(found[f"e{i}"], c) for i, c in enumerate(columns)]
    good = np.flatnonzero(np.all([np.isfinite(e).all(axis=1) & (e != 0).any(axis=1) for e in arrays], axis=0))
    ids = found["image_id"].take(pa.array(good)).to_pylist()
    hashes = found["hash"].to_numpy().astype(np.uint64)[good] if near is not None else None
    pairs = lookalikes([e[good] for e in arrays], ids, neighbours, least, hashes, near or 0)
    rows = found["row_id"].combine_chunks()
    return pa.table(
        {"a": rows.take(pa.array(good[pairs.a])), "b": rows.take(pa.array(good[pairs.b])), "score": pairs.score}
    )


def _matrix(lists: pa.ChunkedArray, column: str) -> np.ndarray:
    """A column of embeddings as float32 [N, D]."""
    whole = lists.combine_chunks()
    if not (_is_list(lists.type) and pa.types.is_floating(lists.type.value_type)):
        raise RecipeError(f"features: {column} is no embedding, but {lists.type}; e.g. classes.embedding is one")
    widths = pc.unique(pc.list_value_length(whole)).to_pylist()
    if len(widths) > 1 or widths == [0]:
        raise X2IError(f"features: {column} holds embeddings of different lengths: {widths}")
    flat = pc.list_flatten(whole).to_numpy(zero_copy_only=False).astype(np.float32)
    return np.asarray(flat.reshape(len(whole), widths[0] if widths else 1))


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _none_together(connection: duckdb.DuckDBPyConnection) -> None:
    columns = "row_id varchar, image_id varchar, subject varchar, nth bigint"
    connection.execute(f'create or replace temp table "{TOGETHER}" ({columns})')


def _count(connection: duckdb.DuckDBPyConnection) -> int:
    ((count,),) = connection.execute(f'select count(distinct subject) from "{SINGLES}"').fetchall()
    return int(count)


def candidates(
    connection: duckdb.DuckDBPyConnection,
    photos: str,
    salt: str,
    count: int,
    said: tuple[str, list[str]],
    near: tuple[str, int] | None,
) -> Iterator[Candidate]:
    """Pictures that could be outputs, each with up to `count` single pictures of each of its subjects.

    The connection is taken until the last one is fetched: ask other things by another cursor.

    Args:
        photos: a query for row_id, image_id, subject, nth.
        salt: what the choice depends on besides the pictures' ids.
        said: the column of captions, and regular expressions that an output's caption must all match.
        near: a column of pHashes and a number of bits: pictures that differ in so many or fewer do not go together.
    """
    text, patterns = column(said[0]), said[1]
    tests = " and ".join([f"regexp_matches({text}, {literal(p)})" for p in patterns] or ["true"])
    apart = f"bit_count(xor(o.hash, s.hash)) > {near[1]}" if near else "true"
    value = column(near[0]) if near else "0::ubigint"
    connection.execute(
        f"""create or replace temp table "x2i circle" as
                select subject, row_id, image_id, hash, count(*) over (partition by subject) as size,
                       row_number() over (partition by subject
                           order by md5_number_lower({literal(salt)} || image_id), image_id, row_id) - 1 as place
                from "{SINGLES}" join (select row_id, {value} as hash from kept) using (row_id);
            create or replace temp table "x2i outputs" as
                with photos as ({photos}), fit as (
                    select p.*, k.hash, count(*) over (partition by p.row_id) as wanted from photos p
                    join (select row_id, {value} as hash, {text} as said from kept where {tests}) k using (row_id)
                )
                select f.row_id, f.image_id, f.subject, f.nth, f.hash, f.wanted, n.size,
                       row_number() over (order by f.row_id, f.nth) as number,
                       coalesce(c.place + 1, (md5_number_lower({literal(salt)} || f.image_id || f.subject) % n.size)::bigint) as start
                from fit f
                join (select subject, any_value(size) as size from "x2i circle" group by subject) n on n.subject = f.subject
                left join "x2i circle" c on c.subject = f.subject and c.row_id = f.row_id"""
    )
    found = connection.execute(
        f"""with asked as (
                select *, unnest(range(least(size, {int(count) + SPARE}))) as step from "x2i outputs"
            ), met as (
                select o.number, (list(s.row_id order by o.step) filter (
                           where s.image_id <> o.image_id and {apart}))[1:{int(count)}] as singles
                from asked o join "x2i circle" s on s.subject = o.subject and s.place = (o.start + o.step) % o.size
                group by o.number
            )
            select row_id, wanted, subject, singles from met join "x2i outputs" using (number) order by number"""
    )
    rows = (row for some in iter(lambda: found.fetchmany(FETCHED), []) for row in some)
    for photo, members in itertools.groupby(rows, key=lambda r: r[0]):
        mine = list(members)
        if len(mine) == mine[0][1] and all(singles for *_, singles in mine):
            yield Candidate(photo, tuple(s for _, _, s, _ in mine), tuple(tuple(singles) for *_, singles in mine))


def is_subject(where: str) -> bool:
    """Whether `subject` knows what is meant."""
    return re.fullmatch(r"folder(\.[1-9]\d*)?|meta\..+", where, re.DOTALL) is not None
