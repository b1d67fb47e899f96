"""The work on one picture, the same for the pool and for Ray Data, with the codecs that x2i uses.

A peer with slower codecs would flatter x2i: what is compared is the machinery around them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import cv2
import simplejpeg

cv2.setNumThreads(1)  # processes are the unit of parallelism

SHORTER_SIDE, QUALITY, SHARD = 512, 95, 1000


def names(folder: Path) -> list[str]:
    """The pictures of a folder, in order."""
    return sorted(p.name for p in folder.iterdir() if p.suffix == ".jpg")


def sample(folder: Path, name: str) -> tuple[dict[str, str | bytes], dict[str, str | int]]:
    """Read, hash, decode, shrink, encode: a sample for webdataset's TarWriter, and its row of the manifest."""
    path = folder / name
    data = path.read_bytes()
    caption = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
    pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
    height, width = pixels.shape[:2]
    scale = SHORTER_SIDE / min(width, height)
    if scale < 1:
        width, height = round(width * scale), round(height * scale)
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
        picture = simplejpeg.encode_jpeg(pixels, QUALITY, "RGB", "420", fastdct=False)
    else:
        picture = data
    row: dict[str, str | int] = {
        "key": path.stem,
        "caption": caption,
        "sha256": hashlib.sha256(data).hexdigest(),
        "width": width,
        "height": height,
    }
    return {"__key__": path.stem, "json": json.dumps(row).encode(), "jpg": picture}, row
