"""The rows that a report shows: nearest to each threshold, duplicates in pairs, what was put right, the quarantine.

Every list is bounded by its query and drawn in a fixed order; the counts beside it are of all rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from x2i.base.sql import literal
from x2i.corpus.audit.ask import SHUFFLED, ask, by_id, rows
from x2i.corpus.audit.scores import Histogram, histogram
from x2i.corpus.audit.thresholds import Condition, Threshold

if TYPE_CHECKING:
    from x2i.corpus.corpus import Corpus

Row = dict[str, Any]

#: The stages whose rows were never judged: nothing could be read, decoded or made of them.
QUARANTINE = ("source", "decode", "text", "assembly")


#: The cosine that a verdict tells of, in SQL; null where it tells of none.
COSINE = "try_cast(regexp_extract(detail, '^cosine (\\S+)', 1) as double)"


@dataclass(frozen=True)
class Nearest:
    """What lies closest to one threshold. Rows carry `value` besides the facts."""

    threshold: Threshold
    histogram: Histogram | None
    kept: list[Row]
    fell: list[Row]


@dataclass(frozen=True)
class Judged:
    """One condition: how many rows fell for it, and its thresholds; `sample` where it has none."""

    condition: Condition
    fell: int
    failing: int | None  # rows that do not meet it, whichever rule took them first
    nearest: list[Nearest] = field(default_factory=list)
    sample: list[Row] = field(default_factory=list)


def judged(corpus: Corpus, conditions: Sequence[Condition], count: int) -> list[Judged]:
    """Each condition with the `count` rows nearest to its thresholds, on either side."""
    out = []
    for condition in conditions:
        mine = f"not kept and stage = 'where' and reason = {literal(condition.name)}"
        (fell,) = ask(corpus, f"select count(*) as n from selection where {mine}")
        failing = None
        if condition.sql is not None:
            judgeable = "coalesce(stage, '') not in ('source', 'decode') and coalesce(reason, '') <> 'forgotten'"
            query = f"select count(*) as n from selection as rows where {judgeable} and not coalesce(({condition.sql}), false)"
            failing = ask(corpus, query)[0]["n"]
        nearest = [_nearest(corpus, t, mine, count) for t in condition.thresholds]
        sample = [] if nearest else rows(corpus, mine, SHUFFLED, count)
        out.append(Judged(condition, fell["n"], failing, nearest, sample))
    return out


def _nearest(corpus: Corpus, threshold: Threshold, mine: str, count: int) -> Nearest:
    value = f"try_cast(({threshold.expression}) as double)"

    def closest(where: str) -> list[Row]:
        order = f"abs({value} - {threshold.value!r}), row_id"
        return rows(corpus, f"{where} and isfinite({value})", order, count, value)

    return Nearest(
        threshold,
        histogram(corpus, threshold.expression, [threshold.value]),
        closest("kept"),
        closest(f"{mine} and not {threshold.holds}"),
    )


@dataclass(frozen=True)
class Pair:
    """A duplicate and the row that stayed in its place (None if the selection does not hold it)."""

    dropped: Row
    survivor: Row | None


@dataclass(frozen=True)
class Duplicates:
    """How many fell for each reason, some of them as pairs, and how far near duplicates lie apart (bits: rows)."""

    counts: dict[str, int]
    pairs: list[Pair]
    distances: dict[int, int]


def duplicates(corpus: Corpus, count: int) -> Duplicates:
    """The doubtful ones first: the pairs that lie farthest apart."""
    fell = "not kept and stage = 'duplicate'"
    reasons = ask(corpus, f"select reason, count(*) as n from selection where {fell} group by reason order by reason")
    share = -(-count // max(1, len(reasons)))
    dropped: list[Row] = []
    for reason in reasons:
        where = f"{fell} and reason = {literal(reason['reason'])}"
        dropped += rows(corpus, where, f"distance desc nulls last, {COSINE} nulls last, {SHUFFLED}", share)
    dropped.sort(key=lambda r: -(r["distance"] or 0))
    survivors = by_id(corpus, {r["survivor"] for r in dropped if r["survivor"]})
    bits = ask(
        corpus,
        f"""select distance, count(*) as n from selection where {fell} and reason = 'duplicate_near'
            and distance is not null group by distance order by distance limit 65""",
    )
    return Duplicates(
        {r["reason"]: r["n"] for r in reasons},
        [Pair(r, survivors.get(r["survivor"])) for r in dropped],
        {r["distance"]: r["n"] for r in bits},
    )


@dataclass(frozen=True)
class Quarantine:
    """Rows that could not be used: the count for each (stage, reason), and some rows of each."""

    counts: dict[tuple[str, str], int]
    rows: list[Row]


def quarantine(corpus: Corpus, per_reason: int) -> Quarantine:
    """At most `per_reason` rows of every reason, in the order of the funnel."""
    counts = {(f["stage"], f["reason"]): f["rows"] for f in recount(corpus) if f["stage"] in QUARANTINE}
    some: list[Row] = []
    for stage, reason in counts:
        where = f"not kept and stage = {literal(stage)} and reason = {literal(reason)}"
        some += rows(corpus, where, SHUFFLED, per_reason)
    return Quarantine(counts, some)


def recount(corpus: Corpus) -> list[dict[str, Any]]:
    """The funnel, counted again from the verdicts, in the order in which corpus.json has it; strangers last."""
    found = ask(corpus, "select stage, reason, count(*) as rows from selection where not kept group by all")
    order = {(f["stage"], f["reason"]): place for place, f in enumerate(corpus.info["funnel"])}
    found.sort(key=lambda f: (order.get((f["stage"], f["reason"]), len(order)), str(f["stage"]), str(f["reason"])))
    return found


#: What decoding puts right: what it is called, and in which rows (SQL over `image`, the header's facts).
FIXES = {
    "EXIF orientation": "image.orientation <> 1",
    "CMYK": "image.mode = 'CMYK'",
    "more than 8 bits": "image.bits > 8",
    "palette": "image.mode in ('P', 'PA')",
    "transparency": "image.mode in ('RGBA', 'RGBa', 'RGBX', 'LA', 'La', 'PA')",
    "colour profile": "image.icc is not null",
    "animation": "image.frames > 1",
    "other colour models": "image.mode in ('1', 'YCbCr', 'LAB', 'HSV')",
}

_TURNS = {
    2: "mirrored",
    3: "turned by 180°",
    4: "mirrored top to bottom",
    5: "mirrored and turned",
    6: "turned by 90° clockwise",
    7: "mirrored and turned",
    8: "turned by 90° anticlockwise",
}


def put_right_in(row: Row) -> list[tuple[str, str]]:
    """What was put right in one row: (as the file was, as annotators and tasks saw it)."""
    mode, out = row["mode"], []
    if row["orientation"] not in (None, 1):
        out.append((f"EXIF orientation {row['orientation']}", _TURNS.get(row["orientation"], "upright")))
    if (row["bits"] or 8) > 8:
        out.append((f"{row['bits']} bits a channel", "8 bits"))
    if mode in ("P", "PA"):
        out.append(("palette", "RGB, any transparency on white"))
    elif mode in ("RGBA", "RGBa", "RGBX", "LA", "La"):
        out.append((f"{mode} with transparency", "RGB on white"))
    elif mode not in (None, "RGB", "L") and not str(mode).startswith("I"):
        out.append((mode, "RGB"))
    if row["icc"] is not None:
        out.append((f"profile “{row['icc'][:60]}”", "sRGB"))
    if (row["frames"] or 1) > 1:
        out.append((f"{row['frames']} frames", "the first"))
    return out


@dataclass(frozen=True)
class PutRight:
    """For each fix, how many rows it touched and how many of those stayed; and some of them."""

    counts: dict[str, tuple[int, int]]
    rows: list[Row]


def put_right(corpus: Corpus, per_fix: int) -> PutRight:
    """Rows whose picture was not upright 8-bit sRGB in its file, those that stayed first."""
    usable = "coalesce(stage, '') not in ('source', 'decode')"
    columns = ", ".join(
        f"count(*) filter ({sql}) as n{i}, count(*) filter (({sql}) and kept) as k{i}"
        for i, sql in enumerate(FIXES.values())
    )
    (total,) = ask(corpus, f"select {columns} from selection where {usable}")
    counts: dict[str, tuple[int, int]] = {}
    some: dict[str, Row] = {}
    for i, (name, sql) in enumerate(FIXES.items()):
        if not total[f"n{i}"]:
            continue
        counts[name] = (total[f"n{i}"], total[f"k{i}"])
        some.update({r["row_id"]: r for r in rows(corpus, f"{usable} and {sql}", f"kept desc, {SHUFFLED}", per_fix)})
    return PutRight(counts, list(some.values()))


def shown(parts: Iterable[Iterable[Row | None]]) -> list[Row]:
    """Each row once, of all lists."""
    return list({row["row_id"]: row for part in parts for row in part if row is not None}.values())
