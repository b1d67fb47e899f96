"""The recipe's SQL asked again of `selection.parquet`, where an annotator's columns lie in a struct of its name.

While a corpus is selected, expressions see a table `rows` and one per annotator. The same tables are cut out
of the selection here, so that every expression means what it meant then, bare column names too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from x2i.base.sql import identifier, literal
from x2i.corpus.lake import ROWS

if TYPE_CHECKING:
    import duckdb


def said(table: str) -> str:
    """What tells apart rows with the same picture that are samples already: SQL, null for rows that are not.

    Two published edits may end in the same picture, and one picture may be talked of in several conversations.
    """
    told = [f"{table}.text", f"array_to_string({table}.inputs, ' ')"]
    told += [f"{table}.meta ->> '$.{name}'" for name in ("messages", "rejected_response")]
    ready = f"len({table}.inputs) > 0 or contains({table}.meta, '\"messages\":')"
    return f"case when {ready} then md5(concat_ws(chr(0), {', '.join(told)})) end"


def scope(annotators: Sequence[str], table: str) -> str:
    """What follows `from`: `rows` and a table per annotator, out of `table`, which has the selection's columns."""
    rows = ", ".join(identifier(name) for name in ROWS.names)
    joins = [f"(select {rows} from {table}) rows"]
    joins += [
        f"join (select row_id, unnest({identifier(name)}) from {table}) {identifier(name)} using (row_id)"
        for name in annotators
    ]
    return " ".join(joins)


def columns_in(connection: duckdb.DuckDBPyConnection, expression: str) -> list[tuple[str, ...]]:
    """The columns that an SQL expression names, in order, as DuckDB's own parser sees them; each once."""
    statement = literal(f"select ({expression}\n)")
    (text,) = connection.sql(f"select json_serialize_sql({statement}::varchar)").fetchall()[0]
    return list(dict.fromkeys(_references(json.loads(text))))


def _references(node: Any) -> Iterator[tuple[str, ...]]:
    if isinstance(node, dict):
        if node.get("class") == "COLUMN_REF":
            yield tuple(node["column_names"])
        for child in node.values():
            yield from _references(child)
    elif isinstance(node, list):
        for child in node:
            yield from _references(child)


def quota_said(quota: Mapping[str, Any]) -> str:
    """A quota of a recipe in words."""
    by, most, share, others = (quota[name] for name in ("by", "most", "share", "others"))
    group = f"rows of each {by}" if by else "rows in all"
    rest = "" if others is None else f", {others} of any other"
    if isinstance(most, dict):
        return f"of the {group}, at most {', '.join(f'{n} of {v}' for v, n in most.items())}{rest}"
    if isinstance(share, dict):
        return f"{group}: {', '.join(f'{v} {p:g}' for v, p in share.items())} to each other{rest}"
    return f"as many {group} as of the rarest" if share == "equal" else f"at most {most} {group}"
