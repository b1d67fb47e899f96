"""Thumbnails, and how they travel inside a page."""

from __future__ import annotations

import base64
import io

_MAGIC = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png", b"RIFF": "image/webp"}


def shrink(data: bytes, side: int) -> bytes | None:
    """A WebP of an image of the corpus whose longer side is at most `side` pixels; None if it cannot be decoded."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data))
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        image.convert("RGB").save(out, "WEBP", quality=80, method=4)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return out.getvalue()


def data_uri(data: bytes | None) -> str | None:
    """An image's bytes as a `data:` address; None for what is no JPEG, PNG or WebP."""
    for magic, kind in _MAGIC.items():
        if data is not None and data.startswith(magic):
            return f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return None
