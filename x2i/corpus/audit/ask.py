"""Small helpers to put questions to a corpus in SQL, with bounded answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from x2i.base.sql import literal

if TYPE_CHECKING:
    from x2i.corpus.corpus import Corpus

#: Longest text that is carried into a report, in characters.
CHARS = 600

#: What a report says of a row. Texts are cut: a row of the web may carry megabytes.
FACTS = f"""row_id, source, unit, "index", location, left(text, {CHARS}) as text, image.format as format,
    image.width as width, image.height as height, image.mode as mode, image.bits as bits,
    image.orientation as orientation, image.frames as frames, image.icc as icc, image.bytes as bytes,
    kept, stage, reason, left(detail, {CHARS}) as detail, survivor, distance"""

#: A fixed order that has nothing to do with a row's values, for a row's id is a digest.
SHUFFLED = "row_id"


def ask(corpus: Corpus, query: str) -> list[dict[str, Any]]:
    """The answer as a list of rows; the query bounds their number. Raises duckdb.Error."""
    relation = corpus.sql(query)
    names = relation.columns
    return [dict(zip(names, row, strict=True)) for row in relation.fetchall()]


def rows(corpus: Corpus, where: str, order: str, limit: int, value: str = "null::double") -> list[dict[str, Any]]:
    """The first `limit` rows of the selection, with FACTS and `value`. The conditions are SQL over `selection as rows`.

    Two steps, so that texts are read of these rows alone.
    """
    first = ask(
        corpus, f"select row_id, {value} as value from selection as rows where {where} order by {order} limit {limit}"
    )
    facts = by_id(corpus, [r["row_id"] for r in first])
    return [facts[r["row_id"]] | {"value": r["value"]} for r in first]


def by_id(corpus: Corpus, row_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """FACTS of these rows, by row_id."""
    wanted = one_of(row_ids)
    return {r["row_id"]: r for r in ask(corpus, f"select {FACTS} from selection where row_id in {wanted}")}


def one_of(values: Iterable[str]) -> str:
    """The right side of `in`, also for no values at all."""
    return "(" + ", ".join(literal(v) for v in values) + ")" if (values := list(values)) else "(null)"
