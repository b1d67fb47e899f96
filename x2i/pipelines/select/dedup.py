"""Near duplicates by Hamming distance on 64-bit hashes: exact, for as many as memory holds.

Memory beyond the hashes themselves: at most about 60 bytes a hash and 200 MB, whatever they are like: 16 GB
of memory hold some 250 million, 64 GB a billion. `benchmarks/dedup.py` measures it, and the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from x2i.pipelines.select.hamming import pairs_between, pairs_within

#: Pairs held at a time, 8 bytes each: so many a hash, but this many at least. Where more are near each other,
#: the better half is judged first, and the rest then meets its survivors only.
PAIRS_PER_HASH, PAIRS = 2, 1 << 21
#: Rounds in which all undecided hashes are judged at once; what is left then goes one by one.
ROUNDS = 30
#: Pairs looked at together.
CHUNK = 1 << 18

_UNDECIDED, _STAYS, _FALLS = 0, 1, 2
#: In the place of a row to fall to: the row stays.
STAYS_HERE = np.uint32(0xFFFFFFFF)


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
        hashes: uint64 [N], best first; N below 2**32.
        bits: largest Hamming distance at which two hashes count as the same, 0 to 64.
    """
    hashes = np.ascontiguousarray(hashes, dtype=np.uint64)
    if len(hashes) >= STAYS_HERE:
        raise ValueError(f"{len(hashes):,} hashes, where {int(STAYS_HERE) - 1:,} are the most")
    firsts, copies, originals = _distinct(hashes)
    distinct = hashes[firsts] if len(copies) else hashes
    fell = np.full(len(distinct), STAYS_HERE)
    _judge(distinct, bits, None, fell)
    gone = np.flatnonzero(fell != STAYS_HERE)
    # a copy goes where the first of its kind went; if that stays, it falls to it
    took = fell[np.searchsorted(firsts, originals)]
    took = np.where(took == STAYS_HERE, originals, firsts[np.where(took == STAYS_HERE, 0, took)])
    dropped = np.concatenate([firsts[gone], copies])
    survivor = np.concatenate([firsts[fell[gone]], took])
    order = np.argsort(dropped)
    dropped, survivor = dropped[order], survivor[order]
    distance = np.bitwise_count(hashes[dropped] ^ hashes[survivor])
    return NearDuplicates(*(x.astype(np.int64) for x in (dropped, survivor, distance)))


def _distinct(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows at which a hash appears first, ascending; all other rows, and the first row of each; uint32 all."""
    order = np.argsort(hashes, kind="stable").astype(np.uint32)
    new = np.ones(len(hashes), bool)
    for start in range(1, len(hashes), CHUNK):
        rows = order[start - 1 : start + CHUNK]
        new[start : start + CHUNK] = hashes[rows[1:]] != hashes[rows[:-1]]
    if new.all():
        none = np.empty(0, np.uint32)
        return np.arange(len(hashes), dtype=np.uint32), none, none
    firsts, copies = order[new], np.flatnonzero(~new)
    originals = firsts[np.searchsorted(np.flatnonzero(new), copies) - 1]
    return np.sort(firsts), order[copies], originals


def _judge(hashes: np.ndarray, bits: int, rows: np.ndarray | None, fell: np.ndarray) -> None:
    """Write into `fell`, for those of `rows` (ascending; None is all) that fall, the row that each falls to.

    `hashes` are distinct, and none of `rows` is near a survivor among the rest.
    """
    mine = hashes if rows is None else hashes[rows]
    pairs = _all_pairs(mine, bits)
    if pairs is not None:
        local = down_the_order(pairs, len(mine))
        if rows is None:
            fell[:] = local
        else:
            gone = np.flatnonzero(local != STAYS_HERE)
            fell[rows[gone]] = rows[local[gone]]
        return
    half = len(mine) // 2
    if rows is None:
        rows = np.arange(len(mine), dtype=np.uint32)
    del mine
    better, rest = rows[:half], rows[half:]
    _judge(hashes, bits, better, fell)
    stayed = better[fell[better] == STAYS_HERE]
    near = np.full(len(rest), STAYS_HERE)
    for row, by, _ in pairs_between(hashes[rest], hashes[stayed], bits):
        np.minimum.at(near, row, by.astype(np.uint32))
    caught = near != STAYS_HERE
    fell[rest[caught]] = stayed[near[caught]]
    _judge(hashes, bits, rest[~caught], fell)


def _all_pairs(hashes: np.ndarray, bits: int) -> np.ndarray | None:
    """All pairs within `bits`, uint64 [M], the worse row in the upper 32 bits; None where they are too many to hold."""
    held = np.empty(max(PAIRS, PAIRS_PER_HASH * len(hashes)), np.uint64)  # costs what is written to
    count = 0
    for better, worse in pairs_within(hashes, bits):
        if count + len(better) > len(held):
            return None
        held[count : count + len(better)] = (worse.astype(np.uint64) << np.uint64(32)) | better.astype(np.uint64)
        count += len(better)
    return held[:count]


def down_the_order(pairs: np.ndarray, count: int) -> np.ndarray:
    """Which of `count` rows fall, and to which (the best that stays and makes a pair with it); uint32, `STAYS_HERE` where it stays."""
    state = np.zeros(count, np.uint8)
    left, into = pairs, np.empty_like(pairs)
    for _ in range(ROUNDS):
        for better, worse in _sides(left):
            state[worse[state[better] == _STAYS]] = _FALLS
        # a pair matters while both are undecided; who is the worse of none such, has nobody left to fall to
        waits = np.zeros(count, bool)
        kept = 0
        for start, (better, worse) in zip(range(0, len(left), CHUNK), _sides(left), strict=True):
            open_ = (state[better] == _UNDECIDED) & (state[worse] == _UNDECIDED)
            waits[worse[open_]] = True
            some = left[start : start + CHUNK][open_]
            into[kept : kept + len(some)] = some
            kept += len(some)
        left = into = into[:kept]
        state[(state == _UNDECIDED) & ~waits] = _STAYS
        if not kept:
            break
    else:
        _one_by_one(np.sort(left), state)
    fell = np.full(count, STAYS_HERE)
    for better, worse in _sides(pairs):
        counts = (state[better] == _STAYS) & (state[worse] == _FALLS)
        np.minimum.at(fell, worse[counts], better[counts].astype(np.uint32))
    return fell


def _one_by_one(pairs: np.ndarray, state: np.ndarray) -> None:
    """Decide, in order, the worse rows of sorted pairs whose rows are all undecided."""
    now = state.data
    row = -1
    for better, worse in _sides(pairs):
        for b, w in zip(better.tolist(), worse.tolist(), strict=True):
            if w != row:
                if row >= 0 and now[row] == _UNDECIDED:
                    now[row] = _STAYS
                row = w
            if now[b] == _STAYS:
                now[w] = _FALLS
    if row >= 0 and now[row] == _UNDECIDED:
        now[row] = _STAYS


def _sides(pairs: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The better and the worse rows of pairs, in chunks; int64."""
    for start in range(0, len(pairs), CHUNK):
        chunk = pairs[start : start + CHUNK]
        yield (chunk & np.uint64(0xFFFFFFFF)).astype(np.int64), (chunk >> np.uint64(32)).astype(np.int64)
