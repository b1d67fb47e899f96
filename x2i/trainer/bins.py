"""Bin packing of whole numbers: how samples of these lengths go into packs of one size."""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np

_TRIES = 12


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


def repair(lengths: np.ndarray, home: np.ndarray, bins: int, limit: int) -> bool:
    """Exchange items between bins, in place, until none holds more than `limit`. False if no exchange helps any more.

    The fullest bin gives an item to one of the emptiest, or exchanges it for a shorter one: so that it fits, and of such
    exchanges the one that moves least; if none is enough, the one that moves most.

    Args:
        lengths: of the items, int64.
        home: the bin of each, changed.
    """
    loads = np.bincount(home, lengths, bins).astype(np.int64)
    members: dict[int, np.ndarray] = {}

    def items(number: int) -> np.ndarray:
        if number not in members:
            members[number] = np.flatnonzero(home == number)
        return members[number]

    for _ in range(40 * bins + 100):
        full = int(loads.argmax())
        if (excess := int(loads[full]) - limit) <= 0:
            return True
        mine = lengths[items(full)]
        near = np.argpartition(loads, min(_TRIES, bins - 1))[:_TRIES] if bins > 1 else np.empty(0, np.int64)
        for empty in near[np.argsort(loads[near], kind="stable")].tolist():
            slack = limit - int(loads[empty])
            if slack <= 0:
                return False
            theirs = np.append(lengths[items(empty)], 0)
            moved = mine[:, None] - theirs
            moved[moved > slack] = 0
            enough = np.where(moved >= excess, moved, np.iinfo(np.int64).max)
            best = int(enough.argmin()) if moved.max() >= excess else int(moved.argmax())
            give, take = divmod(best, len(theirs))
            if (by := int(moved[give, take])) <= 0:
                continue
            home[items(full)[give]] = empty
            if take < len(theirs) - 1:
                home[items(empty)[take]] = full
            members.pop(full)
            members.pop(empty)
            loads[full] -= by
            loads[empty] += by
            break
        else:
            return False
    return False


def most(profile: Callable[[int], np.ndarray], bins: int, limit: int, mean: float) -> np.ndarray:
    """The bin of each of as many items as are found to fit; none if not even a few do.

    Args:
        profile: the lengths of so many items.
        mean: of the items.
    """

    def packed(count: int) -> np.ndarray | None:
        lengths = profile(count)
        home = balanced(lengths, bins)
        return home if repair(lengths, home, bins, limit) else None

    high = int(bins * limit / mean) + 1  # so many can never fit
    low, found, step = high, None, 1
    while found is None and low > 1:  # from above by steps that double: the answer is mostly near
        high, low = low, max(low - step, 1)
        found, step = packed(low), max(2 * step, high // 500)
    while found is not None and high - low > max(1, high // 2000):
        middle = (low + high) // 2
        better = packed(middle)
        found, low, high = (found, low, middle) if better is None else (better, middle, high)
    return np.zeros(0, np.int64) if found is None else found
