"""What annotators whose answer is a picture (depth, edges, labels) share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from x2i.base.weights import Weights
from x2i.pipelines.annotators._pictures import by_shape
from x2i.pipelines.annotators._torch import SHARE, SPEED, ModelConfig
from x2i.pipelines.annotators._weights import weights_of
from x2i.pipelines.annotators.base import Annotator
from x2i.pipelines.images import fit, resize

if TYPE_CHECKING:
    from torch import Tensor

#: Longer side over shorter side beyond which a model sees a picture squashed, and a map holds fewer pixels.
ASPECT = 4


class MapConfig(ModelConfig):
    """Which model, and at what size."""

    side: int = Field(512, gt=15, le=2048, description="the map's shorter side in pixels at most, e.g. 512")


class MapAnnotator(Annotator):
    """An annotator whose column `map` is a PNG made by a torch model. A subclass's configuration is a `MapConfig`."""

    speed = SPEED
    gpus = SHARE
    heavy = frozenset({"map"})
    #: Published weights, with what is known of them.
    known: ClassVar[tuple[Weights, ...]] = ()

    @property
    def shorter_side(self) -> int:
        return int(self.config.side)

    def weights(self) -> list[Weights]:
        return [weights_of(self.config.weights, self.config.sha256, self.known)]


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


def answers(inputs: Sequence[Tensor], answer: Callable[[list[int], Tensor], Iterable[np.ndarray]]) -> list[np.ndarray]:
    """A map for each input, in order, from a model that takes those of one shape together.

    Args:
        answer: from inputs of one shape, stacked, and their places in the sequence, to a map for each.
    """
    maps: dict[int, np.ndarray] = {}
    for places, stacked in by_shape(inputs):
        maps.update(zip(places, answer(places, stacked), strict=True))
    return [maps[i] for i in range(len(inputs))]


def finite(values: np.ndarray) -> np.ndarray:
    """The values, if a model gave numbers.

    Raises:
        ValueError: it gave something else, as half precision does where a sum is too large for it.
    """
    if not np.isfinite(values).all():
        raise ValueError("the model's answer is not finite; precision: bf16 or fp32 has a wider range")
    return values
