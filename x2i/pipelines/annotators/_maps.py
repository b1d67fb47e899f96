"""What annotators whose answer is a picture (depth, edges, labels) share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from x2i.pipelines.images import fit, resize

if TYPE_CHECKING:
    from torch import Tensor

#: Longer side over shorter side beyond which a model sees a picture squashed, and a map holds fewer pixels.
ASPECT = 4


def map_size(pixels: np.ndarray, side: int) -> tuple[int, int]:
    """Width and height of a picture's map: shorter side at most `side`, area at most `ASPECT` x side x side.

    Args:
        pixels: uint8 [height, width, 3].
    """
    height, width = pixels.shape[:2]
    return fit(width, height, side, ASPECT * side * side)


def shrunk(pixels: np.ndarray, side: int) -> np.ndarray:
    """The picture at its map's size; never enlarged."""
    return resize(pixels, *map_size(pixels, side))


def squashed(pixels: np.ndarray) -> np.ndarray:
    """The picture, its longer side shrunk to `ASPECT` times the shorter if it is longer than that.

    Published preparations scale by one side and would make 1x5000 pixels into no pixels, or into millions.
    """
    height, width = pixels.shape[:2]
    most = ASPECT * min(width, height)
    return resize(pixels, min(width, most), min(height, most))


def prepared(processor: Any, pixels: np.ndarray, **more: Any) -> Tensor:
    """A picture as a transformers image processor prepares it: float [3, height, width].

    One at a time: processors pad pictures of several sizes to one, and padding changes a model's answer. The copy
    is for torch, which wants writable memory; the format is said because 4x3 pixels could be guessed wrong.
    """
    given = squashed(pixels).copy()
    return processor(images=[given], input_data_format="channels_last", return_tensors="pt", **more)["pixel_values"][0]


def at_least(pixels: np.ndarray, side: int) -> np.ndarray:
    """The picture, its last row and column repeated until both sides have this many pixels."""
    height, width = pixels.shape[:2]
    missing = (max(0, side - height), max(0, side - width))
    return np.pad(pixels, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge") if any(missing) else pixels


def by_shape(tensors: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """Tensors of one shape stacked, with their places in the sequence.

    Padding to a common size would let a picture's values depend on its neighbours in the batch; this does not.
    """
    import torch

    places: dict[tuple[int, ...], list[int]] = {}
    for i, tensor in enumerate(tensors):
        places.setdefault(tuple(tensor.shape), []).append(i)
    for group in places.values():
        yield group, torch.stack([tensors[i] for i in group])
