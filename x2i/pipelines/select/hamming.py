"""Every pair of 64-bit hashes within a Hamming distance, without comparing all of them: exact, in bounded memory.

The 64 bits are dealt into r + c blocks. Two hashes that differ in at most r bits agree on the whole of at
least c blocks; so it is enough to compare, for each choice of c blocks, those that agree on them (Manku, Jain
and Das Sarma 2007, "Detecting near-duplicates for web crawling"; multi-index hashing, Norouzi, Punjani and
Fleet 2012, arXiv 1307.2982). Bits that say little (nearly always 0, or nearly always 1) are shared out among the blocks.
c is chosen by what the work is estimated to cost; with c = 0 all pairs are compared.

Choices of blocks are gone through one at a time, each on a copy of the hashes that is sorted in place.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

#: Hashes compared at once (they and their distances stay in the processor's cache), and hashes sorted out at once.
CELLS, SLICE = 1 << 16, 1 << 21
#: Hits gathered before they are looked at.
HITS = 1 << 18
#: A run of hashes that agree on the chosen blocks is divided anew, by the bits that differ in it, from this length on ...
HEAVY = 1 << 14
#: ... at most so many times.
DEPTH = 4
#: Most blocks that are chosen, and most choices: beyond, other costs than comparisons rule.
MOST_CHOSEN, MOST_TABLES = 6, 5000

# costs in nanoseconds, of one core; only their ratios count
_COMPARE, _LOOK, _SORT, _FIND, _TABLE = 1.0, 12.0, 35.0, 40.0, 2e6

_Pairs = tuple[np.ndarray, np.ndarray]


def pairs_within(hashes: np.ndarray, bits: int) -> Iterator[_Pairs]:
    """Each pair of hashes at most `bits` apart, once, as (i, j) with i < j: chunks of int64 arrays, in no order.

    Memory: 20 bytes a hash (28 while they are sorted for the first time) and about 100 MB.

    Args:
        hashes: uint64 [N], no two equal.
        bits: 0 to 64.
    """
    order = np.argsort(hashes).astype(np.uint32 if len(hashes) < 2**32 else np.int64)
    ordered = hashes[order]
    for pair in _within(hashes, bits, 0):
        a, b = (order[_places(ordered, side)].astype(np.int64) for side in pair)
        yield np.minimum(a, b), np.maximum(a, b)


def pairs_between(
    queries: np.ndarray, hashes: np.ndarray, bits: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Each pair of a query and a hash at most `bits` apart, once: chunks of (query, hash, distance), in no order.

    Memory: 24 bytes a hash, nothing a query, and about 100 MB.

    Args:
        queries: uint64 [Q]; `hashes`: uint64 [N]; equal ones may be among them.
        bits: 0 to 64.
    """
    if not len(queries) or not len(hashes):
        return
    cut = _choose_between(queries, hashes, bits)
    if not cut.chosen:
        yield from _all_between(queries, hashes, bits)
        return
    for table in cut.tables():
        yield from _look_up(queries, hashes, table, bits)


@dataclass(frozen=True)
class _Cut:
    """How the 64 bits are dealt: `dealt` names them (0 is the most significant), block after block."""

    dealt: np.ndarray
    widths: tuple[int, ...]
    chosen: int

    def tables(self) -> Iterator[_Table]:
        for chosen in itertools.combinations(range(len(self.widths)), self.chosen):
            yield _Table(self, chosen)


