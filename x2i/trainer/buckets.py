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
    by_aspect: dict[float, list[int]] = {}
    for bucket in sorted(range(len(buckets)), key=lambda b: buckets[b][0] * buckets[b][1]):
        by_aspect.setdefault(round(buckets[bucket][0] / buckets[bucket][1], 6), []).append(bucket)
    aspects = sorted(by_aspect)
    between = np.sqrt(np.array(aspects[1:]) * np.array(aspects[:-1]))
    ratio = widths / heights
    which = np.zeros(len(ratio), np.int64)
    for bound in between:  # few: faster than to search
        which += ratio > bound
    found = np.array([by_aspect[a][0] for a in aspects])[which]
    for place, aspect in enumerate(aspects):
        for bucket in by_aspect[aspect][1:]:
            width, height = buckets[bucket]
            found[(which == place) & (widths >= width) & (heights >= height)] = bucket
    return found


def sizes_of(rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Widths and heights of the samples' pictures: of the output image; of conversations, of the first; 1 without any."""
    output = rows["output_size"].combine_chunks()
    sides = [pc.struct_field(output, name).to_numpy(False).astype(float) for name in ("width", "height")]
    if output.null_count:
        asked = output.is_null().to_numpy(False)
        inputs = rows["input_sizes"].combine_chunks()
        lengths = pc.list_value_length(inputs).to_numpy(False)
        flat, shown = inputs.flatten(), asked & (lengths > 0)
        first = (np.cumsum(lengths) - lengths)[shown]
        for side, name in zip(sides, ("width", "height"), strict=True):
            side[asked] = 1
            side[shown] = pc.struct_field(flat, name).to_numpy(False)[first]
    return np.maximum(sides[0], 1), np.maximum(sides[1], 1)


def kept(shares: dict[int, float], buckets: tuple[Size, ...], least: float) -> dict[int, int]:
    """Which bucket serves for each: itself, or if its share is below `least`, the nearest in aspect that is not."""
    large = [b for b, share in shares.items() if share >= least] or [max(shares, key=lambda b: shares[b])]
    aspect = [np.log(w / h) for w, h in buckets]
    area = [w * h for w, h in buckets]
    near = {b: min(large, key=lambda k: (round(abs(aspect[k] - aspect[b]), 6), abs(area[k] - area[b]))) for b in shares}
    return {b: b if b in large else near[b] for b in shares}
