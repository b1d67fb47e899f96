"""The streams of a packed stage: a stratum's samples, each part of it for itself, all through the same row groups."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from x2i.base.seeds import generator
from x2i.trainer.kept import Kept
from x2i.trainer.measured import Classed, Rows
from x2i.trainer.plan import permuted_all, round_keys


@dataclass(frozen=True)
class _Epoch:
    """The order of a stratum's row groups in one epoch: for each part where they end, and where its runs do."""

    order: np.ndarray
    ends: np.ndarray  # [parts, row groups]
    runs: np.ndarray  # [parts, runs + 1]


class PartStream:
    """One stratum's samples, epoch after epoch, each part for itself and all through the same row groups.

    Attributes:
        totals: samples of each part.

    Args:
        parts: classes of each.
        key: seeds the order.
        share, span: samples and rows of a run.
        memory: bytes of row groups that are kept.
    """

    def __init__(
        self,
        samples: Classed,
        parts: list[tuple[int, ...]],
        key: tuple[int | str, ...],
        share: int,
        span: int,
        memory: int,
    ) -> None:
        self._samples, self._key, self._share, self._span = samples, key, share, span
        self._counts = np.stack([samples.counts[list(kinds)].sum(0) for kinds in parts])
        self.totals: list[int] = self._counts.sum(1).tolist()
        self._part_of = np.zeros(len(samples.counts), np.int64)
        for number, kinds in enumerate(parts):
            self._part_of[list(kinds)] = number
        self._epoch = lru_cache(maxsize=3)(self._ordered)
        self._kept: Kept[Rows] = Kept(memory)

    def at(self, wanted: list[tuple[int, int, int]]) -> Rows:
        """The samples at positions of parts: of each part, so many from a first on."""
        pieces = [piece for part, first, count in wanted for piece in self._pieces(part, first, count)]
        repeats = [count for *_, count in pieces]
        places = np.concatenate([np.arange(first, first + count) for *_, first, count in pieces])
        widths = np.repeat([end - begin for _, _, _, begin, end, _, _ in pieces], repeats)
        keys = np.array([round_keys(*self._key, part, number, run) for part, number, run, *_ in pieces], np.uint64)
        places = permuted_all(places, widths, np.repeat(keys, repeats, 0))
        entries, ranks, at = [], [], 0
        for part, number, _, begin, _, _, count in pieces:
            epoch, place = self._epoch(number), places[at : at + count] + begin
            found = epoch.ends[part].searchsorted(place, "right")
            entries.append(epoch.order[found])
            ranks.append(place - epoch.ends[part][found] + self._counts[part, entries[-1]])
            at += count
        return self._taken(np.concatenate(entries), np.repeat([p for p, *_ in pieces], repeats), np.concatenate(ranks))

    def _pieces(self, part: int, first: int, count: int) -> list[tuple[int, int, int, int, int, int, int]]:
        """Positions by run: part, epoch, run, where the run begins and ends, the first place in it, how many."""
        out = []
        while count:
            number, place = divmod(first, self.totals[part])
            runs = self._epoch(number).runs[part]
            run = int(runs.searchsorted(place, "right")) - 1
            begin, end = int(runs[run]), int(runs[run + 1])
            here = min(count, end - place)
            out.append((part, number, run, begin, end, place - begin, here))
            first, count = first + here, count - here
        return out

    def _taken(self, entries: np.ndarray, parts: np.ndarray, ranks: np.ndarray) -> Rows:
        order = np.argsort(entries, kind="stable")
        ends = np.flatnonzero(np.diff(entries[order], append=-1)) + 1
        found, begin = [], 0
        for end in ends.tolist():
            mine = order[begin:end]
            rows, firsts = self._rows(int(entries[mine[0]]))
            found.append(rows[firsts[parts[mine]] + ranks[mine]])
            begin = end
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return Rows(*(np.concatenate(c)[back] for c in zip(*(vars(f).values() for f in found), strict=True)))

    def _rows(self, entry: int) -> tuple[Rows, np.ndarray]:
        """A row group's samples, in order of their parts, and where each part begins."""
        counts = self._counts[:, entry]
        return self._kept.get(entry, lambda: self._sorted(entry)), np.cumsum(counts) - counts

    def _sorted(self, entry: int) -> Rows:
        rows = self._samples.rows(entry)
        return rows[np.argsort(self._part_of[rows.kind], kind="stable")]

    def _ordered(self, number: int) -> _Epoch:
        counts, sizes = self._counts.sum(0), self._samples.sizes
        order = generator("plan/groups/1", *self._key, number).permutation(len(sizes))
        cuts, samples, rows = [], 0, 0
        for place, (count, size) in enumerate(zip(counts[order].tolist(), sizes[order].tolist(), strict=True)):
            samples, rows = samples + count, rows + size
            if samples >= self._share or rows >= self._span or place == len(order) - 1:
                cuts.append(place)
                samples = rows = 0
        ends = np.cumsum(self._counts[:, order], 1)
        return _Epoch(order, ends, np.concatenate([np.zeros((len(ends), 1), np.int64), ends[:, cuts]], 1))
