"""Pictures to the pixels that a model reads, and back: crop, scale, [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:  # the loader crops with this file, and does without PyTorch
    from torch import Tensor


def centre_crop(image: Image.Image, height: int, width: int) -> np.ndarray:
    """The largest centred box of this aspect, scaled (bicubic) to uint8 [height, width, 3].

    Images of equal size are cut at equal places, so the inputs and the output of a sample stay aligned.
    """
    scale = min(image.width / width, image.height / height)
    box_width, box_height = scale * width, scale * height
    left, top = max((image.width - box_width) / 2, 0), max((image.height - box_height) / 2, 0)
    box = (left, top, min(left + box_width, image.width), min(top + box_height, image.height))  # Pillow forgives no bit
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return np.asarray(rgb.resize((width, height), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))


def shrink(image: Image.Image, shorter: int) -> np.ndarray:
    """The whole picture, scaled down (bicubic) to this shorter side, or as it is if smaller: uint8 [H, W, 3]."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    scale = shorter / min(rgb.size)
    if scale >= 1:
        return np.asarray(rgb)
    size = (max(round(rgb.width * scale), shorter), max(round(rgb.height * scale), shorter))
    return np.asarray(rgb.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0))


def fit(image: Image.Image, largest: int, multiple: int = 16) -> np.ndarray:
    """A picture at its own aspect for a model that reads whole tokens: uint8 [H, W, 3], sides multiples of `multiple`.

    OmniGen's rule for input images (`crop_arr` of VectorSpaceLab/OmniGen): halve by box while the shorter side is twice
    `largest` or more; scale down (bicubic) until the longer side is `largest`; scale up until the shorter side is
    `multiple`; cut what is over from both ends. Of a picture much longer than wide a side may pass `largest`.
    """
    image = _halved(image, largest)
    if max(image.size) > largest:
        image = _scaled(image, largest / max(image.size))
    if min(image.size) < multiple:
        image = _scaled(image, multiple / min(image.size))
    over_x, over_y = image.width % multiple, image.height % multiple
    left, top = over_x // 2, over_y // 2
    return np.asarray(image)[top : top + image.height - over_y, left : left + image.width - over_x]


def fitted(width: int, height: int, largest: int, multiple: int = 16) -> tuple[int, int]:
    """Width and height of what `fit` makes of a picture of this size."""
    while min(width, height) >= 2 * largest:
        width, height = width // 2, height // 2
    for side, wanted in ((max, largest), (min, multiple)):
        if (side is max and max(width, height) > wanted) or (side is min and min(width, height) < wanted):
            scale = wanted / side(width, height)
            width, height = max(round(width * scale), 1), max(round(height * scale), 1)
    return width - width % multiple, height - height % multiple


def centre_square(image: Image.Image, side: int) -> np.ndarray:
    """The centre of a picture, uint8 [side, side, 3], as OmniGen trains with where it does not keep the aspect.

    OpenAI's rule (ADM; `center_crop_arr` of VectorSpaceLab/OmniGen): halve by box, scale the whole picture (bicubic) to
    the shorter side, cut.
    """
    image = _halved(image, side)
    image = _scaled(image, side / min(image.size))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image)[top : top + side, left : left + side]


def _halved(image: Image.Image, side: int) -> Image.Image:
    image = image if image.mode == "RGB" else image.convert("RGB")
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image


def _scaled(image: Image.Image, scale: float) -> Image.Image:
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.resize(size, Image.Resampling.BICUBIC)


def crop(pixels: np.ndarray, height: int, width: int, share: float, x: float, y: float) -> np.ndarray:
    """A box of the picture, scaled (bicubic) to uint8 [height, width, 3].

    Args:
        pixels: uint8 [H, W, 3].
        height, width: of the result, in pixels.
        share: of the sides of the largest box of this aspect.
        x, y: where it lies, from 0 (left, top) to 1 (right, bottom). Pictures of one aspect are cut at one place.
    """
    down, across = pixels.shape[:2]
    scale = share * min(across / width, down / height)
    box_width, box_height = scale * width, scale * height
    left, top = max(x * (across - box_width), 0), max(y * (down - box_height), 0)
    image = Image.fromarray(pixels)
    box = (left, top, min(left + box_width, across), min(top + box_height, down))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))


def to_tensor(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 [H, W, 3] each -> float32 [B, 3, H, W] in [-1, 1]."""
    import torch

    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> list[Image.Image]:
    """float [B, 3, H, W] in [-1, 1], clipped -> pictures."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a) for a in array]
