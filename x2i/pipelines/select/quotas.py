"""Quotas: how many rows of each source, class, shape or licence stay; and what share of them each task gets.

What stays is drawn by content: each row has a number, the last 8 bytes (little end first) of the MD5 of the recipe's
seed, the quota's name and the image's id, and the rows of a group stay in the order of their numbers. Nothing is
shuffled. Rows that come later take the places of few others, whatever the order in which sources are read, and a
smaller quota keeps a part of what a larger one keeps.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from x2i.base.config import Config
from x2i.base.seeds import digest
from x2i.base.sql import identifier, literal

if TYPE_CHECKING:
    import duckdb

#: Why a sample was not made of a row that a task could serve.
NOT_DRAWN = "not_drawn"

#: Names of tables, which no annotator can have.
_STANDING, _LIMITS = "x2i standing", "x2i limits"

_log = logging.getLogger(__name__)


class Quota(Config):
    """A limit for the rows that have one value of `by` in common; without `by`, for all rows together."""

    by: str | None = Field(
        None,
        description="SQL expression whose values make the groups, e.g. rows.source, classes.top, rights.licence, "
        "aspect(image.width, image.height); null: all rows are one group",
    )
    most: int | dict[str, int] | None = Field(
        None, description="rows of each group that stay, e.g. 1000; or of each value, e.g. {cat: 500, dog: 500}"
    )
    others: int | None = Field(
        None,
        ge=0,
        description="rows of each group that `most` or `share` does not name, e.g. 0; null: all of them stay with "
        "`most`, none with `share`",
    )
    share: Literal["equal"] | dict[str, float] | None = Field(
        None,
        description="what the groups are to be to each other: `equal`, or parts by value, e.g. {web: 7, books: 3}; as "
        "many rows stay as allow that, and none is taken twice",
    )
    least: int = Field(
        1, ge=1, description="groups of fewer rows than this do not hold the others down with `share: equal`, e.g. 100"
    )

    @field_validator("most", "share", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """YAML reads 1 and true as no texts; DuckDB writes them so."""
        if not isinstance(value, Mapping):
            return value
        return {
            str(k).lower() if isinstance(k, bool) else str(k) if isinstance(k, int) else k: v for k, v in value.items()
        }

    @model_validator(mode="after")
    def _sound(self) -> Quota:
        if (self.most is None) == (self.share is None):
            raise ValueError("give either `most` or `share`")
        counts = [self.most] if isinstance(self.most, int) else list((self.most or {}).values())
        if any(n < 0 for n in counts):
            raise ValueError("`most` cannot be below 0")
        if self.by is None and not isinstance(self.most, int):
            raise ValueError("without `by` there is one group: give `most` as one number")
        named = self.most if self.most is not None else self.share
        if isinstance(named, dict) and not named:
            raise ValueError("names no value")
        if self.others is not None and not isinstance(named, dict):
            raise ValueError("`others` is for values that `most` or `share` does not name, and these name none")
        if isinstance(self.share, dict) and not all(0 < part < float("inf") for part in self.share.values()):
            raise ValueError("the parts of `share` must be above 0")
        return self


def apply(connection: duckdb.DuckDBPyConnection, name: str, quota: Quota, seed: int, rows: str, verdicts: str) -> None:
    """Let the rows that stand beyond a quota fall: stage `quota`, reason `name`.

    Args:
        rows: what follows `from`: `rows`, and the tables that `quota.by` may name.
        verdicts: the table of verdicts (`row_id`, `stage`, `reason`, `detail`), which is changed.
    """
    table, standing = identifier(verdicts), identifier(_STANDING)
    connection.execute(
        f"""create or replace temp table {standing} as
        select rows.row_id, ({quota.by or "'all rows'"}\n)::varchar as value,
               md5_number_lower(concat_ws(chr(0), {literal(seed)}, {literal(name)}, rows.image_id)) as drawn
        from {rows} where rows.row_id in (select row_id from {table} where reason is null)"""
    )
    limits, others = _limits(connection, name, quota)
    connection.register(_LIMITS, limits)
    of = literal(f"{quota.by} = " if quota.by else "")
    connection.execute(
        f"""update {table} v set stage = 'quota', reason = {literal(name)},
            detail = {of} || coalesce(n.value, 'null') || ': ' || n.most || ' of ' || n.there || ' stay'
        from (
            select row_id, value, count(*) over one as there, coalesce(l.most, {others}) as most,
                   row_number() over (one order by drawn, row_id) as nth
            from {standing} left join {identifier(_LIMITS)} l using (value) window one as (partition by value)
        ) n
        where v.row_id = n.row_id and n.nth > n.most"""
    )
    connection.unregister(_LIMITS)
    connection.execute(f"drop table {standing}")


def _limits(connection: duckdb.DuckDBPyConnection, name: str, quota: Quota) -> tuple[pa.Table, str]:
    """The limits of the values that are named (`value`, `most`), and that of the others as SQL, null for none."""
    named: Mapping[str, float] = quota.most if isinstance(quota.most, dict) else {}
    others = "null" if quota.others is None else str(quota.others)
    if isinstance(quota.most, int):
        others = str(quota.most)
    elif quota.share == "equal":
        query = f"select min(n) from (select count(*) as n from {identifier(_STANDING)} group by value) where n >= ?"
        smallest = connection.execute(query, [quota.least]).fetchall()[0][0]
        others = "null" if smallest is None else str(smallest)
    elif quota.share is not None:
        others, named = str(quota.others or 0), quota.share
    there = _count(connection, list(named))
    if missing := [value for value in named if not there.get(value)]:
        _log.warning("select.quotas.%s: no row has the value %s; %s", name, ", ".join(missing), _hint(connection))
    limits = {value: int(n) for value, n in named.items()}
    if isinstance(quota.share, dict):
        limits = shares(quota.share, there)
    table = {"value": pa.array(limits.keys(), pa.string()), "most": pa.array(limits.values(), pa.int64())}
    return pa.table(table), others


def shares(parts: Mapping[str, float], there: Mapping[str, int]) -> dict[str, int]:
    """How many rows of each value stay, so that they are to each other as `parts`, as nearly as whole rows can be.

    Values that no row has do not count; one of the others keeps all its rows.
    """
    wanted = {value: part for value, part in parts.items() if there.get(value)}
    if not wanted:
        return {}
    scale = min(there[value] / part for value, part in wanted.items())
    return {value: min(there[value], int(scale * part + 1e-6)) for value, part in wanted.items()}


def _count(connection: duckdb.DuckDBPyConnection, values: list[str]) -> dict[str, int]:
    query = f"select value, count(*) from {identifier(_STANDING)} where value in (select unnest(?)) group by value"
    return dict(connection.execute(query, [values]).fetchall()) if values else {}


def _hint(connection: duckdb.DuckDBPyConnection) -> str:
    query = f"select value, count(*) as n from {identifier(_STANDING)} group by value order by n desc, value limit 5"
    found = connection.execute(query).fetchall()
    return "the commonest are " + ", ".join(f"{v} ({n})" for v, n in found) if found else "no row stands any more"


def drawn(image_id: str, task_type: str, seed: int, share: float) -> bool:
    """Whether a task gets this image, which that share of all images does. What a share gets, a larger one gets too."""
    return int(digest("draw/1", seed, task_type, image_id)[:13], 16) < share * 16**13
