"""Masks, bool [height, width], and pictures cut out along them, uint8 [height, width, 3]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from x2i.base.packages import need
from x2i.pipelines.boxes import pixel_box
from x2i.pipelines.images import resize

#: A mask as the annotator `masks` gives it, a COCO run-length code, or as it is, bool [height, width].
Code = Mapping[str, Any] | np.ndarray


def decoded(code: Code, size: tuple[int, int]) -> np.ndarray:
    """A mask at another size (width, height): bool [height, width]."""
    if isinstance(code, np.ndarray):
        there: np.ndarray = code.astype(np.uint8)
    else:
        coco = need("pycocotools.mask", "pycocotools", "masks")
        there = coco.decode({"size": list(code["size"]), "counts": code["counts"].encode("ascii")})
    if there.shape[::-1] != size:
        there = cv2.resize(there, size, interpolation=cv2.INTER_NEAREST_EXACT)
    return there > 0


def filled(box: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    """The mask of a box of shares in a picture of size (width, height)."""
    x1, y1, x2, y2 = pixel_box(box, size)
    out = np.zeros(size[::-1], bool)
    out[y1:y2, x1:x2] = True
    return out


def grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    """A mask with so many pixels more all round (a disc's dilation), so that no rim of the object stays."""
    if pixels < 1:
        return mask
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * pixels + 1, 2 * pixels + 1))
    return cv2.dilate(mask.astype(np.uint8), disc) > 0


def cut_out(
    pixels: np.ndarray, box: Sequence[float], mask: np.ndarray | None, margin: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """A region of a picture: on white, if there is a mask; else the rectangle.

    Args:
        mask: what of the picture is the subject; what lies outside the box and its margin is left out.
        margin: room around the subject, as a share of its longer side; of a rectangle only as far as the picture goes.

    Returns:
        The cut-out, and where the subject is in it (everywhere in a rectangle); None where the mask has nothing there.
    """
    height, width = pixels.shape[:2]
    x1, y1, x2, y2 = pixel_box(box, (width, height))
    room = round(margin * max(x2 - x1, y2 - y1))
    left, top, right, bottom = max(0, x1 - room), max(0, y1 - room), min(width, x2 + room), min(height, y2 + room)
    inner = pixels[top:bottom, left:right]
    if mask is None:
        return inner.copy(), np.ones(inner.shape[:2], bool)
    part = np.ascontiguousarray(mask[top:bottom, left:right])
    if not part.any():
        return None
    x, y, w, h = cv2.boundingRect(part.astype(np.uint8))
    room = round(margin * max(w, h))
    there = np.pad(part[y : y + h, x : x + w], room)
    out = np.pad(inner[y : y + h, x : x + w], ((room, room), (room, room), (0, 0)))
    out[~there] = 255
    return out, there


def bounded(pixels: np.ndarray, side: int) -> np.ndarray:
    """Shrunk so that the longer side is no more than `side` pixels."""
    height, width = pixels.shape[:2]
    scale = min(1.0, side / max(height, width))
    return resize(pixels, max(1, round(width * scale)), max(1, round(height * scale)))
