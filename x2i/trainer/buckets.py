"""Buckets: sizes to which pictures are cut, so that those of one step have one shape and little of them is lost."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

#: Width and height in pixels.
Size = tuple[int, int]

#: What of the manifest says which bucket a sample is for.
COLUMNS = ["output_size", "input_sizes"]


def nearest(widths: np.ndarray, heights: np.ndarray, buckets: tuple[Size, ...]) -> np.ndarray:
    """The places in `buckets` of those for pictures of these sizes.

    The nearest aspect counts; of several buckets of one aspect, the largest that the picture fills, or the smallest.
    """
    across, down = np.array(buckets, float).T
    away = np.abs(np.log(widths / heights)[:, None] - np.log(across / down))
    filled = (across <= widths[:, None]) & (down <= heights[:, None])
    area = across * down
    preference = np.where(filled, area, -area)
    preference[away > away.min(1, keepdims=True) + 1e-6] = -np.inf
    return preference.argmax(1)


def sizes_of(rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Widths and heights of the samples' pictures: of the output image; of conversations, of the first; 1 without any."""
    output, inputs = rows["output_size"].combine_chunks(), rows["input_sizes"].combine_chunks()
    asked = output.is_null().to_numpy(False)
    lengths = pc.list_value_length(inputs).to_numpy(False)
    flat = inputs.flatten()
    first = (np.cumsum(lengths) - lengths)[asked & (lengths > 0)]
    sides = []
    for name in ("width", "height"):
        side = pc.struct_field(output, name).fill_null(1).to_numpy(False).astype(float)
        side[asked & (lengths > 0)] = pc.struct_field(flat, name).to_numpy(False)[first]
        sides.append(np.maximum(side, 1))
    return sides[0], sides[1]


def kept(shares: dict[int, float], buckets: tuple[Size, ...], least: float) -> dict[int, int]:
    """Which bucket serves for each: itself, or if its share is below `least`, the nearest in aspect that is not."""
    large = [b for b, share in shares.items() if share >= least] or [max(shares, key=lambda b: shares[b])]
    aspect = [np.log(w / h) for w, h in buckets]
    area = [w * h for w, h in buckets]
    near = {b: min(large, key=lambda k: (round(abs(aspect[k] - aspect[b]), 6), abs(area[k] - area[b]))) for b in shares}
    return {b: b if b in large else near[b] for b in shares}
