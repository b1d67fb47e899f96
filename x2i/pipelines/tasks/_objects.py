"""The things in a picture that have a phrase and masks: what `grounding` and `masks` found, put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from x2i.pipelines.tasks._holes import decoded


@dataclass(frozen=True)
class Thing:
    """A phrase, the boxes that it has (their places in the list of boxes), and where they are together."""

    phrase: str
    index: list[int]
    mask: np.ndarray  # bool [height, width]

    @property
    def area(self) -> float:
        """Share of the picture."""
        return float(self.mask.mean())


def things(
    phrases: Sequence[str], codes: Sequence[Mapping[str, Any]], box_index: Sequence[int | None], size: tuple[int, int]
) -> list[Thing]:
    """Each phrase with all its boxes, because "the dog" is said of both dogs; those that lack a mask are left out.

    Args:
        phrases: of each box. codes: COCO run-length codes, and box_index: the box that each was asked for.
        size: (width, height) of the masks that are wanted.
    """
    masks = {i: code for i, code in zip(box_index, codes, strict=True) if i is not None}
    places: dict[str, list[int]] = {}
    for i, phrase in enumerate(phrases):
        places.setdefault(phrase, []).append(i)
    return [
        Thing(phrase, index, np.logical_or.reduce([decoded(masks[i], size) for i in index]))
        for phrase, index in places.items()
        if phrase and all(i in masks for i in index)
    ]


def place_of(mask: np.ndarray) -> str:
    """Where a mask lies for the most part: left, right, top, bottom or middle."""
    y, x = (np.flatnonzero(mask.any(axis=1 - axis)) for axis in (0, 1))
    across, down = (x[0] + x[-1] + 1) / 2 / mask.shape[1], (y[0] + y[-1] + 1) / 2 / mask.shape[0]
    if abs(across - 0.5) < 0.15 and abs(down - 0.5) < 0.15:
        return "middle"
    if abs(across - 0.5) >= abs(down - 0.5):
        return "left" if across < 0.5 else "right"
    return "top" if down < 0.5 else "bottom"


def solid(mask: np.ndarray) -> np.ndarray:
    """A mask without pinholes: pixels that happen to be alike before and after are within what was changed."""
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (7, 7))
    return cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, disc) > 0
