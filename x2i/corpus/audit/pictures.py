"""Thumbnails, and how they travel inside a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

_MAGIC = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png", b"RIFF": "image/webp"}


#: Colours in which boxes are drawn, in turn (of Okabe and Ito's palette, which colour-blind people can tell apart).
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167))


def shrink(data: bytes, side: int, boxes: Sequence[Sequence[float]] = ()) -> bytes | None:
    """A WebP of an image of the corpus whose longer side is at most `side` pixels; None if it cannot be decoded.

    Args:
        boxes: drawn over it: [x1, y1, x2, y2] as shares of its sides.
    """
    from PIL import Image, ImageDraw, ImageOps

    try:
        opened = Image.open(io.BytesIO(data))
        opened.thumbnail((side, side), Image.Resampling.LANCZOS)
        image = ImageOps.exif_transpose(opened).convert(
            "RGB"
        )  # what the corpus stores is upright; a benchmark's may not be
        draw = ImageDraw.Draw(image)
        for number, (x1, y1, x2, y2) in enumerate(boxes):
            corners = (x1 * image.width, y1 * image.height, x2 * image.width, y2 * image.height)
            draw.rectangle(corners, outline=COLOURS[number % len(COLOURS)], width=max(2, side // 120))
        out = io.BytesIO()
        image.save(out, "WEBP", quality=80, method=4)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return out.getvalue()


def data_uri(data: bytes | None) -> str | None:
    """An image's bytes as a `data:` address; None for what is no JPEG, PNG or WebP."""
    for magic, kind in _MAGIC.items():
        if data is not None and data.startswith(magic):
            return f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return None
