"""What is missing from pictures: rectangles, brush strokes. A hole is bool [height, width], true where missing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

#: Brush strokes after which a hole is large enough, whatever was asked.
_MOST_STROKES = 64


def cut(pixels: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """The picture with a black hole; all else keeps its value."""
    out = pixels.copy()
    out[hole] = 0
    return out


def rectangle(size: tuple[int, int], box: Sequence[int]) -> np.ndarray:
    """A rectangle, `box` being x, y, width, height in pixels, in a picture of size (width, height)."""
    x, y, width, height = box
    hole = np.zeros(size[::-1], bool)
    hole[y : y + height, x : x + width] = True
    return hole


def drawn_strokes(size: tuple[int, int], cover: float, brush: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Brush strokes until they cover a share of the picture: `[{"width": w, "points": [[x, y], …]}, …]` in pixels.

    After Yu et al. 2019 (free-form inpainting, arXiv 1806.03589, algorithm 1): a stroke turns a little at each vertex,
    to and fro.

    Args:
        size: (width, height). cover: 0 to 1. brush: greatest width, as a share of the shorter side.
    """
    shorter = min(size)
    strokes: list[dict[str, Any]] = []
    hole = np.zeros(size[::-1], np.uint8)
    while hole.mean() < cover and len(strokes) < _MOST_STROKES:
        place = rng.random(2) * size
        heading, turn = rng.uniform(0, 2 * math.pi), rng.uniform(math.pi / 8, math.pi / 2)
        points = [place]
        for vertex in range(int(rng.integers(3, 9))):
            heading += rng.uniform(0.3, 1) * (turn if vertex % 2 else -turn)
            step = rng.uniform(0.05, 0.25) * shorter
            place = place + step * np.array([math.cos(heading), math.sin(heading)])  # it may leave the picture
            points.append(place)
        width = max(1, round(rng.uniform(brush / 3, brush) * shorter))
        strokes.append({"width": width, "points": np.rint(points).astype(int).tolist()})
        _stroke(hole, strokes[-1])
    return strokes


def painted_strokes(size: tuple[int, int], strokes: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The hole that strokes leave in a picture of size (width, height)."""
    hole = np.zeros(size[::-1], np.uint8)
    for stroke in strokes:
        _stroke(hole, stroke)
    return hole > 0


def _stroke(hole: np.ndarray, stroke: Mapping[str, Any]) -> None:
    points = np.array(stroke["points"], np.int32)
    cv2.polylines(hole, [points], False, 1, stroke["width"])  # OpenCV rounds the ends and the corners of thick lines
