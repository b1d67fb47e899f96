"""Selection as DuckDB queries over the lake: each row kept, or fallen for one stated reason.

The rules act in a fixed order: what the source could not give, what could not be decoded or annotated,
missing text, the recipe's conditions in their order, exact duplicates, near duplicates by picture, then by
caption, quotas. The first
rule that a row breaks is its reason. No image is read and no model runs.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

from x2i.base.errors import RecipeError
from x2i.base.sql import brief, connect, identifier, literal, stumbles
from x2i.corpus.lake import ERRORS, KEYS, ROWS, Lake, create_views, mentioned
from x2i.corpus.rules import said
from x2i.pipelines import annotators as annotator_files
from x2i.pipelines import registry
from x2i.pipelines.select import near, quotas
from x2i.pipelines.select.near import VERDICTS
from x2i.pipelines.select.semantic import Run, inline

if TYPE_CHECKING:
    import duckdb

    from x2i.pipelines.annotators.base import Annotator
    from x2i.pipelines.recipe import Plan

#: How ties between equally good rows are broken, in SQL.
TIES = "rows.image_id, rows.source, rows.location"

#: A table beside the annotators', under a name that no annotator can have.
ORDER = "x2i order"

#: The stages of the funnel, in the order in which rows meet them.
STAGES = ("source", "decode", "text", "where", "contaminated", "duplicate", "quota", "assembly", "forgotten")


def select(plan: Plan, lake: Lake, units: dict[str, list[str]], out: Path, run: Run = inline) -> None:
    """Judge every row, and write the verdicts to `out` (Parquet, in the order of the sources).

    Columns: those of `rows`, a struct per annotator, and `kept`, `stage`, `reason`, `detail`, `survivor`
    (the row that stayed instead of a duplicate), `distance` (in bits of the pHash).

    Args:
        units: unit ids by source fingerprint, in the order of the plan.
        run: how functions over many embeddings are called; by default one after the other, here.
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
    _judged(plan, connection)
    near.apply(plan, lake, connection, out.with_name(f".{out.name}.scratch"), run)
    for name, quota in plan.recipe.select.quotas.items():
        with _stumbling(f"{plan.where}: select.quotas.{name}.by", quota.by or ""):
            quotas.apply(connection, name, quota, plan.recipe.seed, _joined(plan.annotators), VERDICTS)
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
    """Try the recipe's SQL on a row of nulls. Raises RecipeError naming the key and what DuckDB would accept."""
    recipe, where = plan.recipe, plan.where
    connection = connect()
    connection.register("rows", pa.table({f.name: pa.nulls(1, f.type) for f in ROWS}))
    for annotator in plan.annotators:
        condition = annotator.config.where
        if condition is not None:  # it sees rows, and those of the annotators before it that it names
            before = plan.annotators[: plan.annotators.index(annotator)]
            named = mentioned(condition, [a.name for a in before])
            key = f"{where}: annotators.{annotator.name}.where"
            _yes_or_no(connection, plan, condition, key, [a for a in before if a.name in named], "where")
        connection.register(annotator.name, _empty(annotator.columns))
    for annotator in plan.annotators if any(a.heavy for a in plan.annotators) else []:
        connection.unregister(annotator.name)
        connection.register(annotator.name, _empty(pa.schema([annotator.columns.field(n) for n in light(annotator)])))
    for name, condition in recipe.select.where.items():
        _yes_or_no(connection, plan, condition, f"{where}: select.where.{name}", plan.annotators)
    for expression in recipe.select.dedup.best:
        _try(connection, plan, expression, f"{where}: select.dedup.best", plan.annotators)
    for name, quota in recipe.select.quotas.items():
        if quota.by is not None:
            _try(connection, plan, quota.by, f"{where}: select.quotas.{name}.by", plan.annotators)
    near.check(plan)
    _known(plan, recipe.output.scores or (), _countable, f"{where}: output.scores", "numbers, or yes or no")
    _known(plan, recipe.output.carry, _plain, f"{where}: output.carry", "texts, numbers, or yes or no")


def _known(plan: Plan, asked: Sequence[str], fits: Callable[[pa.DataType], bool], key: str, of: str) -> None:
    there = sorted(f"{a.name}.{c}" for a in plan.annotators for c in light(a) if fits(a.columns.field(c).type))
    for column in asked:
        if column not in there:
            raise RecipeError(f"{key}: no column {column!r} of {of}; there are {', '.join(there)}")