class _Table:
    """One choice of blocks: a permutation of the bits that brings these to the top."""

    def __init__(self, cut: _Cut, chosen: tuple[int, ...]) -> None:
        ends = np.cumsum(cut.widths)
        places = [np.arange(end - width, end) for width, end in zip(cut.widths, ends, strict=True)]
        order = [*chosen, *(b for b in range(len(places)) if b not in chosen)]
        self._bits = cut.dealt[np.concatenate([places[b] for b in order])]
        self.key = sum(cut.widths[b] for b in chosen)
        low = 64 - np.cumsum([cut.widths[b] for b in order])
        masks = [np.uint64(((1 << cut.widths[b]) - 1) << int(shift)) for b, shift in zip(order, low, strict=True)]
        # A pair belongs to the first choice of blocks on which it agrees, or it would be found many times.
        self._agree = masks[: cut.chosen]
        self._differ = [m for m, b in zip(masks, order, strict=True) if b not in chosen and b < chosen[-1]]

    @cached_property
    def forth(self) -> _Permutation:
        return _Permutation(self._bits)

    @cached_property
    def back(self) -> _Permutation:
        return _Permutation(np.argsort(self._bits))

    def owns(self, difference: np.ndarray) -> np.ndarray:
        """Which pairs are this choice's, by the bits (as it lays them out) in which they differ."""
        own = np.ones(len(difference), bool)
        for mask in self._agree:
            own &= (difference & mask) == 0
        for mask in self._differ:
            own &= (difference & mask) != 0
        return own


class _Permutation:
    """A permutation of the bits of uint64, by tables of 16 bits each."""

    def __init__(self, bits: np.ndarray) -> None:
        """`bits[p]` is the bit that goes to place p; 0 is the most significant."""
        weight = np.empty(64, np.uint64)
        weight[bits] = np.uint64(1) << np.arange(63, -1, -1, dtype=np.uint64)
        values = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.uint64)
        bytes_ = [values @ weight[8 * k : 8 * k + 8] for k in range(8)]
        self._tables = [(bytes_[2 * k][:, None] | bytes_[2 * k + 1][None]).ravel() for k in range(4)]

    def __call__(self, hashes: np.ndarray) -> np.ndarray:
        out = np.empty_like(hashes)
        for start in range(0, len(hashes), CELLS):
            block = hashes[start : start + CELLS]
            into = out[start : start + CELLS]
            np.take(self._tables[0], (block >> np.uint64(48)).astype(np.intp), out=into, mode="clip")
            for k in range(1, 4):
                words = ((block >> np.uint64(48 - 16 * k)) & np.uint64(0xFFFF)).astype(np.intp)
                into |= np.take(self._tables[k], words, mode="clip")
        return out


