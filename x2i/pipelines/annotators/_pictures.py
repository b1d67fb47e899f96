"""What annotators do to pictures before a model sees them. Pixels are uint8 [height, width, 3] RGB, and read-only."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np

from x2i.pipelines.annotators.base import Item
from x2i.pipelines.images import resize

if TYPE_CHECKING:
    from torch import Tensor

#: ImageNet's channel means and standard deviations, of RGB 0 to 1.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)


def pixels(batch: Sequence[Item]) -> list[np.ndarray]:
    """The pixels of a batch; every item has them by the annotator's contract."""
    return [i.pixels for i in batch if i.pixels is not None]


def scaled(picture: np.ndarray, scale: float) -> np.ndarray:
    """Both sides times `scale`, at least 1."""
    height, width = picture.shape[:2]
    return resize(picture, max(1, round(width * scale)), max(1, round(height * scale)))


def margined(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """With a black margin right and below, up to this size; larger pictures stay."""
    below, right = max(0, height - picture.shape[0]), max(0, width - picture.shape[1])
    return cv2.copyMakeBorder(picture, 0, below, 0, right, cv2.BORDER_CONSTANT) if below or right else picture


def bilinear(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resized by Pillow's bilinear filter (with antialiasing), as torchvision and many published preparations do."""
    from PIL import Image

    if picture.shape[1::-1] == (width, height):
        return picture
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))


def normalised(picture: np.ndarray) -> np.ndarray:
    """As networks trained on ImageNet take it: float32 [3, height, width], ImageNet's mean off, over its deviation."""
    return np.ascontiguousarray(((picture.astype(np.float32) / 255 - MEAN) / DEVIATION).transpose(2, 0, 1))


def alike(keys: Iterable[Hashable]) -> list[list[int]]:
    """The places of equal keys, together."""
    places: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        places.setdefault(key, []).append(i)
    return list(places.values())


def by_shape(tensors: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """Tensors of one shape stacked, with their places in the sequence.

    Padding to a common size would let a picture's values depend on its neighbours in the batch; this does not.
    """
    import torch

    for places in alike(tuple(t.shape) for t in tensors):
        yield places, torch.stack([tensors[i] for i in places])
