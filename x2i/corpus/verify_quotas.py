"""The recipe's quotas asked again of the selection: which rows each would draw, and which it let fall.

The draw is told by the rows themselves: the last 8 bytes (little end first) of the MD5 of the recipe's seed, the
quota's name and the image's id, joined by zero bytes; of each group the rows with the lowest number stay. Plain DuckDB; nothing of the code that drew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from x2i.base.sql import literal
from x2i.corpus.rules import scope

if TYPE_CHECKING:
    import duckdb

#: Rows that a quota met may have fallen later: to a quota after it, in assembly, or because they were forgotten.
_LATER = "s.kept or s.stage in ('assembly', 'forgotten')"


def quota_queries(select: dict[str, Any], seed: int, structs: Sequence[str], whole: bool) -> list[tuple[str, str]]:
    """For each quota, a query for the ids of rows that fell or stayed against it, and what to say of them.

    Args:
        select: of the recipe. structs: the selection's annotators.
        whole: no row was forgotten; else their values are gone, and it can only be asked whether too many stayed.
    """
    quotas = select.get("quotas", {})
    names = list(quotas)
    queries = []
    for place, (name, quota) in enumerate(quotas.items()):
        if quota["share"] is not None and not whole:
            continue  # what the smallest group held is not known any more
        met = ", ".join(literal(n) for n in names[place:])
        rows = f"select s.* from s where {_LATER} or (s.stage = 'quota' and s.reason in ({met}))"
        wrong = "coalesce(nth > most, false) <> fell" if whole else "there and stay > most"
        problem = f"rows stayed or fell against the quota {name}" if whole else f"rows stayed beyond the quota {name}"
        query = f"""with met as ({rows}), valued as (
                select rows.row_id, ({quota["by"] or "'all rows'"}\n)::varchar as value, rows.image_id
                from {scope(structs, "met")}
            ), counted as (
                select *, count(*) over (partition by value) as size from valued
            ), drawn as (
                select c.row_id, {_limit(quota)} as most,
                       s.stage is not distinct from 'quota' and s.reason is not distinct from {literal(name)} as fell,
                       not fell and s.stage is distinct from 'forgotten' as there,
                       count(*) filter (where there) over (partition by c.value) as stay,
                       row_number() over (partition by c.value order by
                           md5_number_lower(concat_ws(chr(0), {literal(seed)}, {literal(name)}, c.image_id)), c.row_id) as nth
                from counted c join s using (row_id)
            ) select row_id from drawn where {wrong}"""
        queries.append((query, problem))
    return queries


def check_quotas(connection: duckdb.DuckDBPyConnection, queries: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of the queries that the selection can answer."""
    import duckdb

    out = []
    for query, problem in queries:
        try:
            connection.sql(query)  # binds it, and runs nothing
        except duckdb.BinderException:
            continue  # it asks for a column that the selection does not carry
        out.append((query, problem))
    return out


def _limit(quota: dict[str, Any]) -> str:
    """SQL for how many rows of the row's group stay, null for all; `counted` has `value` and `size` of every row's."""
    most, share, others = quota["most"], quota["share"], quota["others"]
    if isinstance(most, int):
        return str(most)
    if isinstance(most, dict):
        return _case({v: str(n) for v, n in most.items()}, "null" if others is None else str(others))
    if share == "equal":
        return f"(select min(size) from counted where size >= {int(quota['least'])})"
    parts = ", ".join(f"({literal(v)}, {part!r}::double)" for v, part in share.items())
    scale = f"(select min(size / part) from counted join (values {parts}) p(value, part) using (value))"
    return _case({v: f"floor({scale} * {part!r} + 1e-6)" for v, part in share.items()}, str(others or 0))


def _case(limits: dict[str, str], others: str) -> str:
    whens = " ".join(f"when {literal(value)} then {limit}" for value, limit in limits.items())
    return f"case c.value {whens} else {others} end"
