"""Masks, bool [height, width], of what samples change or ask for: as a sample has them, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from x2i.corpus.sample import Picture
from x2i.pipelines.tasks.base import picture_of


def mask_of(mask: np.ndarray) -> Picture:
    """A sample's mask: white is what is missing, changed or asked for."""
    return picture_of(np.where(mask, 255, 0).astype(np.uint8))


def painted(pixels: np.ndarray, mask: np.ndarray, colour: Sequence[int], alpha: float) -> np.ndarray:
    """The picture with the mask in a colour (RGB), of which `alpha` is the opacity; all else keeps its value."""
    out = pixels.copy()
    out[mask] = np.rint(alpha * np.array(colour, np.float64) + (1 - alpha) * pixels[mask]).astype(np.uint8)
    return out


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
