"""Orders that can be computed at a point: keyed permutations, and an order in blocks whose bytes lie together.

`permuted` sends each place of a range to another: a random order, of which nothing is stored. Read in such an order,
the samples of a large corpus are one read each. An order in blocks is nearly as mixed, and is read in large pieces: the
range is cut into blocks of neighbours, the blocks are put into a random order, and `lanes` of them are open at a time.
Each time one sample is taken out of each of `block` different ones: a block's first from the newest, its last from the
oldest. So the samples of a block come one after the other as they lie, evenly spaced, and whoever looks ahead by a part
of a block's time reads this part of it at once. (It is a convolutional interleaver, Forney 1971, closed into a ring.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from x2i.base.seeds import digest

_ROUNDS = 6

#: Fewest blocks that are open at a time: where a window holds fewer, its blocks are smaller.
_LANES = 16


@dataclass(frozen=True)
class Order:
    """The order of `size` samples that lie side by side.

    `block` neighbours belong together (1: none do, and the order is a plain permutation); of `lanes` blocks samples come
    by turns.
    """

    size: int
    block: int
    lanes: int

    @classmethod
    def of(cls, size: int, block: int, window: int) -> Order:
        """An order in which blocks of so many samples come within so many places; if all do, a plain permutation."""
        if size <= window:
            return cls(size, 1, 1)
        block = max(min(block, window // _LANES), 1)
        return cls(size, block, max(min(window // block, -(-size // block)), 1))

    def at(self, place: int, *key: int | str) -> int:
        """Which of the samples comes at a place."""
        if self.block == 1:
            return permuted(place, self.size, *key)
        blocks = -(-self.size // self.block)
        while True:  # the last block may not be full: what would be in it is sent on
            turn, within = divmod(place, self.block)
            slot = (turn - within * self.lanes // self.block) % blocks
            place = permuted(slot, blocks, *key) * self.block + within
            if place < self.size:
                return place

    def all(self, *key: int | str) -> np.ndarray:
        """The samples in order, int64 [size]."""
        keys = np.array([round_keys(*key)], np.uint64)
        blocks = -(-self.size // self.block)
        home = permuted_all(np.arange(blocks), np.full(blocks, blocks), np.repeat(keys, blocks, 0))
        if self.block == 1:
            return home
        place, over = np.arange(self.size), np.arange(self.size)
        while len(over):
            turn, within = np.divmod(place[over], self.block)
            slot = (turn - within * self.lanes // self.block) % blocks
            place[over] = home[slot] * self.block + within
            over = over[place[over] >= self.size]
        return place


def permuted(place: int, size: int, *key: int | str) -> int:
    """Where a keyed permutation of range(size) sends `place`. Every key is another permutation.

    A balanced Feistel network over the next even number of bits (Luby and Rackoff 1988), applied again
    while its result lies outside the range (cycle walking, Black and Rogaway 2002): four times at most
    on average, and no memory.
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    rounds = round_keys(*key)
    while True:
        left, right = place >> half, place & mask
        for round_key in rounds:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        place = left << half | right
        if place < size:
            return place


def permuted_all(places: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """As `permuted`, of many places, each with a size and the round keys (uint64 [places, rounds]) of its own."""
    different, which = np.unique(sizes, return_inverse=True)
    half = np.array([max((size - 1).bit_length() + 1, 2) // 2 for size in different.tolist()], np.uint64)[which]
    out, wide = places.astype(np.uint64), sizes.astype(np.uint64)
    left_over = np.arange(len(out))
    while len(left_over):
        by, rounds = half[left_over], keys[left_over]
        mask = (np.uint64(1) << by) - np.uint64(1)
        left, right = out[left_over] >> by, out[left_over] & mask
        for number in range(rounds.shape[1]):
            left, right = right, left ^ (_mix_all(right ^ rounds[:, number]) & mask)
        out[left_over] = left << by | right
        left_over = left_over[out[left_over] >= wide[left_over]]
    return out.astype(np.int64)


@lru_cache(maxsize=8192)
def round_keys(*key: int | str) -> tuple[int, ...]:
    """The round keys of a permutation with this key, 32 bits each."""
    whole = digest("plan/permutation/1", *key)
    return tuple(int(whole[i * 8 : i * 8 + 8], 16) for i in range(_ROUNDS))


def _mix(x: int) -> int:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31


def _mix_all(x: np.ndarray) -> np.ndarray:
    """`_mix` of many, uint64: numpy's arithmetic wraps by itself."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
