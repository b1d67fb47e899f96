"""Ranges in configurations, and what is drawn from them."""

from __future__ import annotations

from typing import Annotated, TypeVar

import numpy as np
from pydantic import AfterValidator, Field

N = TypeVar("N", int, float)


def _ordered(ends: tuple[N, N]) -> tuple[N, N]:
    if ends[0] > ends[1]:
        raise ValueError(f"a range is [least, most], but {ends[0]} is more than {ends[1]}")
    return ends


_Positive = Annotated[float, Field(gt=0)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Count = Annotated[int, Field(gt=0)]

#: Two numbers, the lesser first; of positive numbers, of numbers from 0 to 1, of whole numbers from 1.
Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
Positive = Annotated[tuple[_Positive, _Positive], AfterValidator(_ordered)]
Shares = Annotated[tuple[_Share, _Share], AfterValidator(_ordered)]
Whole = Annotated[tuple[_Count, _Count], AfterValidator(_ordered)]


def real(rng: np.random.Generator, ends: tuple[float, float], digits: int = 4) -> float:
    """A number of a range, evenly; rounded, so that the stored parameter is the one that acts."""
    return round(float(rng.uniform(*ends)), digits)


def whole(rng: np.random.Generator, ends: tuple[int, int]) -> int:
    """A whole number of a range, both ends included."""
    return int(rng.integers(ends[0], ends[1] + 1))