def _shares(hashes: np.ndarray) -> np.ndarray:
    """Of each bit, the most significant first, the share of ones: float64 [64], of at most 65,536 of the hashes."""
    some = np.ascontiguousarray(hashes[:: len(hashes) // 65536 + 1], dtype=">u8")
    return np.unpackbits(some.view(np.uint8)).reshape(-1, 64).mean(axis=0)


def _deal(a: np.ndarray, b: np.ndarray, bits: int, chosen: int) -> tuple[_Cut, float]:
    """The cut into `bits + chosen` blocks, and the share of pairs that one choice of blocks is expected to compare."""
    shares_a, shares_b = _shares(a), _shares(b)
    agree = shares_a * shares_b + (1 - shares_a) * (1 - shares_b)
    says = -np.log2(np.clip(agree, 1e-3, 1))
    blocks = bits + chosen
    # to and fro, as players are dealt cards, so that no block gets the best of each round
    hands: list[list[int]] = [[] for _ in range(blocks)]
    for place, bit in enumerate(np.argsort(-says, kind="stable").tolist()):
        turn, seat = divmod(place, blocks)
        hands[seat if turn % 2 == 0 else blocks - 1 - seat].append(bit)
    known = np.array([says[hand].sum() for hand in hands])
    share = float(np.mean([2 ** -known[list(c)].sum() for c in itertools.combinations(range(blocks), chosen)]))
    return _Cut(np.concatenate([np.array(h, np.int64) for h in hands]), tuple(map(len, hands)), chosen), share


def _choices(bits: int) -> Iterator[tuple[int, int]]:
    """Numbers of chosen blocks that can be had, and how many choices there are of each."""
    for chosen in range(1, MOST_CHOSEN + 1):
        tables = math.comb(bits + chosen, chosen)
        if bits + chosen <= 64 and tables <= MOST_TABLES:
            yield chosen, tables


_ALL = _Cut(np.arange(64), (), 0)


def _choose_within(hashes: np.ndarray, bits: int) -> _Cut:
    n = len(hashes)
    best, least = _ALL, n * n / 2 * _COMPARE
    for chosen, tables in _choices(bits):
        if tables * (_TABLE + n * _SORT) >= least:
            break
        cut, share = _deal(hashes, hashes, bits, chosen)
        cost = tables * (_TABLE + n * (_SORT + n * share / 2 * _COMPARE))
        if cost < least:
            best, least = cut, cost
    return best


def _choose_between(queries: np.ndarray, hashes: np.ndarray, bits: int) -> _Cut:
    q, n = len(queries), len(hashes)
    best, least = _ALL, q * n * _COMPARE
    for chosen, tables in _choices(bits):
        if tables * (_TABLE + q * _FIND + n * _SORT) >= least:
            break
        cut, share = _deal(queries, hashes, bits, chosen)
        cost = tables * (_TABLE + n * _SORT + q * (_FIND + n * share * _LOOK))
        if cost < least:
            best, least = cut, cost
    return best


def _within(hashes: np.ndarray, bits: int, depth: int) -> Iterator[_Pairs]:
    """As `pairs_within`, but the hashes themselves instead of their places."""
    if len(hashes) < 2 or bits < 1:
        return
    cut = _choose_within(hashes, bits)
    if not cut.chosen:
        yield from _all_pairs(hashes, bits)
        return
    for table in cut.tables():
        permuted = table.forth(hashes)
        permuted.sort()
        for a, b in _gathered(_table_pairs(permuted, table, bits, depth)):
            own = table.owns(a ^ b)
            if own.any():
                yield table.back(a[own]), table.back(b[own])


def _table_pairs(ordered: np.ndarray, table: _Table, bits: int, depth: int) -> Iterator[_Pairs]:
    """Pairs within `bits` among those that agree on the chosen blocks; `ordered` by these."""
    low = np.uint64((1 << (64 - table.key)) - 1)
    n, start = len(ordered), 0
    while start < n:
        end = min(start + SLICE, n)
        if end < n:  # not in the middle of a run; a run longer than a slice is a slice of its own
            end = int(np.searchsorted(ordered, ordered[end] & ~low))
            if end <= start:
                end = int(np.searchsorted(ordered, ordered[start] | low, "right"))
        part = ordered[start:end]
        begins = np.flatnonzero(np.concatenate([[True], (part[1:] ^ part[:-1]) > low]))
        lengths = np.diff(begins, append=len(part))
        begins, lengths = begins[lengths > 1], lengths[lengths > 1]
        by_length = np.argsort(lengths, kind="stable")
        begins, lengths = begins[by_length], lengths[by_length]
        alike = np.floor(np.log(lengths) / np.log(1.2))
        for group in np.split(np.arange(len(lengths)), np.flatnonzero(np.diff(alike)) + 1) if len(lengths) else []:
            yield from _runs(part, begins[group], lengths[group], bits, len(part) < n or depth > 0, depth)
        start = end


def _runs(
    part: np.ndarray, begins: np.ndarray, lengths: np.ndarray, bits: int, divide: bool, depth: int
) -> Iterator[_Pairs]:
    """Pairs within `bits` in each of the runs of `part`; they are of about one length."""
    longest = int(lengths[-1])
    if longest >= HEAVY and divide and depth < DEPTH:
        for begin, length in zip(begins, lengths, strict=True):
            yield from _within(part[begin : begin + length], bits, depth + 1)
    elif len(begins) < 8:
        for begin, length in zip(begins, lengths, strict=True):
            yield from _all_pairs(part[begin : begin + length], bits)
    else:
        at_once = max(1, CELLS // longest)
        for i in range(0, len(begins), at_once):  # a run is a column, its last hash repeated where others are longer
            ends = lengths[i : i + at_once]
            columns = part[begins[i : i + at_once] + np.minimum(np.arange(longest)[:, None], ends - 1)]
            for row in range(longest - 1):
                hits = np.flatnonzero(np.bitwise_count(columns[row + 1 :] ^ columns[row]) <= bits)
                if len(hits):
                    below, run = np.divmod(hits, len(ends))
                    there = row + 1 + below < ends[run]
                    below, run = below[there], run[there]
                    yield columns[row, run], columns[row + 1 + below, run]


def _all_pairs(hashes: np.ndarray, bits: int) -> Iterator[_Pairs]:
    rows, columns = 64, CELLS // 64
    for i in range(0, len(hashes), rows):
        mine = hashes[i : i + rows]
        for j in range(i, len(hashes), columns):
            theirs = hashes[j : j + columns]
            near = np.bitwise_count(mine[:, None] ^ theirs) <= bits
            if j < i + rows:  # each pair once, and none with itself
                near &= np.arange(j, j + len(theirs)) > np.arange(i, i + len(mine))[:, None]
            hits = np.flatnonzero(near)
            if len(hits):
                a, b = np.divmod(hits, len(theirs))
                yield mine[a], theirs[b]


def _gathered(chunks: Iterator[_Pairs]) -> Iterator[_Pairs]:
    """The same, in chunks that are worth the handling."""
    waiting: list[_Pairs] = []
    count = 0
    for chunk in chunks:
        waiting.append(chunk)
        count += len(chunk[0])
        if count >= HITS:
            yield np.concatenate([w[0] for w in waiting]), np.concatenate([w[1] for w in waiting])
            waiting, count = [], 0
    if waiting:
        yield np.concatenate([w[0] for w in waiting]), np.concatenate([w[1] for w in waiting])


def _places(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Where each value stands; values that are asked for in their order are found much faster."""
    order = np.argsort(values)
    out = np.empty(len(values), np.int64)
    out[order] = np.searchsorted(ordered, values[order])
    return out


def _all_between(
    queries: np.ndarray, hashes: np.ndarray, bits: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    columns = min(len(hashes), CELLS // 16)
    rows = max(1, CELLS // columns)
    for i in range(0, len(queries), rows):
        for j in range(0, len(hashes), columns):
            distance = np.bitwise_count(queries[i : i + rows, None] ^ hashes[None, j : j + columns])
            hits = np.flatnonzero(distance <= bits)  # np.nonzero takes ten times as long
            if len(hits):
                a, b = np.divmod(hits, distance.shape[1])
                yield a + i, b + j, distance[a, b]


def _look_up(
    queries: np.ndarray, hashes: np.ndarray, table: _Table, bits: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The pairs of one choice of blocks: the hashes that agree with each query on them are looked up."""
    key = min(table.key, len(hashes).bit_length() + 2, 24)  # more would not part the hashes further
    shift = np.uint64(64 - key)
    theirs = table.forth(hashes)
    order = np.argsort(theirs)
    theirs = theirs[order]
    starts = np.searchsorted(theirs >> shift, np.arange((1 << key) + 1, dtype=np.uint64))
    for first in range(0, len(queries), CELLS):
        mine = table.forth(queries[first : first + CELLS])
        at = (mine >> shift).astype(np.int64)
        begins, counts = starts[at], starts[at + 1] - starts[at]
        asked = np.flatnonzero(counts)
        begins, ends = begins[asked], np.cumsum(counts[asked])
        total = int(ends[-1]) if len(ends) else 0
        for low in range(0, total, 4 * CELLS):  # candidate number `low` and on, however they fall on the queries
            high = min(low + 4 * CELLS, total)
            a, b = np.searchsorted(ends, [low, high - 1], "right")
            upto = np.minimum(ends[a : b + 1], high)
            before = np.concatenate([ends[a - 1 : a] if a else [0], ends[a:b]])
            lengths = upto - np.maximum(before, low)
            who = np.repeat(np.arange(a, b + 1), lengths)
            place = np.arange(low, high) + np.repeat(begins[a : b + 1] - before, lengths)
            difference = mine[asked[who]] ^ theirs[place]
            distance = np.bitwise_count(difference)
            near = np.flatnonzero(distance <= bits)
            near = near[table.owns(difference[near])]
            if len(near):
                yield first + asked[who[near]], order[place[near]], distance[near]
