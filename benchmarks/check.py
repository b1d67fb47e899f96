"""No time is believed before the output is: counts, hashes, captions, sizes, and pixels against a reference.

The reference shares no code with x2i: Pillow decodes the source and the result, OpenCV shrinks by area.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

SHORTER_SIDE = 512

#: Pictures whose pixels are compared, and the mean absolute difference (of 255) that a JPEG at 95 may have.
COMPARED, MOST = 100, 2.5


def check(out: Path, manifests: str, photographs: Path, index: Path) -> tuple[list[str], float]:
    """Compare what a peer wrote to `out` with what it should be.

    Args:
        manifests: pattern of the Parquet files that hold a row per sample.

    Returns:
        What is wrong, a sentence each; and the largest mean absolute difference among the pictures compared.
    """
    expected = {row["sha256"]: row for row in pq.read_table(index).to_pylist()}
    order = {sha: i for i, sha in enumerate(expected)}
    every = max(1, len(expected) // COMPARED)
    wrong: list[str] = []
    seen: set[str] = set()
    worst = 0.0
    for name, record, picture in _samples(out):
        sha = record.get("sha256") or record["provenance"]["image_id"]
        caption = record.get("caption") or record.get("instruction")
        source = expected.get(sha)
        if source is None or sha in seen:
            wrong.append(f"{name}: {'a second sample of' if source else 'not'} one of the photographs ({sha[:12]})")
            continue
        seen.add(sha)
        if caption != source["caption"]:
            wrong.append(f"{name}: has another caption than its photograph")
        scale = min(1.0, SHORTER_SIDE / min(source["width"], source["height"]))
        with Image.open(io.BytesIO(picture)) as image:
            size = image.size
            if any(abs(a - source[b] * scale) > 1 for a, b in zip(size, ("width", "height"), strict=True)):
                wrong.append(f"{name}: {size[0]}x{size[1]} pixels, from {source['width']}x{source['height']}")
            elif order[sha] % every == 0:
                worst = max(worst, _difference(photographs / source["name"], image))
    if len(seen) != len(expected):
        wrong.append(f"{len(seen)} of {len(expected)} photographs")
    rows = sum(pq.read_metadata(p).num_rows for p in out.glob(manifests))
    if rows != len(expected):
        wrong.append(f"{rows} rows in the manifest, for {len(expected)} photographs")
    if worst > MOST:
        wrong.append(f"pixels differ by {worst:.2f} of 255 from the reference, in the mean of the worst picture")
    return wrong, worst


def _samples(out: Path) -> Iterator[tuple[str, dict[str, Any], bytes]]:
    """Name, JSON and picture of each sample of all tars below `out`."""
    for path in sorted(out.rglob("*.tar")):
        held: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                file = tar.extractfile(member)
                sample = held.setdefault(key, {})
                sample[suffix.rpartition(".")[2]] = file.read() if file else b""
                if sample.keys() >= {"json", "jpg"}:
                    held.pop(key)
                    yield f"{path.name}#{key}", json.loads(sample["json"]), sample["jpg"]


def _difference(source: Path, made: Image.Image) -> float:
    with Image.open(source) as image:
        pixels = np.asarray(image.convert("RGB"))
    if made.size != (pixels.shape[1], pixels.shape[0]):
        pixels = cv2.resize(pixels, made.size, interpolation=cv2.INTER_AREA)
    return float(np.abs(pixels.astype(np.int16) - np.asarray(made.convert("RGB"))).mean())
