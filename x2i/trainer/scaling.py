"""Pictures scaled by Pillow's bicubic filter, with integers and vector instructions: the crate fast_image_resize.

The result is the same on every processor: sums of whole numbers, by vector instructions or without. It is as near to the
exact filter as Pillow's own (`benchmarks/LOG.md`). Other threads of the interpreter run meanwhile.
"""

from __future__ import annotations

import math
import threading

import numpy as np
from cykooz_resizer import CropBox, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer

#: Keys' cubic with a = -0.5, widened where a picture is made smaller; it reaches two pixels of the result to either side.
_FILTER, _REACH = ResizeAlg.convolution(FilterType.catmull_rom), 2

_own = threading.local()


def bicubic(pixels: np.ndarray, box: tuple[float, float, float, float], width: int, height: int) -> np.ndarray:
    """A box of a picture, scaled: uint8 [height, width, 3], not to be written to.

    Args:
        pixels: uint8 [H, W, 3].
        box: left, top, right and bottom in pixels, which need not be whole. The filter sees what lies around it.
        width, height: of the result, in pixels.
    """
    (first_x, end_x), (first_y, end_y) = (
        _reached(box[side], box[side + 2], size, pixels.shape[1 - side]) for side, size in enumerate((width, height))
    )
    across, down = end_x - first_x, end_y - first_y
    left, wide = _within(box[0] - first_x, box[2] - box[0], across)
    top, high = _within(box[1] - first_y, box[3] - box[1], down)
    source = ImageData(across, down, PixelType.U8x3, pixels[first_y:end_y, first_x:end_x].tobytes())
    # One direction at a time, as it does by itself. Asked for both at once, version 4.0.1 reads beyond its memory where the
    # first pixel of an enlarged picture falls on a pixel's centre: it takes that one's window for the outermost.
    between = _resized(source, CropBox(0.0, top, float(across), high), across, height)
    scaled = _resized(between, CropBox(left, 0.0, wide, float(height)), width, height)
    return np.frombuffer(scaled.get_buffer(), np.uint8).reshape(height, width, 3)


def _resized(source: ImageData, box: CropBox, width: int, height: int) -> ImageData:
    if not hasattr(_own, "resizer"):
        _own.resizer = Resizer()  # which works for one thread at a time
    out = ImageData(width, height, PixelType.U8x3)
    _own.resizer.resize(source, out, ResizeOptions(_FILTER, use_alpha=False, crop_box=box))
    return out


def _reached(start: float, end: float, size: int, most: int) -> tuple[int, int]:
    """The pixels that the filter sees of a side of `most`, where `start` to `end` becomes `size` pixels."""
    reach = _REACH * max((end - start) / size, 1.0) + 1
    return max(math.floor(start - reach), 0), min(math.ceil(end + reach), most)


def _within(start: float, length: float, most: int) -> tuple[float, float]:
    """Start and length, of which the sum is not beyond `most` by rounding."""
    while start + length > most:
        length = math.nextafter(min(length, most - start), 0.0)
    return start, length
