"""Selection as DuckDB queries over the lake: each row kept, or fallen for one stated reason.

The rules act in a fixed order: what the source could not give, what could not be decoded or annotated,
missing text, the recipe's conditions in their order, exact duplicates, near duplicates by picture, then by
caption. The first
rule that a row breaks is its reason. No image is read and no model runs.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from x2i.base.errors import RecipeError
from x2i.base.sql import connect, identifier, literal
from x2i.corpus.lake import ERRORS, KEYS, ROWS, Lake, create_views
from x2i.pipelines.select.dedup import NearDuplicates, near_duplicates
from x2i.pipelines.select.near_text import near_texts

if TYPE_CHECKING:
    import duckdb

    from x2i.pipelines.annotators.base import Annotator
    from x2i.pipelines.recipe import Plan

#: How ties between equally good rows are broken, in SQL.
TIES = "rows.image_id, rows.source, rows.location"

#: Tables beside the annotators', under names that no annotator can have.
VERDICTS, ORDER, NEAR = "x2i verdicts", "x2i order", "x2i near"

#: The stages of the funnel, in the order in which rows meet them.
STAGES = ("source", "decode", "text", "where", "duplicate", "assembly")


def select(plan: Plan, lake: Lake, units: dict[str, list[str]], out: Path) -> None:
    """Judge every row, and write the verdicts to `out` (Parquet, in the order of the sources).

    Columns: those of `rows`, a struct per annotator, and `kept`, `stage`, `reason`, `detail`, `survivor`
    (the row that stayed instead of a duplicate), `distance` (in bits of the pHash).

    Args:
        units: unit ids by source fingerprint, in the order of the plan.
    """
    connection = connect()
    create_views(connection, lake, units, plan.columns())
    order = pa.table(
        {
            "unit": [u for ids in units.values() for u in ids],
            "at": pa.array(range(sum(map(len, units.values()))), pa.int64()),
        }
    )
    connection.register(ORDER, order)
    connection.execute(_judge(plan))
    _near(plan, connection)
    structs = ", ".join(_struct(a) for a in plan.annotators)
    joins = " ".join(f"left join {identifier(a.name)} using (row_id)" for a in plan.annotators)
    connection.execute(
        f"""copy (
            select rows.*, {structs}, v.reason is null as kept, v.stage, v.reason, v.detail,
                   v.survivor, v.distance
            from rows {joins} join "{VERDICTS}" v using (row_id) join "{ORDER}" o using (unit)
            order by o.at, rows.index
        ) to {literal(out)} (format parquet, compression zstd)"""
    )
    connection.close()


def check(plan: Plan) -> None:
    """Try the recipe's SQL on empty tables. Raises RecipeError naming the key and what DuckDB would accept."""
    recipe, where = plan.recipe, plan.where
    connection = connect()
    connection.register("rows", ROWS.empty_table())
    for annotator in plan.annotators:
        if annotator.config.where is not None:  # it sees rows, and the annotators before it
            key = f"{where}: annotators.{annotator.name}.where"
            before = plan.annotators[: plan.annotators.index(annotator)]
            kind = _try(connection, plan, annotator.config.where, key, before)
            if kind != "BOOLEAN":
                raise RecipeError(f"{key}: {annotator.config.where!r} gives {kind}, not a yes or no")
        connection.register(annotator.name, _empty(annotator.columns))
    for annotator in plan.annotators if any(a.heavy for a in plan.annotators) else []:
        connection.unregister(annotator.name)
        connection.register(annotator.name, _empty(pa.schema([annotator.columns.field(n) for n in light(annotator)])))
    for name, condition in recipe.select.where.items():
        kind = _try(connection, plan, condition, f"{where}: select.where.{name}")
        if kind != "BOOLEAN":
            raise RecipeError(f"{where}: select.where.{name}: {condition!r} gives {kind}, not a yes or no")
    for expression in recipe.select.dedup.best:
        _try(connection, plan, expression, f"{where}: select.dedup.best")
    known = {a.name: a for a in plan.annotators}
    if recipe.select.dedup.perceptual is not None and "phash" not in known:
        raise RecipeError(f"{where}: select.dedup.perceptual: needs the annotator `phash`: add it under `annotators`")
    text = recipe.select.dedup.text
    if text is not None and (text.annotator not in known or "minhash" not in known[text.annotator].columns.names):
        raise RecipeError(f"{where}: select.dedup.text: needs the annotator `texts`: add it under `annotators`")
    for score in recipe.output.scores or ():
        name, _, column = score.partition(".")
        if name not in known or column not in known[name].columns.names:
            there = sorted(f"{a.name}.{c}" for a in plan.annotators for c in a.columns.names)
            raise RecipeError(f"{where}: output.scores: no column {score!r}; there are {', '.join(there)}")


def _empty(columns: pa.Schema) -> pa.Table:
    """A table of these columns without rows, as DuckDB would read it from the lake: half floats as floats."""

    def as_read(kind: pa.DataType) -> pa.DataType:
        if pa.types.is_float16(kind):
            return pa.float32()
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return pa.list_(as_read(kind.value_type))
        return pa.list_(as_read(kind.value_type), kind.list_size) if pa.types.is_fixed_size_list(kind) else kind

    return pa.schema([*KEYS, *((f.name, as_read(f.type)) for f in columns), *ERRORS]).empty_table()


def _try(
    connection: duckdb.DuckDBPyConnection,
    plan: Plan,
    expression: str,
    key: str,
    annotators: Sequence[Annotator] | None = None,
) -> str:
    import duckdb

    try:
        relation = connection.sql(f"select ({expression}\n) as x from {_joined(plan, annotators)}")
        return str(relation.types[0])
    except duckdb.Error as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise RecipeError(f"{key}: {expression!r}: {' '.join(lines[:2])}{_hint(plan, str(error))}") from None


