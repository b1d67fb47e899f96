"""A sample's pictures, from bytes to pixels at the wanted size: in full, or JPEGs at the least scale that suffices.

`full` is Pillow throughout: it decodes every pixel and scales by its bicubic filter (`x2i.model.pixels`).

`reduced` asks libjpeg-turbo for 1/2, 1/4 or 1/8 of a JPEG, which it computes from as many of the DCT's coefficients, as
long as what is cut out has the wanted size; and scales by the same bicubic filter with vector instructions
(`x2i.trainer.scaling`). Without a scale to reduce by, the pixels are those of `full` but for rounding; with one they are a
little sharper (`benchmarks/LOG.md` has the differences).

Pixels are taken as they are stored: neither an EXIF orientation nor a profile is applied, as a corpus has none.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from x2i.model.pixels import centre_crop, shrink
from x2i.trainer.config import Decode
from x2i.trainer.scaling import bicubic

#: More pixels are not decoded: Pillow's own limit, of which another part of a program may have relieved it.
MAX_PIXELS = 178_956_970

#: A file's bytes.
Data = bytes | memoryview

_PLAIN = ("YCbCr", "Gray", "RGB")


class _Header(NamedTuple):
    """What a file says before it is decoded: width and height, and whether libjpeg-turbo alone makes RGB of it."""

    width: int
    height: int
    plain: bool


def pictures(files: Sequence[Data], height: int, width: int, whole: bool, decode: Decode) -> list[np.ndarray]:
    """The pictures of one sample: uint8 [height, width, 3] each, around the centre; or `whole`, [H, W, 3].

    Whole pictures are scaled down to the lesser of the two as their shorter side; smaller ones stay as they are. Pictures
    of equal size are cut at equal places and, if reduced, by one scale: what differs between them is their own.

    Raises:
        OSError, ValueError, SyntaxError, EOFError: a picture does not decode, or has more than `MAX_PIXELS`.
    """
    if decode == "full":
        return [_full(data, height, width, whole) for data in files]
    headers = [_header(data) for data in files]
    odd = {(h.width, h.height) for h in headers if not h.plain}
    out = []
    for data, header in zip(files, headers, strict=True):
        ratio = min(header.width, header.height) / min(height, width)
        if not whole:
            ratio = min(header.width / width, header.height / height)
        scale = 1 if (header.width, header.height) in odd else next(k for k in (8, 4, 2, 1) if k <= max(ratio, 1))
        pixels, scale = _decoded(data, header, scale)
        if not whole:
            out.append(_scaled(pixels, header.width / scale, header.height / scale, width, height, ratio / scale))
        elif ratio <= 1:
            out.append(pixels)
        else:
            shorter = min(height, width)
            by = shorter / min(header.width, header.height)  # as `shrink` reckons, for halves to be rounded alike
            w, h = (max(round(side * by), shorter) for side in (header.width, header.height))
            out.append(_scaled(pixels, header.width / scale, header.height / scale, w, h, None))
    return out


def _full(data: Data, height: int, width: int, whole: bool) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        _check(*image.size)
        return shrink(image, min(height, width)) if whole else centre_crop(image, height, width)


def _check(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels, of which at most {MAX_PIXELS:,} are decoded")


def _header(data: Data) -> _Header:
    if data[:2] == b"\xff\xd8":
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:  # Pillow may know better
            pass
        else:
            _check(width, height)
            return _Header(width, height, colours in _PLAIN)
    with Image.open(io.BytesIO(data)) as image:
        _check(*image.size)
        return _Header(*image.size, False)


def _decoded(data: Data, header: _Header, scale: int) -> tuple[np.ndarray, int]:
    """RGB pixels, and the scale at which they are."""
    if header.plain:
        least = {"min_width": -(-header.width // scale), "min_height": -(-header.height // scale)}
        try:
            given = {"fastdct": False, "fastupsample": False, "min_factor": scale, **(least if scale > 1 else {})}
            return simplejpeg.decode_jpeg(data, "RGB", **given), scale
        except ValueError:  # strict about every oddity; Pillow tells the harmless ones from the damaged ones
            pass
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB")), 1


def _scaled(pixels: np.ndarray, across: float, down: float, width: int, height: int, ratio: float | None) -> np.ndarray:
    """The middle of a picture of this size, `ratio` of its pixels to one of the result (None: all of it): [H, W, 3].

    `across` and `down` may be less than the array's sides by a fraction of a pixel, of which libjpeg-turbo makes a whole.
    """
    step_x, step_y = (across / width, down / height) if ratio is None else (ratio, ratio)
    left, top = max((across - step_x * width) / 2, 0.0), max((down - step_y * height) / 2, 0.0)
    right, bottom = min(left + step_x * width, across), min(top + step_y * height, down)
    return bicubic(pixels, (left, top, right, bottom), width, height)
