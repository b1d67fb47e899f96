"""Estimates with their 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def times(self, other: Interval | float) -> Interval:
        """The product; of two intervals, the outer bounds."""
        o = other if isinstance(other, Interval) else Interval(other, other, other)
        return Interval(self.value * o.value, self.low * o.low, self.high * o.high)

    def plus(self, other: Interval) -> Interval:
        """The sum."""
        return Interval(self.value + other.value, self.low + other.low, self.high + other.high)


def mean_of(values: Sequence[float]) -> Interval:
    """A mean with Student's interval (of one value, no width is known: 0 to twice the value)."""
    from scipy.stats import t

    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, 0.0, 2 * mean)
    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return Interval(mean, max(0.0, mean - half), mean + half)


def share_of(hits: int, total: int) -> Interval:
    """A share with Wilson's interval (Wilson 1927, "Probable inference, the law of succession, and statistical inference")."""
    if not total:
        return Interval(0.0, 0.0, 1.0)
    z, p = 1.959964, hits / total
    middle, half = p + z * z / (2 * total), z * (p * (1 - p) / total + z * z / (4 * total * total)) ** 0.5
    whole = 1 + z * z / total
    return Interval(p, max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole))
