"""The thresholds within a recipe's conditions, found in DuckDB's own syntax tree.

`nsfw.score < 0.5 and quality.sharpness between 30 and 1e4` holds three: an expression, a side, a constant
each. What lies nearest to them, on either side, is what a person should look at before trusting them.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from x2i.base.sql import literal
from x2i.corpus.lake import ROWS

if TYPE_CHECKING:
    from x2i.corpus.corpus import Corpus

#: DuckDB's names of comparisons, as written, with the sides swapped, and negated.
_SIGNS = {
    "COMPARE_GREATERTHAN": ">",
    "COMPARE_GREATERTHANOREQUALTO": ">=",
    "COMPARE_LESSTHAN": "<",
    "COMPARE_LESSTHANOREQUALTO": "<=",
}
_SWAPPED = {">": "<", ">=": "<=", "<": ">", "<=": ">="}
_NEGATED = {">": "<=", ">=": "<", "<": ">=", "<=": ">"}


@dataclass(frozen=True)
class Threshold:
    """`expression sign value`, as a row must have it to pass. `expression` is SQL over `selection as rows`.

    `column` is `annotator.column` where the expression is that alone.
    """

    expression: str
    sign: str
    value: float
    column: str | None

    @property
    def holds(self) -> str:
        """SQL: whether a row passes; false where the expression is null."""
        return f"coalesce(({self.expression}) {self.sign} {self.value!r}, false)"


@dataclass(frozen=True)
class Condition:
    """One entry of the recipe's `select.where`. `sql` runs over `selection as rows`; None where it cannot."""

    name: str
    text: str
    sql: str | None
    thresholds: tuple[Threshold, ...]


def conditions(corpus: Corpus) -> list[Condition]:
    """The recipe's conditions, in order, each with the thresholds that can be told from it."""
    where = corpus.info.get("recipe", {}).get("select", {}).get("where", {})
    owners: dict[str, list[str]] = {}
    for annotator in corpus.info["annotators"]:
        for column in annotator["columns"]:
            owners.setdefault(column, []).append(annotator["name"])
    return [_condition(corpus, name, text, owners) for name, text in where.items()]


def _condition(corpus: Corpus, name: str, text: str, owners: dict[str, list[str]]) -> Condition:
    import duckdb

    try:
        (serialized,) = corpus.sql(
            f"select json_serialize_sql({literal(f'select ({text}{chr(10)})')}::varchar)"
        ).fetchall()[0]
        statement = json.loads(serialized)
        if statement.get("error") or len(statement["statements"]) != 1:
            return Condition(name, text, None, ())
        tree = _Tree(corpus, statement)
        (root,) = statement["statements"][0]["node"]["select_list"]
        _qualify(root, owners)
        sql = tree.sql(root)
        corpus.sql(f"select ({sql}) from selection as rows limit 0")  # raises if it does not run over the selection
        return Condition(name, text, sql, tuple(tree.thresholds(root, negated=False)))
    except duckdb.Error:
        return Condition(name, text, None, ())


def _qualify(node: Any, owners: dict[str, list[str]]) -> None:
    """Name the annotator of bare columns: in the lake it is a table, in the selection a struct."""
    if isinstance(node, list):
        for child in node:
            _qualify(child, owners)
    elif isinstance(node, dict):
        names = node.get("column_names")
        if node.get("class") == "COLUMN_REF" and isinstance(names, list) and len(names) == 1:
            owner = owners.get(names[0], [])
            if names[0] not in ROWS.names and len(owner) == 1:
                node["column_names"] = [owner[0], names[0]]
        for child in node.values():
            _qualify(child, owners)


class _Tree:
    """Walks a statement's tree; expressions go back to SQL through DuckDB, so no dialect is spoken here."""

    def __init__(self, corpus: Corpus, statement: dict[str, Any]) -> None:
        self._corpus = corpus
        self._statement = copy.deepcopy(statement)

    def sql(self, node: dict[str, Any]) -> str:
        """The expression as SQL."""
        self._statement["statements"][0]["node"]["select_list"] = [node]
        text = literal(json.dumps(self._statement))
        (select,) = self._corpus.sql(f"select json_deserialize_sql({text}::json)").fetchall()[0]
        return str(select).removeprefix("SELECT ")

    def thresholds(self, node: dict[str, Any], negated: bool) -> Iterator[Threshold]:
        """Those that a row must keep *all* of: what hangs on an `or` is no threshold by itself."""
        kind = node["type"]
        if kind == ("CONJUNCTION_OR" if negated else "CONJUNCTION_AND"):
            for child in node["children"]:
                yield from self.thresholds(child, negated)
        elif kind == "OPERATOR_NOT":
            yield from self.thresholds(node["children"][0], not negated)
        elif kind == "COMPARE_BETWEEN" and not negated:
            yield from self._threshold(node["input"], ">=", node["lower"])
            yield from self._threshold(node["input"], "<=", node["upper"])
        elif kind in _SIGNS:
            sign = _NEGATED[_SIGNS[kind]] if negated else _SIGNS[kind]
            yield from self._threshold(node["left"], sign, node["right"])

    def _threshold(self, left: dict[str, Any], sign: str, right: dict[str, Any]) -> Iterator[Threshold]:
        values = self._constant(left), self._constant(right)
        if values[0] is None and values[1] is not None:
            expression, value = left, values[1]
        elif values[1] is None and values[0] is not None:
            expression, value, sign = right, values[0], _SWAPPED[sign]
        else:
            return
        names = expression.get("column_names") if expression["class"] == "COLUMN_REF" else None
        yield Threshold(self.sql(expression), sign, value, ".".join(names) if names and len(names) == 2 else None)

    def _constant(self, node: dict[str, Any]) -> float | None:
        """The value of an expression that needs no row, if it is a number."""
        import duckdb

        try:
            (value,) = self._corpus.sql(f"select try_cast(({self.sql(node)}) as double)").fetchall()[0]
        except duckdb.Error:  # it names a column
            return None
        return float(value) if value is not None and math.isfinite(value) else None
