"""Cut a sorted list into runs where its names say so: a new name moves the cuts near it, and no others.

A cut follows every name whose hash is the smallest among its neighbours, `size // 2` on either side.
So cuts are at least `size // 2` apart and `size` apart on average, and a name that comes or goes can
matter only to cuts within that reach: typically one run changes, at worst three. (Local-minimum
chunking, as in Bjørner et al., "Content-dependent chunking for differential compression", 2010.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

#: A run that chance leaves without a cut for so many times `size` is cut all the same.
LONGEST = 4


def cut(names: Sequence[str], size: int) -> Iterator[range]:
    """Yield the runs, as ranges of indices. `size` is the length aimed at; up to `size` names stay whole."""
    if not names:
        return
    reach = max(size // 2, 1)
    start = 0
    for end in [*_cuts(names, reach), len(names)]:
        while end - start > LONGEST * size:
            yield range(start, start + size)
            start += size
        yield range(start, end)
        start = end


def _cuts(names: Sequence[str], reach: int) -> list[int]:
    """Positions before which to cut. Names nearer to an end than `reach` make no cut."""
    width = 2 * reach + 1
    if len(names) < width:
        return []
    raw = b"".join(hashlib.blake2b(n.encode(), digest_size=8).digest() for n in names)
    hashes = np.frombuffer(raw, dtype="<u8")
    smallest = np.lib.stride_tricks.sliding_window_view(hashes, width).min(axis=1)
    middle = hashes[reach : len(hashes) - reach]
    return [int(i) + reach + 1 for i in np.flatnonzero(middle == smallest)]
