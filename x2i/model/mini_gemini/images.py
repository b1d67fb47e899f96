"""The two views of an image that Mini-Gemini reads: one scaled picture, normalised as CLIP wants it, and a small one.

The high-resolution view is made as transformers' CLIPImageProcessor makes it (PIL, bicubic, shorter side); the
low-resolution views are interpolated from its tensor, as MGM does (mgm/train/train.py). Source of padding and
crops: dvlab-research/MGM, mgm/mm_utils.py and mgm/train/train.py.

Tensor names carry their axes: V low views · C channels · H, W height and width.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from x2i.base.errors import X2IError
from x2i.model.mini_gemini.config import MiniGeminiConfig
from x2i.model.mini_gemini.convnext import resized

#: CLIP's normalisation; OpenCLIP's ConvNeXt has the same.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def views(image: np.ndarray, config: MiniGeminiConfig) -> tuple[Tensor, Tensor]:
    """Views of an image, uint8 [H, W, 3].

    Returns:
        Low-resolution views, float32 [V, 3, h, h] (the crops row by row, then the whole image where the model has an
        overview), and the high-resolution view, float32 [3, H, H].

    Raises:
        X2IError: not an image of that type and shape.
    """
    check(image)
    whole = Image.fromarray(image)
    square = scaled(padded(whole) if config.aspect == "pad" else whole, config.high.image_size)
    pixels_HWC = torch.from_numpy(np.asarray(square, dtype=np.float32).copy()) / 255
    high_CHW = ((pixels_HWC - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)
    grid, side = config.grid, config.low.image_size
    low_1CHW = resized(high_CHW[None], (grid * side, grid * side))
    crops = low_1CHW[0].unflatten(2, (grid, side)).unflatten(1, (grid, side))
    low_VCHW = crops.permute(1, 3, 0, 2, 4).flatten(0, 1)
    if config.overview:
        low_VCHW = torch.cat([low_VCHW, resized(low_1CHW, (side, side))])
    return low_VCHW, high_CHW


def check(image: np.ndarray) -> None:
    """Raise X2IError if it is no image of that type and shape."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise X2IError(f"an image must be uint8 [height, width, 3], not {image.dtype} {list(image.shape)}")


def padded(image: Image.Image) -> Image.Image:
    """The image in the middle of a square of CLIP's mean colour."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in MEAN))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def scaled(image: Image.Image, side: int) -> Image.Image:
    """The image with a shorter side of this many pixels, cut to a square around its middle."""
    short = min(image.size)
    width, height = (int(side * n / short) for n in image.size)
    large = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return large.crop((left, top, left + side, top + side))
