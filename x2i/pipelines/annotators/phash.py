"""`phash`: a 64-bit perceptual hash, equal or nearly so for pictures that look the same."""

from collections.abc import Sequence

import cv2
import numpy as np
import pyarrow as pa

from x2i.pipelines.annotators._pictures import pixels
from x2i.pipelines.annotators.base import Annotator, Item

SIDE, KEPT = 32, 8


def phash(picture: np.ndarray) -> int:
    """pHash (Zauner 2010, "Implementation and benchmarking of perceptual image hash functions").

    Luma at 32x32 by area averaging, 2-D DCT-II, the 8x8 lowest frequencies, each bit whether a
    coefficient exceeds their median; row by row, most significant bit first, as ImageHash lays them out.

    Args:
        picture: uint8 [height, width, 3] RGB.
    """
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float64)
    low = cv2.dct(small)[:KEPT, :KEPT]
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


class PHash(Annotator):
    """The hash as an unsigned integer: in DuckDB `bit_count(xor(a.hash, b.hash))` is the Hamming distance."""

    name = "phash"
    columns = pa.schema({"hash": pa.uint64()})

    @property
    def shorter_side(self) -> int:
        return 256

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        return pa.table({"hash": pa.array([phash(p) for p in pixels(batch)], pa.uint64())})
