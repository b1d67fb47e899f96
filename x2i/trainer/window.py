"""How a window of a packed stage is divided: which classes of which stratum are drawn alike, and how many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from x2i.trainer.survey import Survey

#: One draw, in the unit of `divide`: whole numbers, so that sums are the same everywhere.
ONE = 1 << 32


@dataclass(frozen=True)
class Part:
    """Classes of a stratum that are drawn alike: their draws in a window, and their mean length."""

    stratum: int
    kinds: tuple[int, ...]
    rate: float
    mean: float

    @classmethod
    def of(cls, stratum: int, kinds: list[int], rate: np.ndarray, mean: np.ndarray) -> Part:
        """Of the draws and mean lengths of all classes."""
        total = float(rate[kinds].sum())
        return cls(stratum, tuple(kinds), total, float((rate[kinds] * mean[kinds]).sum()) / total)


def divide(
    counts: Sequence[np.ndarray], survey: Survey, weights: np.ndarray, window: int
) -> tuple[list[Part], list[int]]:
    """The parts of all strata, in order of their lengths, and where in a window each ends, in units of `ONE`.

    Classes that would get less than one draw in a window are joined with the next in length, and each stratum gets at
    least one: only so the rounded share of a part never shrinks from one window to the next.

    Args:
        counts: samples of each stratum by class.
        weights: of the strata; sum to 1.
        window: draws.
    """
    shares = np.maximum(weights * window, 1.0)
    for _ in shares:
        over = shares > 1
        shares[over] *= max(window - (~over).sum(), 1) / max(shares[over].sum(), 1)
        shares = np.maximum(shares, 1.0)
    parts: list[Part] = []
    for number, count in enumerate(counts):
        mean = survey.means(number)
        rate = count / count.sum() * shares[number]
        mine: list[Part] = []
        waiting: list[int] = []
        for kind in sorted(np.flatnonzero(count).tolist(), key=lambda k: (mean[k], k)):
            waiting.append(kind)
            if rate[waiting].sum() >= 1:
                mine.append(Part.of(number, waiting, rate, mean))
                waiting = []
        if waiting:
            waiting = [*(mine.pop().kinds if mine else ()), *waiting]
            mine.append(Part.of(number, waiting, rate, mean))
        parts += mine
    parts.sort(key=lambda part: (part.mean, part.stratum))
    rates = [max(round(part.rate * ONE), ONE) for part in parts]
    rates[rates.index(max(rates))] += window * ONE - sum(rates)
    ends = [sum(rates[: place + 1]) for place in range(len(rates))]
    return parts, ends