def _hint(plan: Plan, message: str) -> str:
    """What would be right, where DuckDB's message says only what is wrong."""
    if re.search(r'Referenced table "(\w+)" not found', message):
        return f" (annotators of this recipe: {', '.join(a.name for a in plan.annotators)})"
    column = re.search(r'"(\w+)" does not have a column named "(\w+)"', message)
    if column:
        heavy = {a.name: a.heavy for a in plan.annotators}.get(column[1], frozenset())
        if column[2] in heavy:
            return "; it stays in the lake (it is heavy), and selections cannot ask for it"
        tables = {a.name: a.columns.names for a in plan.annotators} | {"rows": ROWS.names}
        there = tables.get(column[1], [])
        near = difflib.get_close_matches(column[2], there, n=1)
        return f"; did you mean {column[1]}.{near[0]}?" if near else f"; it has {', '.join(there)}"
    return ""


def _joined(plan: Plan, annotators: Sequence[Annotator] | None = None) -> str:
    joined = plan.annotators if annotators is None else annotators
    return "rows " + " ".join(f"left join {identifier(a.name)} using (row_id)" for a in joined)


def _judge(plan: Plan) -> str:
    """SQL that makes `verdicts`: row_id, rank (best first, among those that stand so far), stage, reason …"""
    rules = ["when rows.problem is not null then ('source', rows.problem, rows.problem_detail)"]
    rules += [
        f"when {identifier(a.name)}.error is not null then ('decode', {identifier(a.name)}.error, {identifier(a.name)}.error_detail)"
        for a in plan.annotators
    ]
    if plan.recipe.select.require_text:
        rules.append("when rows.text is null then ('text', 'missing_text', 'the row has no text')")
    for name, condition in plan.recipe.select.where.items():
        rules.append(f"when not coalesce(({condition}\n), false) then ('where', {literal(name)}, {literal(condition)})")
    best = "".join(f"({e}\n) desc nulls last, " for e in plan.recipe.select.dedup.best)
    exact = "true" if plan.recipe.select.dedup.exact else "false"
    return f"""
        create temp table "{VERDICTS}" as
        with judged as (
            select rows.row_id, rows.image_id, case {" ".join(rules)} end as verdict,
                   row_number() over (order by {best}{TIES}) as rank
            from {_joined(plan)}
        ), firsts as (
            select *, first(row_id) over same as first_id, row_number() over same as nth
            from judged window same as (partition by image_id, verdict is null order by rank)
        )
        select row_id, rank,
               case when verdict is not null then verdict[1] when {exact} and nth > 1 then 'duplicate' end as stage,
               case when verdict is not null then verdict[2] when {exact} and nth > 1 then 'duplicate_exact' end as reason,
               case when verdict is not null then verdict[3] when {exact} and nth > 1 then 'the same bytes' end as detail,
               case when verdict is null and {exact} and nth > 1 then first_id end as survivor,
               case when verdict is null and {exact} and nth > 1 then 0 end::integer as distance
        from firsts"""


def _near(plan: Plan, connection: duckdb.DuckDBPyConnection) -> None:
    """Near duplicates by picture, then by text among those that stayed."""
    dedup = plan.recipe.select.dedup
    if dedup.perceptual is not None:
        table = _standing(connection, "phash", "hash")
        found = near_duplicates(table["hash"].to_numpy(), dedup.perceptual.bits)
        _drop(connection, table["row_id"], found, "duplicate_near", "of 64 bits differ")
    if dedup.text is not None:
        table = _standing(connection, dedup.text.annotator, "minhash")
        found = near_texts(table["minhash"], dedup.text.similarity)
        _drop(connection, table["row_id"], found, "duplicate_text", "places of the caption's MinHash differ")


def _standing(connection: duckdb.DuckDBPyConnection, annotator: str, column: str) -> pa.Table:
    """The rows that stand so far, best first, with a column of theirs."""
    return connection.sql(
        f"""select row_id, {column} from "{VERDICTS}" join {identifier(annotator)} using (row_id)
        where reason is null order by rank"""
    ).to_arrow_table()


def _drop(
    connection: duckdb.DuckDBPyConnection, ids: pa.ChunkedArray, found: NearDuplicates, reason: str, unit: str
) -> None:
    fell = pa.table(
        {
            "row_id": ids.take(pa.array(found.dropped)),
            "survivor": ids.take(pa.array(found.survivor)),
            "distance": pa.array(found.distance, pa.int32()),
        }
    )
    connection.register(NEAR, fell)
    connection.execute(
        f"""update "{VERDICTS}" v set stage = 'duplicate', reason = {literal(reason)}, survivor = n.survivor,
           distance = n.distance, detail = n.distance || {literal(" " + unit)}
           from "{NEAR}" n where v.row_id = n.row_id"""
    )
    connection.unregister(NEAR)


def light(annotator: Annotator) -> list[str]:
    """The columns that selections carry: all but the heavy ones, which stay in the lake."""
    names = [n for n in annotator.columns.names if n not in annotator.heavy]
    if not names:
        raise TypeError(f"annotator {annotator.name} needs a column that is not heavy, to be seen in selections")
    return names


def _struct(annotator: Annotator) -> str:
    name = identifier(annotator.name)
    fields = ", ".join(f"{identifier(c)} := {name}.{identifier(c)}" for c in light(annotator))
    return f"struct_pack({fields}) as {name}"
