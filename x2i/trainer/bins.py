"""Bin packing of whole numbers: how samples of these lengths go into packs of one size."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable, Iterator

import numpy as np

#: Pairs of items that are compared at once, and items of a bin, evenly spaced, of which one may be exchanged.
_AT_ONCE, _WIDEST = 1 << 20, 96

#: Items in a bin, below which it is worth while to look for those that fill it.
_FEW = 16

#: How often items are drawn anew to see whether as many fit again.
_AGAIN = 6


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


def best_fit(lengths: np.ndarray, bins: int, limit: int) -> np.ndarray:
    """The bin of each item: longest first, each into the fullest that has room; or into the emptiest, if none has."""
    room = [(limit, number) for number in range(bins)]  # sorted
    out = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    for item, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect.bisect_left(room, (length, -1))
        left, number = room.pop(min(place, bins - 1))
        out[item] = number
        bisect.insort(room, (left - length, number))
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
        if turn * len(full) >= len(empty):  # all were tried
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
    order = np.argsort(home, kind="stable")
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


def packed(
    lengths: np.ndarray, bins: int, limit: int, home: np.ndarray | None = None, last: bool = True
) -> tuple[np.ndarray, bool]:
    """The bin of each item, and whether none is too full: `home`, or one of the rules above, mended.

    If no exchange of two items mends any of them, bins that are too full share out all their items anew with others
    (which takes long, and is the `last` that is tried).
    """
    best, excess = np.zeros(len(lengths), np.int64), np.inf
    for start in _starts(lengths, bins, limit, home):
        if repair(lengths, start, bins, limit):
            return start, True
        over = float(np.maximum(np.bincount(start, lengths, bins) - limit, 0).sum())
        if over < excess:
            best, excess = start, over
    for number in np.flatnonzero(np.bincount(best, lengths, bins) > limit).tolist() if last else ():
        _share_out(lengths, best, bins, limit, number)
    return best, bool((np.bincount(best, lengths, bins) <= limit).all())


def _starts(lengths: np.ndarray, bins: int, limit: int, home: np.ndarray | None) -> Iterator[np.ndarray]:
    if home is not None:
        yield home
    few = len(lengths) <= _FEW * bins
    if few and home is not None:  # the dearest, and the surest
        yield filled(lengths, bins, limit)
    yield best_fit(lengths, bins, limit)
    yield balanced(lengths, bins)
    if few and home is None:
        yield filled(lengths, bins, limit)


def _share_out(lengths: np.ndarray, home: np.ndarray, bins: int, limit: int, number: int) -> None:
    """Put the items of a bin that is too full, and of a few of the emptiest, into these bins anew, if they fit."""
    loads = np.bincount(home, lengths, bins)
    others = [other for other in np.argsort(loads, kind="stable").tolist() if other != number]
    for many in (2, 3, 5, 8, 12):
        chosen = np.array([number, *others[:many]])
        items = np.flatnonzero(np.isin(home, chosen))
        for new in (filled(lengths[items], len(chosen), limit, len(items)), balanced(lengths[items], len(chosen))):
            if repair(lengths[items], new, len(chosen), limit):
                home[items] = chosen[new]
                return


def most(
    profile: Callable[[int, np.ndarray | float], np.ndarray],
    bins: int,
    limit: int,
    mean: float,
    random: np.random.Generator,
) -> np.ndarray:
    """The bin of each of as many items as are found to fit; none if not even a few do.

    Where bins hold few items these fit by chance: so as many are taken as fit again if each is a little longer or
    shorter, several times.

    Args:
        profile: lengths of so many items, in order: at these places (0 to 1) between one and the next.
        mean: of the items.
        random: draws the places.
    """

    def fitting(count: int) -> np.ndarray | None:
        home, fits = packed(profile(count, 0.5), bins, limit, last=False)
        return home if fits else None

    def firm(home: np.ndarray) -> bool:
        drawn = (profile(len(home), random.random(len(home))) for _ in range(_AGAIN))
        return all(repair(lengths, home.copy(), bins, limit) for lengths in drawn)

    high = int(bins * limit / mean) + 1  # so many can never fit
    low, found, step = high, None, 1
    while found is None and low > 1:  # from above by steps that double: the answer is mostly near
        high, low = low, max(low - step, 1)
        found, step = fitting(low), max(2 * step, high // 500)
    while found is not None and high - low > max(1, high // 2000):
        middle = (low + high) // 2
        better = fitting(middle)
        found, low, high = (found, low, middle) if better is None else (better, middle, high)
    step = max(low // 800, 1)
    for count in range(low, max(low - 16 * step, 0), -step):
        home = found if count == low else fitting(count)
        if home is not None and firm(home):
            return home
    return np.zeros(0, np.int64) if found is None else found
