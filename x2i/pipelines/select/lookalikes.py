"""Pictures of one subject in different scenes, by features alone: who stands out from what each picture is like anyway.

A plain cosine depends on how crowded the place is: any two street scenes are closer than two photographs of one vase. So
each cosine is told in units of the spread of both pictures' cosines with pictures in general, and the mean of the two
is the score: S-norm, by which speakers are verified (Kenny 2010, "Bayesian speaker verification with heavy-tailed
priors"), with the median and the MAD in place of mean and deviation, which the partners themselves would spoil.
Two pictures pair where each is among the other's best and the score is high enough for a pool of that size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from x2i.base.seeds import digest

#: Pictures that stand for pictures in general, and rows and columns of cosines that are held at a time.
COHORT, ROWS, COLUMNS = 2000, 512, 32_768
#: `least` by default is this often what the best of so many normal draws stands out by: features have heavier tails.
HEAVY = 2.5


@dataclass(frozen=True)
class Pairs:
    """Pairs of rows a < b, int64, by a, then b, and their scores, float64, to 4 digits. `least` is the bound."""

    a: np.ndarray
    b: np.ndarray
    score: np.ndarray
    least: float


def bound(count: int) -> float:
    """The score from which pictures pair in a pool of `count`: 2.5 sqrt(2 ln count).

    sqrt(2 ln n) is what the largest of n standard normal numbers is about; a chance resemblance among more pictures is
    a better one.
    """
    return HEAVY * math.sqrt(2 * math.log(max(2, count)))


def lookalikes(
    embeddings: Sequence[np.ndarray],
    ids: Sequence[str],
    neighbours: int = 5,
    least: float | None = None,
    hashes: np.ndarray | None = None,
    near: int = 8,
) -> Pairs:
    """Pair the pictures that stand out for each other.

    The result does not depend on the order of the rows. Time grows with the square of their number: 1,280 numbers
    wide, one core takes 15 s for 20,000 rows, and 6 minutes for 100,000.

    Args:
        embeddings: one or more kinds of features, float [N, D], finite, no row of zeros; scores are averaged.
        ids: of the pictures: equal ones are the same picture, which has no partner in itself.
        neighbours: of a picture, so many of the best can be its partners.
        least: the lowest score of a pair; None: `bound`.
        hashes: pHashes, uint64 [N]; pictures that differ in `near` bits or fewer are one, and no pair.
    """
    count = len(ids)
    least = bound(count) if least is None else least
    none = np.empty(0, np.int64)
    if count < 3:
        return Pairs(none, none, np.empty(0), least)
    order = np.array(sorted(range(count), key=lambda i: (digest("lookalikes/1", ids[i]), i)))
    number = np.unique(np.asarray(ids)[order], return_inverse=True)[1]
    units = [_unit(e[order]) for e in embeddings]
    fields = [_background(u, number) for u in units]
    seen = None if hashes is None else hashes[order]
    i, j = _best(units, fields, number, seen, near, neighbours, least)
    forward, backward = i * count + j, j * count + i
    both = np.sort(forward[(i < j) & np.isin(forward, backward)])
    mutual = np.stack(np.divmod(both, count), axis=1)
    score = _score(units, fields, mutual)
    fine = score >= least
    a, b = order[mutual[fine, 0]], order[mutual[fine, 1]]
    first, second, score = np.minimum(a, b), np.maximum(a, b), score[fine]
    by = np.lexsort([second, first])
    return Pairs(first[by], second[by], score[by], least)


def _unit(rows: np.ndarray) -> np.ndarray:
    wide = rows.astype(np.float32)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def _background(units: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median and robust spread, float64 [N], of each row's cosines with the first rows (which are in the order of a hash)."""
    cohort = units[:COHORT]
    middle, spread = np.empty(len(units)), np.empty(len(units))
    for start in range(0, len(units), ROWS):
        at = slice(start, start + ROWS)
        cosines = (units[at] @ cohort.T).astype(np.float64)
        cosines[number[at, None] == number[None, : len(cohort)]] = np.nan
        middle[at] = np.nanmedian(cosines, axis=1)
        spread[at] = 1.4826 * np.nanmedian(np.abs(cosines - middle[at, None]), axis=1)
    return np.round(middle, 5), np.maximum(np.round(spread, 5), 1e-5)


def _best(
    units: Sequence[np.ndarray],
    fields: Sequence[tuple[np.ndarray, np.ndarray]],
    number: np.ndarray,
    hashes: np.ndarray | None,
    near: int,
    count: int,
    least: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows, and their `count` best partners of those that reach `least`: int64 [P] each."""
    total = len(number)
    cut = 2 * len(units) * (least - 1e-3)  # of the sum of both sides; the exact scores are taken later
    sides = [((1 / s).astype(np.float32), (m / s).astype(np.float32)) for m, s in fields]
    rows: list[np.ndarray] = []
    partners: list[np.ndarray] = []
    for start in range(0, total, ROWS):
        r = slice(start, min(start + ROWS, total))
        held = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
        for first in range(0, total, COLUMNS):
            c = slice(first, min(first + COLUMNS, total))
            score = np.zeros((r.stop - start, c.stop - first), np.float32)
            for unit, (scale, shift) in zip(units, sides, strict=True):
                weights = scale[r, None] + scale[None, c]
                weights *= unit[r] @ unit[c].T
                score += weights
                score -= shift[r, None]
                score -= shift[None, c]
            i, j = np.divmod(np.flatnonzero(score >= cut), c.stop - first)
            value, i, j = score[i, j], i + start, j + first
            other = number[i] != number[j]
            if hashes is not None:
                other &= np.bitwise_count(hashes[i] ^ hashes[j]) > near
            i, j, value = i[other], j[other], value[other]
            held = _first(np.append(held[0], i), np.append(held[1], j), np.append(held[2], value), count)
        rows.append(held[0])
        partners.append(held[1])
    return np.concatenate(rows), np.concatenate(partners)


def _first(i: np.ndarray, j: np.ndarray, score: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each i, the `count` with the highest score."""
    order = np.lexsort([j, -score, i])
    i, j, score = i[order], j[order], score[order]
    starts = np.flatnonzero(np.diff(i, prepend=-1))
    nth = np.arange(len(i)) - np.repeat(starts, np.diff(starts, append=len(i)))
    return i[nth < count], j[nth < count], score[nth < count]


def _score(
    units: Sequence[np.ndarray], fields: Sequence[tuple[np.ndarray, np.ndarray]], pairs: np.ndarray
) -> np.ndarray:
    """Scores of pairs [P, 2] in double precision, float64 [P] to 4 digits: what is above a bound is so on every machine."""
    out = np.zeros(len(pairs))
    for start in range(0, len(pairs), ROWS):
        a, b = pairs[start : start + ROWS].T
        for unit, (middle, spread) in zip(units, fields, strict=True):
            cosines = (unit[a].astype(np.float64) * unit[b].astype(np.float64)).sum(axis=1)
            out[start : start + ROWS] += (cosines - middle[a]) / spread[a] / 2 + (cosines - middle[b]) / spread[b] / 2
    return np.round(out / len(units), 4)
