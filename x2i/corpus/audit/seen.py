"""What annotators saw in pictures that stayed: boxes, people's joints, labels, for the report to draw.

Columns are told by name and type, as `selection.parquet` has them: `boxes` (x1, y1, x2, y2 as shares of the upright
picture) with what they hold and how sure the model was in lists beside them; `people` with `keypoints`; `labels` or
`top` of a whole picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from x2i.base.sql import identifier
from x2i.corpus.audit.ask import SHUFFLED, ask, one_of, rows
from x2i.corpus.audit.evidence import Row

if TYPE_CHECKING:
    from x2i.corpus.corpus import Corpus

#: Boxes or people drawn in one picture, and labels told of one.
MARKS, LABELS = 12, 5
#: Lists beside `boxes`, the first that is there counts: what a box holds, and how sure that is.
_NAMES = ("phrases", "labels", "texts")
_SURENESS = ("scores", "confidence", "predicted_iou")

Point = tuple[float, float]


@dataclass(frozen=True)
class Mark:
    """One thing seen. Places are shares of the picture's sides; a joint that was not found is None."""

    label: str | None
    score: float | None
    box: tuple[float, float, float, float] | None = None
    joints: tuple[Point | None, ...] = ()


@dataclass(frozen=True)
class Look:
    """One picture with its marks, `further` of which are left out. `layout` says which joints are which."""

    row: Row
    marks: tuple[Mark, ...]
    further: int = 0
    layout: str | None = None


@dataclass(frozen=True)
class Seen:
    """One annotator: what it gives (`boxes`, `people` or `labels`), in how many of the rows that stayed and it judged."""

    annotator: str
    what: str
    judged: int
    found: int
    marks: int
    looks: list[Look]


def seen(corpus: Corpus, count: int) -> list[Seen]:
    """Every annotator with such columns, in the recipe's order, with `count` rows where it saw something."""
    kinds = {f.name: f.type for f in corpus.sql("select * from selection limit 0").to_arrow_table().schema}
    out = []
    for annotator in corpus.info["annotators"]:
        kind = kinds.get(annotator["name"], pa.null())
        if (what := showable(kind)) is not None:
            out.append(_seen(corpus, annotator["name"], what, {f.name: f.type for f in kind}, count))
    return out


def showable(kind: pa.DataType) -> str | None:
    """The column of an annotator's struct that can be shown: people, boxes, labels or top; None if there is none."""
    columns = {f.name: f.type for f in kind} if pa.types.is_struct(kind) else {}
    if _holds(columns.get("people"), _is_person):
        return "people"
    if _holds(columns.get("boxes"), lambda box: _holds(box, pa.types.is_floating)):
        return "boxes"
    if _holds(columns.get("labels"), lambda label: _is_text(label) or _is_area(label)):
        return "labels"
    return "top" if _is_text(columns.get("top")) else None


def _holds(kind: pa.DataType | None, inner: Any) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return kind is not None and any(is_one(kind) for is_one in lists) and bool(inner(kind.value_type))


def _is_text(kind: pa.DataType | None) -> bool:
    return kind is not None and (pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_area(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("name") >= 0 and kind.get_field_index("area") >= 0


def _is_person(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("keypoints") >= 0


def _seen(corpus: Corpus, name: str, what: str, columns: dict[str, pa.DataType], count: int) -> Seen:
    def column(of: str) -> str:
        return f"{identifier(name)}.{identifier(of)}"

    def beside(names: tuple[str, ...], is_one: Any) -> str:
        there = next((n for n in names if _holds(columns.get(n), is_one)), None)
        return "null" if there is None else f"{column(there)}[1:{most}]"

    most = LABELS if what == "labels" else MARKS
    size = f"({column('top')} is not null)::integer" if what == "top" else f"len({column(what)})"
    (total,) = ask(
        corpus,
        f"""select count(*) filter ({column(what)} is not null) as judged, count(*) filter ({size} > 0) as found,
                   coalesce(sum({size}), 0)::bigint as marks from selection where kept""",
    )
    chosen = rows(corpus, f"kept and {size} > 0", SHUFFLED, count)
    values, labels, scores = (
        f"{column(what)}[1:{most}]",
        beside(_NAMES, _is_text),
        beside(_SURENESS, pa.types.is_floating),
    )
    if what == "top":
        values = labels = f"[{column('top')}]"
        scores = f"[{column('top_score')}]" if "top_score" in columns else "null"
    elif what == "labels" and _holds(columns["labels"], _is_area):  # classes of a map, and their shares of it
        scores = f"[x.area for x in {values}]"
        values = labels = f"[x.name for x in {values}]"
    layout = column("layout") if _is_text(columns.get("layout")) else "null"
    found = ask(
        corpus,
        f"""select row_id, {size} as size, {values} as "values", {labels} as labels, {scores} as scores, {layout} as layout
            from selection where row_id in {one_of(r["row_id"] for r in chosen)}""",
    )
    by_row = {f["row_id"]: f for f in found}
    looks = [_look(row, what, by_row[row["row_id"]]) for row in chosen]
    return Seen(name, "labels" if what == "top" else what, total["judged"], total["found"], total["marks"], looks)


def _look(row: Row, what: str, found: dict[str, Any]) -> Look:
    marks = tuple(_people(found["values"]) if what == "people" else _marks(what, found))
    return Look(row, marks, found["size"] - len(found["values"]), found["layout"])


def _marks(what: str, found: dict[str, Any]) -> Iterator[Mark]:
    values = found["values"]

    def beside(name: str) -> list[Any]:
        there = found[name]
        return there if there is not None and len(there) == len(values) else [None] * len(values)

    for value, label, score in zip(values, beside("labels"), beside("scores"), strict=True):
        box = _box(value) if what == "boxes" else None
        if what != "boxes" or box is not None:
            yield Mark(label, _finite(score), box)


def _people(people: list[dict[str, Any]]) -> Iterator[Mark]:
    for person in filter(None, people):
        joints = tuple(_point(k) for k in person["keypoints"] or ())
        yield Mark("person", _finite(person.get("score")), _box(person.get("box")), joints)


def _box(value: Any) -> tuple[float, float, float, float] | None:
    """Four shares of the picture's sides, or None for what is no box: a corpus may be anybody's."""
    if value is None or len(value) != 4 or any(_finite(v) is None for v in value):
        return None
    x1, y1, x2, y2 = (min(1.0, max(0.0, float(v))) for v in value)
    return (x1, y1, x2, y2) if x1 <= x2 and y1 <= y2 else None


def _point(keypoint: dict[str, Any] | None) -> Point | None:
    x, y = (_finite((keypoint or {}).get(name)) for name in ("x", "y"))
    return None if x is None or y is None else (x, y)


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
