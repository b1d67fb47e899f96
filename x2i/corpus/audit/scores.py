"""How the annotators' values are spread: histograms of numbers, counts of words. Counted by DuckDB in one pass each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from x2i.base.sql import identifier
from x2i.corpus.audit.ask import ask
from x2i.corpus.audit.thresholds import Condition, Threshold

if TYPE_CHECKING:
    from x2i.corpus.corpus import Corpus

#: Arrow types that are drawn as numbers. 64 unsigned bits are hashes, whose order says nothing.
NUMERIC = {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "halffloat", "float", "double"}
#: Whole numbers with at most this many different values are drawn as a list of values; most lines of any list.
FEW = 12
#: From this many values on, the farthest half per cent on a side may be swept into the last bar.
MANY = 1000


@dataclass(frozen=True)
class Histogram:
    """Counts of kept and fallen rows in equal bins of [low, high]. `low_open`: values below lie in the first bin."""

    low: float
    high: float
    kept: list[int]
    fell: list[int]
    minimum: float
    median: float
    maximum: float
    missing: int
    low_open: bool = False
    high_open: bool = False

    def edges(self, index: int) -> tuple[float, float]:
        """Lower and upper edge of a bin."""
        step = (self.high - self.low) / len(self.kept)
        return self.low + index * step, self.low + (index + 1) * step


@dataclass(frozen=True)
class Value:
    """How many rows have one value."""

    label: str
    kept: int
    fell: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.kept + self.fell


@dataclass(frozen=True)
class Score:
    """One annotator column: a histogram, or a list of its values (the commonest, and how many more there are)."""

    name: str
    thresholds: tuple[Threshold, ...]
    histogram: Histogram | None = None
    values: tuple[Value, ...] = ()
    further: int = 0
    missing: int = 0


def scores(corpus: Corpus, conditions: Sequence[Condition]) -> tuple[list[Score], list[str]]:
    """Every annotator column that can be drawn, in the recipe's order, and the names of those that cannot."""
    drawn: list[Score] = []
    left_out: list[str] = []
    for annotator in corpus.info["annotators"]:
        for column, kind in annotator["columns"].items():
            name = f"{annotator['name']}.{column}"
            score = _score(corpus, name, identifier(annotator["name"], column), kind, conditions)
            if score is None:
                left_out.append(f"{name} ({kind})")
            else:
                drawn.append(score)
    return drawn, left_out


def _score(corpus: Corpus, name: str, sql: str, kind: str, conditions: Sequence[Condition]) -> Score | None:
    numeric = kind in NUMERIC
    if not numeric and kind not in ("string", "large_string", "bool"):
        return None
    thresholds = tuple(t for c in conditions for t in c.thresholds if t.column == name)
    # approximate distinct counts may err by a few per cent: ample for telling categories from everything else
    (shape,) = ask(
        corpus,
        f"select count({sql}) as n, count(*) - count({sql}) as missing, approx_count_distinct({sql}) as d from selection",
    )
    repeats = shape["d"] <= max(3, shape["n"] // 2)
    if not numeric and not (repeats and shape["d"] <= 4 * FEW):
        return None if shape["n"] else Score(name, thresholds, missing=shape["missing"])  # names, hashes, captions
    real = kind in ("float", "double", "halffloat")
    if not numeric or (repeats and shape["d"] <= FEW and not thresholds and not real):
        values, further = _values(corpus, sql)
        return Score(name, thresholds, None, values, further, shape["missing"])
    return Score(name, thresholds, histogram(corpus, sql, [t.value for t in thresholds]), missing=shape["missing"])


def _values(corpus: Corpus, sql: str) -> tuple[tuple[Value, ...], int]:
    rows = ask(
        corpus,
        f"""select left(({sql})::varchar, 60) as label, count(*) filter (kept) as kept,
                   count(*) filter (not kept) as fell, count(*) over () as groups
            from selection where {sql} is not null group by all order by count(*) desc, label limit {FEW}""",
    )
    shown = tuple(Value(r["label"], r["kept"], r["fell"]) for r in rows)
    return shown, (rows[0]["groups"] - len(rows) if rows else 0)


def histogram(corpus: Corpus, sql: str, marks: Sequence[float] = ()) -> Histogram | None:
    """The spread of an expression over `selection as rows`; its range takes in those of `marks` that are not far off.

    Returns:
        None if no row has a finite value. Raises duckdb.Error if the expression is no number.
    """
    values = f"(select try_cast(({sql}) as double) as v, kept from selection as rows)"
    finite = f"(select * from {values} where isfinite(v))"
    (s,) = ask(
        corpus,
        f"""select count(*) as n, min(v) as least, max(v) as most, approx_quantile(v, 0.5) as median,
                   approx_quantile(v, 0.005) as bottom, approx_quantile(v, 0.995) as top from {finite}""",
    )
    if not s["n"]:
        return None
    (total,) = ask(corpus, "select count(*) as n from selection")
    low, high = _range(s, marks)
    bins = min(40, max(12, round(2 * s["n"] ** (1 / 3))))
    step = (high - low) / bins
    counts = ask(
        corpus,
        f"""select greatest(0, least({bins - 1}, floor((v - {low!r}) / {step!r})))::integer as bin,
                   count(*) filter (kept) as kept, count(*) filter (not kept) as fell
            from {finite} group by bin order by bin""",
    )
    kept, fell = [0] * bins, [0] * bins
    for row in counts:
        kept[row["bin"]], fell[row["bin"]] = row["kept"], row["fell"]
    return Histogram(
        low,
        high,
        kept,
        fell,
        s["least"],
        s["median"],
        s["most"],
        total["n"] - s["n"],
        s["least"] < low,
        s["most"] > high,
    )


def _range(s: dict[str, Any], marks: Sequence[float]) -> tuple[float, float]:
    low, high = s["least"], s["most"]
    if s["n"] >= MANY:  # a few far outliers would press everything else into one bar
        spread = s["top"] - s["bottom"]
        if high - s["top"] > spread:
            high = s["top"]
        if s["bottom"] - low > spread:
            low = s["bottom"]
    span = high - low
    for mark in marks:
        if math.isfinite(mark) and (span == 0 or low - 3 * span <= mark <= high + 3 * span):
            low, high = min(low, mark), max(high, mark)
    if low == high:
        low, high = (low - 0.5, high + 0.5) if low == 0 else (low - abs(low) / 10, high + abs(high) / 10)
    step = nice_step(high - low)
    return math.floor(low / step) * step, math.ceil(high / step) * step


def nice_step(span: float, ticks: int = 5) -> float:
    """A step of 1, 2 or 5 times a power of ten that cuts `span` into about `ticks` parts."""
    raw = span / ticks
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if raw <= m * power * (1 + 1e-9))
