"""Names in captions, for subjects that are known by name: one spelling for each, and which rows mention which.

OmniGen's web images (arXiv 2409.11340, section 3) begin so: named entities of captions, the frequent ones, a judge, then
the names that occur together. Here the counting is DuckDB's; Python sees each different spelling once.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from x2i.base.sql import identifier, literal

if TYPE_CHECKING:
    import duckdb

#: The table that `mentions` makes.
MENTIONS = "x2i mentions"

#: What stands before a name and is no part of it; "king" or "pope" would say which Charles or Francis is meant.
_TITLES = (
    "mr mrs ms miss mx dr prof professor sir dame rev reverend hon president senator governor mayor minister chancellor "
    "ambassador justice general colonel major captain lieutenant sergeant coach actor actress singer director author"
)
TITLES = frozenset(_TITLES.split())
_POSSESSIVE = re.compile(r"(?:['’`´]s|(?<=s)['’])$", re.IGNORECASE)
_EDGES = " \t\r\n\"'“”‘’«»()[]{}<>.,;:!?*_#@|/\\–—-"


def normalise(name: str) -> str:
    """A name as it is counted: NFKC, lower case, single spaces, without titles, a leading "the" or a possessive 's.

    `Dr. Ada  Lovelace’s` is `ada lovelace`. Initials keep their letters and lose their full stops. Empty where less
    than two letters are left (one is a name in scripts beyond ASCII); a title alone stays (`the Mayor`: `mayor`).
    """
    text = unicodedata.normalize("NFKC", name).strip(_EDGES)
    text = _POSSESSIVE.sub("", text).strip(_EDGES).casefold()
    words = [w for w in (part.strip(_EDGES) for part in re.sub(r"\.(?=\S)", ". ", text).split()) if w]
    if len(words) > 1 and words[0] == "the":
        words = words[1:]
    while len(words) > 1 and words[0] in TITLES:
        words = words[1:]
    return " ".join(words) if sum(c.isalpha() for w in words for c in w) > 1 or not all(map(str.isascii, words)) else ""


def is_part(short: str, long: str) -> bool:
    """Whether a normalised name is the first or last words of a longer one: `lovelace` of `ada lovelace`."""
    return short != long and (long.endswith(f" {short}") or long.startswith(f"{short} "))


@dataclass(frozen=True)
class Name:
    """A name that captions have: how most of them spell it, what the pipeline mostly says that it is, in how many pictures."""

    key: str
    spelling: str
    label: str
    images: int


def mentions(connection: duckdb.DuckDBPyConnection, annotator: str, labels: Collection[str]) -> None:
    """Make the table `MENTIONS`: row_id, image_id, name, `nth` (in the order of the caption), once per row and name.

    A name that is part of a longer one in the same caption ("Lovelace" after "Ada Lovelace") is that one.

    Args:
        connection: with `kept`, which has a struct `annotator` of the kind `entities`.
        labels: which entities count, e.g. PERSON.
    """
    if not labels:
        raise ValueError("labels: none")
    wanted = ", ".join(literal(label) for label in sorted(labels))
    connection.execute(
        f"""create or replace temp table "x2i said" as
            select row_id, image_id, e.text as raw, e.label as label, e.start as start
            from (select row_id, image_id, unnest({identifier(annotator)}.entities) as e from kept)
            where e.label in ({wanted})"""
    )
    raws = connection.execute('select distinct raw from "x2i said" order by raw').fetchnumpy()["raw"].tolist()
    spelled = pa.table({"raw": pa.array(raws, pa.string()), "name": pa.array(map(normalise, raws), pa.string())})
    connection.register("x2i spelled", spelled)
    connection.execute(
        f"""create or replace temp table "x2i named" as
            select s.*, n.name from "x2i said" s join "x2i spelled" n using (raw) where n.name <> '';
            create or replace temp table "{MENTIONS}" as
            with once as (select row_id, image_id, name, min(start) as start from "x2i named" group by all)
            select row_id, image_id, name, row_number() over (partition by row_id order by start, name) as nth
            from once a where not exists (
                select 1 from once b where a.row_id = b.row_id and a.name <> b.name
                and (ends_with(b.name, ' ' || a.name) or starts_with(b.name, a.name || ' ')))"""
    )
    connection.unregister("x2i spelled")


def names(connection: duckdb.DuckDBPyConnection, min_images: int, max_images: int | None = None) -> list[Name]:
    """The names of `MENTIONS` in at least (and at most) so many pictures, the most frequent first."""
    most = "" if max_images is None else f" and count(distinct image_id) <= {int(max_images)}"
    found = connection.execute(
        f"""with frequent as (
                select name, count(distinct image_id) as images from "{MENTIONS}" group by name
                having count(distinct image_id) >= {int(min_images)}{most}
            ), spellings as (
                select name, raw, label, count(*) as times from "x2i named" semi join frequent using (name) group by all
            )
            select name, (select raw from spellings s where s.name = f.name order by times desc, raw limit 1),
                   (select label from spellings s where s.name = f.name
                    group by label order by sum(times) desc, label limit 1), images
            from frequent f order by images desc, name"""
    ).fetchall()
    return [Name(key, _shown(raw), label, images) for key, raw, label, images in found]


def _shown(raw: str) -> str:
    """A spelling for people: as it stands, without what surrounds it."""
    return _POSSESSIVE.sub("", " ".join(raw.split()).strip(_EDGES))