def _countable(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _plain(kind: pa.DataType) -> bool:
    """Whether values of this type are texts, numbers, or yes or no."""
    return _countable(kind) or pa.types.is_string(kind)


def _empty(columns: pa.Schema) -> pa.Table:
    """A table of these columns without rows, as DuckDB would read it from the lake: half floats as floats."""

    def as_read(kind: pa.DataType) -> pa.DataType:
        if pa.types.is_float16(kind):
            return pa.float32()
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return pa.list_(as_read(kind.value_type))
        return pa.list_(as_read(kind.value_type), kind.list_size) if pa.types.is_fixed_size_list(kind) else kind

    return pa.schema([*KEYS, *((f.name, as_read(f.type)) for f in columns), *ERRORS]).empty_table()


def _yes_or_no(
    connection: duckdb.DuckDBPyConnection,
    plan: Plan,
    condition: str,
    key: str,
    annotators: Sequence[Annotator],
    clause: Literal["select", "where"] = "select",
) -> None:
    kind = _try(connection, plan, condition, key, annotators, clause)
    if kind != "BOOLEAN":
        raise RecipeError(f"{key}: {condition!r} gives {kind}, not a yes or no")


def _try(
    connection: duckdb.DuckDBPyConnection,
    plan: Plan,
    expression: str,
    key: str,
    annotators: Sequence[Annotator],
    clause: Literal["select", "where"] = "select",
) -> str:
    """Run an expression over a row of nulls, as the clause of a query that it will be in; gives its type."""
    import duckdb

    joined = _joined(annotators)
    try:
        relation = connection.sql(f"select ({expression}\n) as x from {joined}")
        kind = str(relation.types[0])
        relation.fetchall()  # constants that cannot be converted are met only here
        if clause == "select":  # beside a column of its row: no aggregate over all rows can stand there
            connection.sql(f"select rows.row_id, ({expression}\n) as x from {joined}").fetchall()
        if clause == "where" and kind == "BOOLEAN":
            connection.sql(f"select 1 from {joined} where ({expression}\n)").fetchall()
    except duckdb.Error as error:
        if "must appear in the GROUP BY clause" in str(error):
            raise RecipeError(
                f"{key}: {expression!r} has a function over all rows, such as count or max, but each row is judged by itself"
            ) from None
        raise RecipeError(f"{key}: {expression!r}: {brief(error)}{_hint(plan, str(error))}") from None
    if moody := _moody(connection, expression):
        raise RecipeError(
            f"{key}: {expression!r}: {moody} gives another answer every time, so that no build could be repeated; "
            "for a random part of the rows write e.g. hash(rows.row_id) % 100 < 10"
        )
    return kind


def _moody(connection: duckdb.DuckDBPyConnection, expression: str) -> str | None:
    """A function in an expression that gives other values for the same arguments, as `random` does."""
    statement = literal(f"select ({expression}\n)")
    found = connection.execute(
        f"""select function_name from duckdb_functions() where stability <> 'CONSISTENT' and contains(
        json_serialize_sql({statement}::varchar)::varchar, '"function_name":"' || function_name || '"')"""
    ).fetchone()
    return str(found[0]) if found else None


def _hint(plan: Plan, message: str) -> str:
    """What would be right, where DuckDB's message says only what is wrong."""
    tables = {a.name: a.columns.names for a in plan.annotators} | {"rows": ROWS.names}
    if table := re.search(r'Referenced table "(\w+)" not found', message):
        near = [table[1]] * (table[1] in registry.names(annotator_files))
        near = near or difflib.get_close_matches(table[1], tables, n=1)
        hint = f"did you mean {near[0]}?" if near and near[0] in tables else "add it under `annotators`"
        return f" (annotators of this recipe: {', '.join(a.name for a in plan.annotators)}); {hint}"
    if bare := re.search(r'Referenced column "(\w+)" not found', message):
        owners = [f"{name}.{bare[1]}" for name, columns in tables.items() if bare[1] in columns]
        return f"; did you mean {' or '.join(owners)}?" if owners else "; columns are written as annotator.column"
    column = re.search(r'"(\w+)" does not have a column named "(\w+)"', message)
    if column:
        heavy = {a.name: a.heavy for a in plan.annotators}.get(column[1], frozenset())
        if column[2] in heavy:
            return "; it stays in the lake (it is heavy), and selections cannot ask for it"
        there = tables.get(column[1], [])
        near = difflib.get_close_matches(column[2], there, n=1)
        return f"; did you mean {column[1]}.{near[0]}?" if near else f"; it has {', '.join(there)}"
    return ""


def _joined(annotators: Sequence[Annotator]) -> str:
    return "rows " + " ".join(f"left join {identifier(a.name)} using (row_id)" for a in annotators)


def _judged(plan: Plan, connection: duckdb.DuckDBPyConnection) -> None:
    """Make the verdicts. Raises X2IError naming the key whose SQL stumbles over a value, e.g. a text that is no number."""
    import duckdb

    try:
        connection.execute(_judge(plan))
    except (duckdb.DataError, duckdb.InvalidInputException) as error:
        select = plan.recipe.select
        asked = {f"where.{name}": c for name, c in select.where.items()}
        asked |= {f"dedup.best.{i}": e for i, e in enumerate(select.dedup.best)}
        for key, expression in asked.items():
            try:
                connection.sql(f"select count(({expression}\n)) from {_joined(plan.annotators)}").fetchall()
            except (duckdb.DataError, duckdb.InvalidInputException) as culprit:
                raise RecipeError(stumbles(f"{plan.where}: select.{key}", expression, culprit)) from None
        raise error


@contextlib.contextmanager
def _stumbling(key: str, expression: str) -> Iterator[None]:
    """Raise RecipeError naming the key if its SQL stumbles over a value."""
    import duckdb

    try:
        yield
    except (duckdb.DataError, duckdb.InvalidInputException) as error:
        raise RecipeError(stumbles(key, expression, error)) from None


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
            select rows.row_id, rows.image_id, {said("rows")} as said, case {" ".join(rules)} end as verdict,
                   row_number() over (order by {best}{TIES}) as rank
            from {_joined(plan.annotators)}
        ), firsts as (
            select *, first(row_id) over same as first_id, row_number() over same as nth
            from judged window same as (partition by image_id, said, verdict is null order by rank)
        )
        select row_id, rank, said is not null as ready,
               case when verdict is not null then verdict[1] when {exact} and nth > 1 then 'duplicate' end as stage,
               case when verdict is not null then verdict[2] when {exact} and nth > 1 then 'duplicate_exact' end as reason,
               case when verdict is not null then verdict[3] when {exact} and nth > 1 then 'the same bytes' end as detail,
               case when verdict is null and {exact} and nth > 1 then first_id end as survivor,
               case when verdict is null and {exact} and nth > 1 then 0 end::integer as distance
        from firsts"""


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
