"""Whether the subject of one picture is in another: each single photograph is asked for, and the share of yes decides.

OmniGen's web images (arXiv 2409.11340, section 3): for a group photo of two names, InternVL was asked of each single photo
of either whether that person is in the group photo; the pair stayed where the share of yes passed a bound for both.
Who answers is left open here: a model that sees both pictures, or the cosine of two columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import pyarrow as pa

from x2i.base.errors import X2IError
from x2i.base.sql import identifier

if TYPE_CHECKING:
    import duckdb

#: Of pairs (single, photo) of row ids: whether the single's subject is in the photo; None where nobody can say.
Ask = Callable[[Sequence[tuple[str, str]]], Sequence[bool | None]]

#: Candidates whose questions are asked together.
BATCH = 1000


@dataclass(frozen=True)
class Candidate:
    """A photo of some subjects, and single photographs of each, by row id, the best first."""

    photo: str
    subjects: tuple[str, ...]
    singles: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Verified:
    """A candidate that stays: its subjects' shares of yes, and the singles that got one (all, where nobody was asked)."""

    photo: str
    subjects: tuple[str, ...]
    singles: tuple[tuple[str, ...], ...]
    shares: tuple[float, ...] | None = None


def verified(candidates: Iterable[Candidate], ask: Ask | None, min_yes: float) -> Iterator[Verified]:
    """The candidates of which every subject has a share of yes of `min_yes` or more, and at least one yes.

    Questions without an answer do not count. The same pair is asked once per thousand candidates.

    Args:
        ask: None lets everything through.
    """
    waiting = iter(candidates)
    while some := list(islice(waiting, BATCH)):
        if ask is None:
            yield from (Verified(c.photo, c.subjects, c.singles) for c in some)
            continue
        pairs = list(dict.fromkeys((s, c.photo) for c in some for singles in c.singles for s in singles))
        answers = dict(zip(pairs, ask(pairs), strict=True))
        for c in some:
            said = [[answers[s, c.photo] for s in singles] for singles in c.singles]
            shares = [share_of_yes(a) for a in said]
            if all(share is not None and share > 0 and share >= min_yes for share in shares):
                yes = tuple(
                    tuple(s for s, a in zip(singles, mine, strict=True) if a)
                    for singles, mine in zip(c.singles, said, strict=True)
                )
                yield Verified(c.photo, c.subjects, yes, tuple(round(s or 0.0, 4) for s in shares))


def share_of_yes(answers: Sequence[bool | None]) -> float | None:
    """The share of yes among the answers that were given; None where there is none."""
    given = [a for a in answers if a is not None]
    return sum(given) / len(given) if given else None


def by_cosine(connection: duckdb.DuckDBPyConnection, column: str, least: float) -> Ask:
    """Answers by the cosine of a column of embeddings, `annotator.column`: yes from `least`; None where one has none.

    Args:
        connection: with `lake."annotator"`.
    """
    import duckdb

    name, _, part = column.partition(".")
    table, embedding = identifier("lake", name), identifier(part)

    def ask(pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        asked = pa.table(
            {
                "nth": pa.array(range(len(pairs)), pa.int64()),
                "a": pa.array([a for a, _ in pairs], pa.string()),
                "b": pa.array([b for _, b in pairs], pa.string()),
            }
        )
        connection.register("x2i asked", asked)
        try:
            found = connection.execute(
                f"""with embedded as materialized (
                        select row_id, {embedding}::double[] as e from {table}
                        where row_id in (select a from "x2i asked" union select b from "x2i asked")
                    )
                    select round(list_cosine_similarity(x.e, y.e), 9) >= {float(least)}
                    from "x2i asked" p left join embedded x on x.row_id = p.a left join embedded y on y.row_id = p.b
                    order by p.nth"""
            ).fetchall()
        except (duckdb.ConversionException, duckdb.BinderException, duckdb.InvalidInputException) as error:
            raise X2IError(f"verify: {column} gives no cosines ({str(error).splitlines()[0]})") from None
        finally:
            connection.unregister("x2i asked")
        return [answer for (answer,) in found]

    return ask
