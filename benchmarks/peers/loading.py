"""What every loader is given to do, and how it is timed: the same crop, two marks in an endless stream of batches.

Between the marks lie the CPU seconds of the whole process tree. The start (imports, workers, first shards) comes before
the first one; what is read ahead is the same at both.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

BATCH = 64

#: Crops that are kept for the harness to compare.
COMPARED = 48

_TICK = os.sysconf("SC_CLK_TCK")


def crop(data: bytes, side: int, reduced: bool) -> np.ndarray:
    """The largest centred square, scaled (bicubic) to uint8 [side, side, 3], by Pillow; reduced: by its draft mode."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        if reduced:
            image.draft("RGB", (side, side))
        least = min(image.size)
        left, top = (image.width - least) / 2, (image.height - least) / 2
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        box = (left, top, left + least, top + least)
        return np.asarray(rgb.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))


def batch(samples: Iterable[tuple[str, bytes]], side: int, mode: str) -> tuple[list[str], Any]:
    """Keys, and uint8 [B, side, side, 3]; in mode `none` the files' lengths, [B]."""
    import torch

    keys, files = zip(*samples, strict=True)
    if mode == "none":
        return list(keys), torch.tensor([len(f) for f in files])
    return list(keys), torch.from_numpy(np.stack([crop(f, side, mode == "reduced") for f in files]))


def measure(batches: Iterable[tuple[list[str], Any]], warm: int, samples: int, kept: str) -> None:
    """Take batches, and print how many, in how many seconds of clock and CPU, from the first mark to the second.

    Args:
        batches: without an end.
        warm: samples before the first mark.
        samples: between the marks; at least so many.
        kept: file (.npz) for the keys and the first crops.
    """
    seen: list[str] = []
    keys: list[str] = []
    crops: list[np.ndarray] = []
    marks: list[tuple[int, float, float]] = []
    for names, pixels in batches:
        if pixels.ndim == 4 and (wanted := COMPARED - len(crops)):
            keys += names[:wanted]
            crops += [np.array(p) for p in pixels[:wanted]]
        seen += names
        if not marks and len(seen) >= warm:
            marks.append((len(seen), time.perf_counter(), tree_cpu()))
        elif marks and len(seen) >= marks[0][0] + samples:
            marks.append((len(seen), time.perf_counter(), tree_cpu()))
            break
    (n0, t0, c0), (n1, t1, c1) = marks
    np.savez(kept, seen=np.array(seen), keys=np.array(keys), crops=np.array(crops))
    print(json.dumps({"samples": n1 - n0, "seconds": t1 - t0, "cpu": c1 - c0, "start_cpu": c0}), flush=True)


def tree_cpu() -> float:
    """CPU seconds of this process and of all below it, those that ended included."""
    found: dict[int, tuple[int, float]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            found[int(name)] = (int(fields[1]), sum(int(t) for t in fields[11:15]) / _TICK)
    ours, grown = {os.getpid()}, True
    while grown:
        below = {pid for pid, (parent, _) in found.items() if parent in ours} - ours
        ours |= below
        grown = bool(below)
    return sum(found[pid][1] for pid in ours)
