"""Boxes: x1, y1, x2, y2 as shares, 0 to 1, of a picture's width and height."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Box = tuple[float, float, float, float]

#: How near a picture's edge (a share of the side) a box touches it.
_TOUCH = 0.005


def place(entry: Any) -> tuple[Box, float, tuple[int, int] | None] | None:
    """A box, its score and its characters: of [x1, y1, x2, y2], of a struct with `box` and `score`, or of GRIT's lists.

    Returns:
        None where an entry, which may be anything, is none of these.
    """
    values = entry.get("box") if isinstance(entry, Mapping) else entry
    if not isinstance(values, list | tuple) or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
        return None
    span, score = None, entry.get("score") if isinstance(entry, Mapping) else 1.0
    if len(values) == 7:
        start, end, *values, score = values
        span = int(start), int(end)
    if len(values) != 4 or not isinstance(score, int | float) or not math.isfinite(score):
        return None
    x1, y1, x2, y2 = (min(1.0, max(0.0, float(v))) for v in values)
    return (x1, y1, x2, y2), float(score), span


def area(box: Sequence[float]) -> float:
    """A box's share of the picture."""
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def nested(first: Sequence[float], second: Sequence[float]) -> float:
    """The share of the smaller of two boxes that lies in the other."""
    left, top = max(first[0], second[0]), max(first[1], second[1])
    both = area((left, top, min(first[2], second[2]), min(first[3], second[3])))
    return both / max(min(area(first), area(second)), 1e-9)


def edges(box: Sequence[float]) -> int:
    """How many of the picture's four edges a box touches."""
    return sum(v <= _TOUCH for v in box[:2]) + sum(v >= 1 - _TOUCH for v in box[2:])


def pixel_box(box: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box in whole pixels of a picture of size (width, height), x1, y1, x2, y2 (the last two excluded).

    It is at least one pixel large.
    """
    (x1, x2), (y1, y2) = (
        (min(round(box[i] * n), n - 1), max(round(box[i + 2] * n), min(round(box[i] * n), n - 1) + 1))
        for i, n in enumerate(size)
    )
    return x1, y1, x2, y2
