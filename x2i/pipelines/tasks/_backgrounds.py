"""A photograph's subject before another background. All take and give arrays, and draw nothing at random.

Pictures are uint8 [height, width, 3]; `subject` is bool [height, width]; `cover` its opacity, float32, soft at the rim.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

#: Backgrounds by name, in sRGB.
PLAIN = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
    "light grey": (211, 211, 211),
    "red": (200, 30, 40),
    "orange": (245, 130, 32),
    "yellow": (250, 215, 60),
    "green": (40, 150, 70),
    "light green": (175, 225, 175),
    "blue": (35, 85, 190),
    "light blue": (173, 216, 240),
    "purple": (125, 60, 160),
    "pink": (245, 170, 190),
}
#: A subject's rim is soft over about this share of the shorter side, as lenses draw it.
_RIM = 0.002
#: Side at which holes are filled: what goes there is behind a subject, and coarse anyway.
_COARSE = 192


def cover_of(subject: np.ndarray) -> np.ndarray:
    """The subject's opacity: 1 inside, 0 outside, soft between; nothing outside the mask is covered."""
    sigma = max(0.6, _RIM * min(subject.shape))
    inner = cv2.GaussianBlur(subject.astype(np.float32), (0, 0), sigma)
    return np.clip(2 * inner - 1, 0, 1)  # 0 on the mask's border, so that the old background does not shine through


def before(picture: np.ndarray, cover: np.ndarray, background: np.ndarray) -> np.ndarray:
    """The subject before another background of the same size. Where it is opaque its pixels stay exactly."""
    mixed = background + cover[..., None] * (picture.astype(np.float32) - background)
    return np.where((cover >= 1)[..., None], picture, np.rint(mixed).clip(0, 255).astype(np.uint8))


def plain(size: tuple[int, int], colours: Sequence[Sequence[int]], across: bool) -> np.ndarray:
    """One colour, or a gradient between two: left to right, or from the top down; size is (width, height)."""
    width, height = size
    first, last = np.array(colours[0], np.float32), np.array(colours[-1], np.float32)
    way = np.linspace(0, 1, width if across else height, dtype=np.float32)
    line = np.rint(first + way[:, None] * (last - first)).astype(np.uint8)
    return np.broadcast_to(line[None] if across else line[:, None], (height, width, 3)).copy()


def blurred(picture: np.ndarray, subject: np.ndarray, sigma: float) -> np.ndarray:
    """Out of focus, but for the subject, whose colours do not bleed into what surrounds it."""
    there = (~subject).astype(np.float32)
    weight = cv2.GaussianBlur(there, (0, 0), sigma)
    spread = cv2.GaussianBlur(picture.astype(np.float32) * there[..., None], (0, 0), sigma)
    known = weight > 1e-3
    out = np.where(known[..., None], spread / np.maximum(weight, 1e-3)[..., None], picture)
    return np.rint(out).clip(0, 255).astype(np.uint8)


def without(picture: np.ndarray, subject: np.ndarray) -> np.ndarray:
    """The scene alone: the subject's place takes the colours of its rim, coarsely; all else stays exactly."""
    height, width = picture.shape[:2]
    scale = min(1.0, _COARSE / min(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    hole = cv2.resize(subject.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST_EXACT)
    hole = cv2.dilate(hole, np.ones((3, 3), np.uint8))
    filled = cv2.inpaint(small, hole, 3, cv2.INPAINT_TELEA)
    smooth = cv2.GaussianBlur(filled, (0, 0), 2)
    filled = np.where(hole[..., None] > 0, smooth, filled)
    return np.where(subject[..., None], cv2.resize(filled, (width, height), interpolation=cv2.INTER_LINEAR), picture)


def fitted(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Another photograph's middle, as large as this size (width, height)."""
    width, height = size
    scale = max(width / picture.shape[1], height / picture.shape[0])
    shrinks = scale < 1
    large = cv2.resize(
        picture,
        (max(width, round(picture.shape[1] * scale)), max(height, round(picture.shape[0] * scale))),
        interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC,
    )
    y, x = (large.shape[0] - height) // 2, (large.shape[1] - width) // 2
    return np.ascontiguousarray(large[y : y + height, x : x + width])
