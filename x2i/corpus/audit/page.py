"""The page: what was gathered, poured into `report.html.jinja`. Every text is escaped by the template engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from x2i.corpus.audit import charts
from x2i.corpus.audit.evidence import Duplicates, Judged, PutRight, Quarantine, put_right_in
from x2i.corpus.audit.gallery import Gallery
from x2i.corpus.audit.limits import Benchmark, Quota
from x2i.corpus.audit.overlay import colour, overlay
from x2i.corpus.audit.pictures import data_uri
from x2i.corpus.audit.scores import Score, Value
from x2i.corpus.audit.seen import Seen


@dataclass(frozen=True)
class Step:
    """One step of the funnel: `fell` of `before` rows left it here. `note` says what the rule is."""

    stage: str
    reason: str
    note: str
    before: int
    fell: int
    target: str  # the section that shows such rows


@dataclass(frozen=True)
class Report:
    """All that a report shows. `pictures` are thumbnails by row_id; `unreachable` counts those that are missing."""

    info: dict[str, Any]
    checks: list[tuple[bool, str]]
    steps: list[Step]
    sources: list[dict[str, Any]]
    galleries: list[Gallery]
    judged: list[Judged]
    scores: list[Score]
    not_drawn: list[str]
    seen: list[Seen]
    duplicates: Duplicates
    benchmarks: list[Benchmark]
    quotas: list[Quota]
    put_right: PutRight
    quarantine: Quarantine
    pictures: Mapping[str, bytes]
    unreachable: int

    @property
    def made(self) -> list[str]:
        """The task types that have samples."""
        return [name for name, task in self.info["tasks"].items() if task["made"]]

    @property
    def distance_values(self) -> list[Value]:
        """The distances of near duplicates, as bars."""
        return [Value(str(bits), 0, rows) for bits, rows in self.duplicates.distances.items()]


def render(report: Report) -> str:
    """The report as one HTML document that loads nothing."""
    environment = Environment(
        loader=PackageLoader("x2i.corpus.audit", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": charts.number, "size": _size, "percent": _percent, "slug": _slug}
    template = environment.get_template("report.html.jinja")
    return template.render(
        report=report,
        info=report.info,
        counts=report.info["counts"],
        band=charts.band,
        histogram=charts.histogram,
        difference=charts.difference,
        overlay=overlay,
        colour=colour,
        put_right_in=put_right_in,
        picture=lambda row_id: data_uri(report.pictures.get(row_id)),
        data_uri=data_uri,
        recipe=yaml.safe_dump(report.info.get("recipe", {}), sort_keys=False, allow_unicode=True),
    )


def _size(count: float | None) -> str:
    """Bytes for people."""
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 0.01:
        return "< 0.01 %"
    return f"{share:.{0 if share in (0, 100) else 2 if share < 1 else 1}f} %"


def _slug(text: str) -> str:
    """A fragment identifier: letters, digits, - and _ stay."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else f".{ord(c):x}" for c in str(text))
