"""Near duplicates by Hamming distance on 64-bit hashes: every pair is compared, none can be missed."""

from dataclasses import dataclass

import numpy as np

#: Most distances held at a time (8 bytes each while they are computed), and most hashes in a block.
DISTANCES, BLOCK = 4_000_000, 256


@dataclass(frozen=True)
class NearDuplicates:
    """Indices into the hashes: row `dropped[i]` falls to `survivor[i]`, `distance[i]` bits away (int64 arrays)."""

    dropped: np.ndarray
    survivor: np.ndarray
    distance: np.ndarray


def near_duplicates(hashes: np.ndarray, bits: int) -> NearDuplicates:
    """Drop each hash that lies within `bits` of a better one that stays.

    Hashes come best first. Going down the order, a hash stays unless one that stays is within the bound;
    it then falls to the best such. So no two survivors are within `bits` of each other, and none falls
    to a row that is itself gone: chains of lookalikes are not swallowed whole.

    Args:
        hashes: uint64 [N], best first.
        bits: largest Hamming distance at which two hashes count as the same, 0 to 64.
    """
    hashes = np.asarray(hashes, dtype=np.uint64)
    kept = np.empty(len(hashes), np.int64)
    count = 0
    dropped: list[int] = []
    survivor: list[int] = []
    distance: list[int] = []
    start = 0
    while start < len(hashes):
        block = hashes[start : start + max(1, min(BLOCK, DISTANCES // (count + 1)))]
        # against the survivors of earlier blocks at once, then one by one against this block's own
        earlier = np.bitwise_count(block[:, None] ^ hashes[kept[:count]][None, :])
        own = np.bitwise_count(block[:, None] ^ block[None, :])
        first_own = count
        for i in range(len(block)):
            near = np.flatnonzero(earlier[i] <= bits)
            if len(near):
                which, how_far = int(kept[near[0]]), int(earlier[i][near[0]])
            else:
                mine = kept[first_own:count] - start
                near = np.flatnonzero(own[i][mine] <= bits)
                if not len(near):
                    kept[count] = start + i
                    count += 1
                    continue
                which, how_far = int(kept[first_own + near[0]]), int(own[i][mine[near[0]]])
            dropped.append(start + i)
            survivor.append(which)
            distance.append(how_far)
        start += len(block)
    return NearDuplicates(*(np.asarray(x, np.int64) for x in (dropped, survivor, distance)))
