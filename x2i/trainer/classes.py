"""Classes of samples by length: those of one class have about as many pictures, and about as much text.

Packed stages draw each class at its share, so that every window of steps has the same lengths (`x2i.trainer.packing`).
A class does not depend on the stage's resolution nor on the model: it is a cell of a grid of numbers of pictures and tokens of text.
The grid's lines are chosen from some of the manifests' row groups, where they leave the least spread within the classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from x2i.trainer.lengths import picture_counts, texts, whole_texts

#: Cells of the grid along pictures and along text. Each costs memory by row group and task.
PICTURES, TEXT = 6, 12

_BINS = 384


@dataclass(frozen=True)
class Classes:
    """A grid: the upper ends of all its columns (pictures) and rows (tokens of text) but the last."""

    pictures: tuple[int, ...] = ()
    text: tuple[int, ...] = ()

    def __len__(self) -> int:
        return (len(self.pictures) + 1) * (len(self.text) + 1)

    def of(self, rows: pa.Table) -> np.ndarray:
        """The class of each row, int64."""
        across, down = _place(picture_counts(rows), self.pictures), _place(whole_texts(rows), self.text)
        return across * (len(self.text) + 1) + down


def classes_of(rows: Sequence[pa.Table]) -> Classes:
    """The grid for manifests of which these are some rows."""
    pictures, text = (np.concatenate([of(part) for part in rows] or [np.zeros(1)]) for of in (picture_counts, texts))
    # roots: long conversations are not to take all the lines from short instructions
    roots = segments(np.sqrt(np.floor(text)), TEXT)
    return Classes(tuple(int(p) for p in segments(pictures, PICTURES)), tuple(round(root**2) for root in roots))


def _place(values: np.ndarray, ends: tuple[int, ...]) -> np.ndarray:
    """The interval of each value; by a table, which is faster than to search."""
    table = np.searchsorted(ends, np.arange(max(ends, default=0) + 2))
    return np.asarray(table[np.minimum(values, len(table) - 1)])


def segments(values: np.ndarray, count: int) -> tuple[float, ...]:
    """Upper ends of all but the last of at most `count` intervals that leave the least sum of squared deviations.

    Optimal in one dimension by dynamic programming (Fisher 1958), over at most `_BINS` different values: quantiles and
    evenly spaced ones, where there are more.
    """
    points, counts = np.unique(np.asarray(values, float), return_counts=True)
    if len(points) > _BINS:
        order = np.sort(values)
        ends = np.union1d(order[np.linspace(0, len(order) - 1, _BINS // 2).astype(int)], _even(points))
        place = np.searchsorted(ends, values)
        counts = np.bincount(place, minlength=len(ends))
        first, second = (np.bincount(place, np.asarray(values, float) ** p, len(ends)) for p in (1, 2))
        points = ends
    else:
        first, second = counts * points, counts * points**2
    if len(points) <= count:
        return tuple(points[:-1].tolist())
    n, s, q = (np.concatenate([[0], np.cumsum(v)]) for v in (counts, first, second))
    weight = n[None] - n[:, None]  # [from, to], the end excluded
    cost = q[None] - q[:, None] - (s[None] - s[:, None]) ** 2 / np.maximum(weight, 1)
    cost[np.tril_indices(len(n))] = np.inf
    best, came = cost[0], []
    for _ in range(count - 1):
        total = best[:, None] + cost
        came.append(total.argmin(0))
        best = total.min(0)
    cuts, at = [], len(n) - 1
    for step in reversed(came):
        at = int(step[at])
        cuts.append(at)
    return tuple(float(points[cut - 1]) for cut in reversed(cuts))


def _even(points: np.ndarray) -> np.ndarray:
    """Of the values, those nearest above evenly spaced ones."""
    return np.asarray(points[np.searchsorted(points, np.linspace(points[0], points[-1], _BINS // 2))])
