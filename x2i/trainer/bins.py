"""Bin packing of whole numbers: how samples of these lengths go into packs of one size."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

#: Pairs of items that are compared at once, and items of a bin, evenly spaced, of which one may be exchanged.
_AT_ONCE, _WIDEST = 1 << 20, 96

#: Bins with room that one which is too full is paired with, at most.
_TURNS = 8

#: Items in a bin, below which it is worth while to look for those that fill it.
_FEW = 8

#: How often items are drawn anew to see whether as many fit again.
_AGAIN = 4

#: Of the items of a window, those that may be left out for the others to fit; and more than are left out by rights.
LEFT, _MANY = 0.002, 0.008


def balanced(lengths: np.ndarray, bins: int) -> np.ndarray:
    """The bin of each item: longest first, each into the least loaded (LPT, Graham 1969)."""
    loads = [(0, number) for number in range(bins)]
    out = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    for item, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        load, number = loads[0]
        out[item] = number
        heapq.heapreplace(loads, (load + length, number))
    return out


def filled(lengths: np.ndarray, bins: int, limit: int, sample: int = 40) -> np.ndarray:
    """The bin of each item: bins are filled one after the other, each with what fills it best.

    Each gets the longest item that is left, and beside it of some others, evenly spread over those that are left, the
    subset with the largest sum that fits (Gupta and Ho 1999, minimum bin slack; sums are bits of a number). What is left
    when no bin is goes into the emptiest ones.
    """
    rest = np.argsort(-lengths, kind="stable").tolist()
    sizes = lengths.tolist()
    out = np.empty(len(lengths), np.int64)
    loads = np.zeros(bins, np.int64)
    for number in range(bins):
        if not rest:
            break
        first, room = rest[0], limit - sizes[rest[0]]
        step = max((len(rest) - 1) // sample, 1)
        some = [item for item in rest[1 + number % step :: step] if sizes[item] <= room]
        sums, within = [1], (1 << max(room, 0) + 1) - 1
        for item in some:
            sums.append((sums[-1] | sums[-1] << sizes[item]) & within)
        at, taken = sums[-1].bit_length() - 1, {first}
        for place in range(len(some), 0, -1):
            if not sums[place - 1] >> at & 1:
                taken.add(some[place - 1])
                at -= sizes[some[place - 1]]
        for item in taken:
            out[item] = number
            loads[number] += sizes[item]
        rest = [item for item in rest if item not in taken]
    for item in rest:
        number = int(loads.argmin())
        out[item] = number
        loads[number] += sizes[item]
    return out


def repair(lengths: np.ndarray, home: np.ndarray, bins: int, limit: int) -> bool:
    """Exchange items between bins, in place, until none holds more than `limit`. False if no exchange helps any more.

    Full bins are paired with empty ones. Each gives an item, or exchanges it for a shorter one: of what the other has
    room for, the one that moves least and is enough; if none is enough, the one that moves most.

    Args:
        lengths: of the items, int64.
        home: the bin of each, changed.
    """
    loads = np.bincount(home, lengths, bins).astype(np.int64)
    turn = 0
    for _ in range(400):
        full = np.flatnonzero(loads > limit)
        if not len(full):
            return True
        empty = np.flatnonzero(loads < limit)
        if turn * len(full) >= len(empty) or turn >= _TURNS:  # all were tried, or enough of them
            return False
        full, empty = full[np.argsort(-loads[full], kind="stable")], empty[np.argsort(loads[empty], kind="stable")]
        pairs = min(len(full), len(empty))
        full, empty = full[:pairs], np.roll(empty, -turn * pairs)[:pairs]
        turn = 0 if _exchange(lengths, home, loads, full, empty, limit) else turn + 1
    return False


def _exchange(
    lengths: np.ndarray, home: np.ndarray, loads: np.ndarray, full: np.ndarray, empty: np.ndarray, limit: int
) -> bool:
    """One exchange for each pair of bins; whether there was any."""
    order = np.argsort(home.astype(np.uint16) if len(loads) <= 1 << 16 else home, kind="stable")  # much faster
    firsts = np.searchsorted(home[order], np.arange(len(loads) + 1))
    counts = np.diff(firsts)
    widest = min(int(max(counts[full].max(), counts[empty].max())), _WIDEST)
    spread = np.arange(widest)[None] * np.maximum(counts, widest)[:, None] // widest
    step = max(_AT_ONCE // (widest * (widest + 1)), 1)
    any_moved = False
    for begin in range(0, len(full), step):
        one, other = full[begin : begin + step], empty[begin : begin + step]
        mine, theirs = (
            np.where(spread[b] < counts[b][:, None], firsts[b][:, None] + spread[b], -1) for b in (one, other)
        )
        gives = np.where(mine >= 0, lengths[order[mine]], -1)
        takes = np.where(theirs >= 0, lengths[order[theirs]], 1 << 40)
        takes = np.concatenate([takes, np.zeros((len(other), 1), np.int64)], 1)  # the last: nothing is taken back
        moved = gives[:, :, None] - takes[:, None]
        excess, slack = (loads[one] - limit)[:, None, None], (limit - loads[other])[:, None, None]
        worth = np.where(moved >= excess, (1 << 41) - moved, moved)
        worth[(moved > slack) | (moved <= 0)] = -1
        flat = worth.reshape(len(one), -1)
        best = flat.argmax(1)
        for pair in np.flatnonzero(flat[np.arange(len(one)), best] > 0).tolist():
            give, take = divmod(int(best[pair]), widest + 1)
            by = int(moved[pair, give, take])
            home[order[mine[pair, give]]] = other[pair]
            if take < widest:
                home[order[theirs[pair, take]]] = one[pair]
            loads[one[pair]] -= by
            loads[other[pair]] += by
            any_moved = True
    return any_moved


def placed(lengths: np.ndarray, bins: int, limit: int, home: np.ndarray) -> np.ndarray:
    """The bin of each item, -1 for those that are left out for the others to fit: `home`, mended (`mended`).

    If many are left out, items are put into bins anew.
    """
    found = mended(lengths, bins, limit, home)
    if np.count_nonzero(found < 0) <= _MANY * len(found):
        return found
    start = filled(lengths, bins, limit) if len(lengths) <= _FEW * bins else balanced(lengths, bins)
    other = mended(lengths, bins, limit, start)
    return other if lengths[other >= 0].sum() > lengths[found >= 0].sum() else found


def mended(lengths: np.ndarray, bins: int, limit: int, home: np.ndarray, most: float = 1.0) -> np.ndarray:
    """The bin of each item, -1 for those that are left out for the others to fit: `home`, mended by exchanges.

    Where no exchange helps, items are left out of the fullest bins, as many as take what all have too much, and then it
    is tried again. Of a bin it is the shortest without which it fits, or the longest.

    Args:
        most: share of the items, after which it is given up, and bins stay too full.
    """
    home, sizes = home.copy(), lengths.copy()
    out = np.zeros(len(home), bool)
    while not repair(sizes, home, bins, limit) and out.sum() <= most * len(out):
        excess = np.bincount(home, sizes, bins) - limit
        full, gone = np.flatnonzero(excess > 0), 0
        total = int(excess[full].sum())
        for number in full[np.argsort(-excess[full], kind="stable")].tolist():
            mine = np.flatnonzero((home == number) & ~out)
            enough = mine[sizes[mine] >= excess[number]]
            item = int(enough[sizes[enough].argmin()] if len(enough) else mine[sizes[mine].argmax()])
            gone += int(sizes[item])
            out[item], sizes[item] = True, 0
            if gone >= total:
                break
    home[out] = -1
    return home


@dataclass(frozen=True)
class Pattern:
    """A window of items, as many as fit.

    Attributes:
        home: the bin of each of those that fit, in order of length.
        count: how many are drawn for it.
        items, fill: mean number and sum of those that fit.
    """

    home: np.ndarray
    count: int
    items: float
    fill: float


def most(drawn: Callable[[int], np.ndarray], bins: int, limit: int, count: int) -> Pattern:
    """As many items as fit again and again, but for `LEFT` of them.

    Args:
        drawn: lengths of the items that might be among so many draws, in order; others each time.
        count: of draws; more can never fit.
    """

    def begun(count: int) -> np.ndarray:
        """The bins of a first window; -1 for what is left out. Of several rules the best: each has its luck."""
        best = np.zeros(0, np.int64)
        for rule in (40, 160) if count < _FEW * bins else (0, 40) if count < 2 * _FEW * bins else (0,):
            lengths = drawn(count)
            start = filled(lengths, bins, limit, rule) if rule else balanced(lengths, bins)
            found = mended(lengths, bins, limit, start, 2 * LEFT)
            best = found if np.count_nonzero(found >= 0) > np.count_nonzero(best >= 0) else best
            left = np.count_nonzero(found < 0)
            if not left or (rule and left > 2 * LEFT * len(found)):
                break
        return best

    def tried(count: int) -> tuple[Pattern, bool]:
        home = begun(count)
        kept = home[home >= 0]
        if len(home) - len(kept) > 2 * LEFT * len(home):
            return Pattern(kept, count, len(kept), 0), False
        left, items, sums = 0, list[int](), list[int]()
        while len(items) < _AGAIN and left <= 4 * LEFT * len(home):
            lengths = drawn(count)
            found = mended(lengths, bins, limit, fitted(kept, lengths, bins), 2 * LEFT) >= 0
            left += int((~found).sum())
            items.append(int(found.sum()))
            sums.append(int(lengths[found].sum()))
        pattern = Pattern(kept, count, float(np.mean(items)), float(np.mean(sums)))
        return pattern, left <= max(LEFT * sum(items), len(items) - 1)

    high, low, step = count + 1, count, max(count // 800, 1)
    best, fits = tried(low)
    while not fits and low > 1:  # from above by steps that double: the answer is mostly near
        high, low, step = low, max(low - step, 1), 2 * step
        best, fits = tried(low)
    least = max(count // 1600, 1)
    while high - low > least:
        middle = (low + high) // 2
        other, fits = tried(middle)
        best, low, high = (other, middle, high) if fits else (best, low, middle)
    for number in range(high, min(high + 3 * least, count), least):  # what failed may have had bad luck
        other, fits = tried(number)
        best = other if fits else best
    return best


def fitted(home: np.ndarray, lengths: np.ndarray, bins: int) -> np.ndarray:
    """The bins of items, in order of length, by a pattern for another number of them."""
    count = len(lengths)
    if count <= len(home):
        return home[((np.arange(count) + 0.5) * len(home) / max(count, 1)).astype(np.int64)]
    kept = ((np.arange(len(home)) + 0.5) * count / max(len(home), 1)).astype(np.int64)
    out = np.full(count, -1)
    out[kept] = home
    loads = np.bincount(home, lengths[kept], bins)
    for item in np.flatnonzero(out < 0)[::-1].tolist():
        out[item] = int(loads.argmin())
        loads[out[item]] += lengths[item]
    return out
