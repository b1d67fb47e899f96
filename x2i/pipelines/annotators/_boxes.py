"""Boxes and points as all annotators give them: float32 shares, 0 to 1, of the upright picture's width and height."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

#: A box: x1, y1, x2, y2. Annotators call a row's boxes `boxes`, how sure they are `scores`, what they show `labels`.
BOX = pa.list_(pa.float32(), 4)
BOXES = pa.list_(BOX)


def shares(places: ArrayLike, width: float, height: float) -> np.ndarray:
    """Places in pixels as shares, cut off at the picture's edges: float32 of the same shape.

    Args:
        places: [..., 2 n]: x, y, x, y … of points, boxes or polygons.
    """
    pixels = np.asarray(places, np.float64)
    pairs = pixels.reshape(-1, 2) / (width, height)
    return pairs.clip(0, 1).astype(np.float32).reshape(pixels.shape)
