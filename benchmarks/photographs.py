"""The files that the benchmark reads: thousands of JPEGs made from the photographs that packages carry.

Nobody ships photographs by the thousand, so each is a crop of one of nine colour photographs, mirrored or
not, zoomed to about 0.46 megapixels in one of the usual shapes, with a little film grain, which gives
enlarged crops back the entropy of a real photograph: about 100 KB at quality 90. The n-th picture depends
on n alone. A folder of one's own can be taken instead.
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from PIL import Image

from x2i.base.errors import X2IError
from x2i.base.files import atomic, remove
from x2i.base.seeds import generator
from x2i.pipelines.images import BadImage, decode, read_header
from x2i.pipelines.quickstart import COLOUR, photographs

#: The colour photographs of scikit-image and scikit-learn.
NAMES = (*COLOUR, "china", "flower")
SHAPES = ((784, 588), (588, 784), (832, 554), (678, 678), (928, 522))  # 4:3, 3:4, 3:2, 1:1, 16:9
GRAIN, QUALITY = 4.0, 90  # standard deviation in grey levels; JPEG
VERSION = 1


def make(folder: Path, count: int, processes: int) -> Path:
    """Make `count` photographs with sidecar texts in `folder`, once. Returns the index (Parquet), beside it."""
    index = folder.with_suffix(".parquet")
    if index.is_file():
        return index
    cv2.setNumThreads(1)
    remove(folder)  # without its index it is of no use
    with atomic(folder) as temporary:
        temporary.mkdir()
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            rows = pool.starmap(_write, ((str(temporary), n) for n in range(count)), chunksize=64)
    return _index(folder, index, rows)


def adopt(source: Path, folder: Path, most: int) -> Path:
    """Take upright RGB JPEGs of one's own, by links, at most so many. Returns the index.

    Others are left out, and so are copies: the peers keep EXIF-rotated files sideways and CMYK in four
    channels, so the same work could not be checked; what becomes of odd files is tested elsewhere.

    Raises:
        X2IError: there is no such picture.
    """
    rows, seen = [], set()
    with atomic(folder) as temporary:
        temporary.mkdir()
        for path in sorted(p for p in source.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg")):
            data = path.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            if len(rows) < most and digest not in seen and _usable(data):
                seen.add(digest)
                name = f"{len(rows):06d}"
                os.symlink(path.resolve(), temporary / f"{name}.jpg")
                beside = path.with_suffix(".txt")
                caption = beside.read_text(encoding="utf-8").strip() if beside.is_file() else ""
                rows.append(_describe(temporary, name, data, caption if len(caption) >= 3 else f"a photograph, {name}"))
    if not rows:
        raise X2IError(f"{source}: no upright RGB JPEG in it")
    index = folder.with_suffix(".parquet")
    return _index(folder, index, rows)


def _usable(data: bytes) -> bool:
    try:
        header = read_header(data)
        decode(data, header)
    except BadImage:
        return False
    return header.format == "JPEG" and header.mode == "RGB" and header.plain


def _write(folder: str, number: int) -> dict[str, Any]:
    rng = generator("bench/photograph", VERSION, number)
    name = NAMES[number % len(NAMES)]
    pixels, caption = _photograph(name)
    width, height = SHAPES[int(rng.integers(len(SHAPES)))]
    most = min(pixels.shape[1] / width, pixels.shape[0] / height)
    scale = most * float(rng.uniform(0.6, 1.0))
    w, h = int(width * scale), int(height * scale)
    x, y = int(rng.integers(pixels.shape[1] - w + 1)), int(rng.integers(pixels.shape[0] - h + 1))
    crop = pixels[y : y + h, x : x + w]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    how = cv2.INTER_AREA if scale > 1 else cv2.INTER_CUBIC
    zoomed = cv2.resize(np.ascontiguousarray(crop), (width, height), interpolation=how)
    grain = cv2.GaussianBlur(rng.standard_normal((height, width), np.float32), (0, 0), 0.7) * (2 * GRAIN)
    grainy = np.clip(zoomed + grain[..., None], 0, 255).astype(np.uint8)
    data = simplejpeg.encode_jpeg(grainy, QUALITY, "RGB", "420", fastdct=False)
    stem = f"{number:06d}"
    (Path(folder) / f"{stem}.jpg").write_bytes(data)
    return _describe(Path(folder), stem, data, f"{caption} (crop {number}: {w}x{h} at {x},{y})")


def _describe(folder: Path, stem: str, data: bytes, caption: str) -> dict[str, Any]:
    (folder / f"{stem}.txt").write_text(caption + "\n", encoding="utf-8")
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    digest = hashlib.sha256(data).hexdigest()
    size = {"bytes": len(data), "width": width, "height": height}
    return {"name": f"{stem}.jpg", "caption": caption, "sha256": digest, **size}


def _index(folder: Path, index: Path, rows: list[dict[str, Any]]) -> Path:
    """`url` and `caption` are what img2dataset is given; the rest is what the check looks up."""
    table = [{**row, "url": (folder / row["name"]).resolve().as_uri()} for row in rows]
    with atomic(index) as temporary:
        pq.write_table(pa.Table.from_pylist(table), temporary)
    return index


@cache
def _photograph(name: str) -> tuple[np.ndarray, str]:
    files = photographs()
    (file,) = (n for n in files if n.rpartition(".")[0] == name and not n.endswith(".txt"))
    pixels = np.asarray(Image.open(io.BytesIO(files[file])).convert("RGB"))
    return pixels, files[f"{name}.txt"].decode().strip()
