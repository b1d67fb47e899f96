"""Masks drawn by hand: ellipses, and what `masks` would store of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def ellipse(size: tuple[int, int], box: Sequence[float]) -> np.ndarray:
    """A filled ellipse in a box of shares, in a picture of size (width, height): bool [height, width]."""
    width, height = size
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    across = (x - (box[0] + box[2]) / 2) / ((box[2] - box[0]) / 2)
    down = (y - (box[1] + box[3]) / 2) / ((box[3] - box[1]) / 2)
    return (across[None] ** 2 + down[:, None] ** 2) <= 1


def code(mask: np.ndarray) -> dict[str, Any]:
    """A mask as `masks` stores it."""
    from pycocotools import mask as coco

    made = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(made["size"]), "counts": made["counts"].decode("ascii")}
