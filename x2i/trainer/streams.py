"""Streams of the parts of a stratum, as lengths in packs, or buckets: each part for itself, all through the same blocks.

All samples of a run have one order (`x2i.trainer.order`), and each part takes its own out of it. So parts that go on at the
pace at which they occur are in the same blocks at the same time, and these can be read at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, Protocol, Self, TypeVar

import numpy as np

from x2i.base.seeds import generator
from x2i.trainer.kept import Kept
from x2i.trainer.order import Order


class Rows(Protocol):
    """Samples of a stratum in one row group: arrays with one entry each, and nothing else."""

    @property
    def sample(self) -> np.ndarray:
        """Number in the table."""

    @property
    def kind(self) -> np.ndarray:
        """What parts are made of: a small number."""

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""

    def __getitem__(self, rows: np.ndarray) -> Self:
        """Some of them."""


R = TypeVar("R", bound=Rows)
R_co = TypeVar("R_co", bound=Rows, covariant=True)


class Parted(Protocol[R_co]):
    """A stratum's samples, counted by kind."""

    @property
    def counts(self) -> np.ndarray:
        """Samples by kind and row group, int64 [kinds, row groups]; every row group has some."""

    @property
    def sizes(self) -> np.ndarray:
        """All rows of these row groups."""

    def rows(self, entry: int) -> R_co:
        """The samples of the `entry`-th of these row groups, in the table's order."""


@dataclass(frozen=True)
class _Epoch:
    """The order of a stratum's row groups in one epoch: for each part where its runs end, and in `cuts` where all do."""

    order: np.ndarray
    runs: np.ndarray  # [parts, runs + 1]
    cuts: np.ndarray  # [runs + 1], places in `order`


@dataclass(frozen=True)
class _Run:
    """The samples of a run in order, part by part, each by its row group and its place there; `firsts`: of the parts."""

    entry: np.ndarray
    place: np.ndarray
    firsts: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.entry.nbytes + self.place.nbytes


class PartStream(Generic[R]):
    """One stratum's samples, epoch after epoch, each part for itself and all through the same row groups.

    Attributes:
        totals: samples of each part.

    Args:
        parts: kinds of each.
        key: seeds the order.
        share, span: samples and rows of a run.
        block, window: neighbours that come within so many places of the stratum's stream.
        memory: bytes of row groups and orders that are kept.
    """

    def __init__(
        self,
        samples: Parted[R],
        parts: list[tuple[int, ...]],
        key: tuple[int | str, ...],
        share: int,
        span: int,
        block: int,
        window: int,
        memory: int,
    ) -> None:
        self._samples, self._key, self._share, self._span = samples, key, share, span
        self._block, self._window = block, window
        self._counts = np.stack([samples.counts[list(kinds)].sum(0) for kinds in parts])
        self.totals: list[int] = self._counts.sum(1).tolist()
        self._part_of = np.full(len(samples.counts), -1, np.int16)
        for number, kinds in enumerate(parts):
            self._part_of[list(kinds)] = number
        self._epoch = lru_cache(maxsize=3)(self._ordered)
        self._rows: Kept[R] = Kept(memory * 3 // 4)
        self._runs: Kept[_Run] = Kept(memory // 4)

    def sample(self, part: int, position: int) -> int:
        """The number of the sample at a position of a part."""
        ((number, run, place, _),) = self._pieces(part, position, 1)
        found = self._run(number, run)
        return int(self._group(int(found.entry[place])).sample[int(found.place[place])])

    def at(self, wanted: list[tuple[int, int, int]]) -> R:
        """The samples at positions of parts: of each part, so many from a first on."""
        pieces = [piece for part, first, count in wanted for piece in self._pieces(part, first, count)]
        entries, places = [], []
        for number, run, first, count in pieces:
            found = self._run(number, run)
            entries.append(found.entry[first : first + count])
            places.append(found.place[first : first + count])
        return self._taken(np.concatenate(entries), np.concatenate(places))

    def _pieces(self, part: int, first: int, count: int) -> list[tuple[int, int, int, int]]:
        """Positions by run: epoch, run, the first place in its order, how many."""
        out = []
        while count:
            number, place = divmod(first, self.totals[part])
            runs = self._epoch(number).runs[part]
            run = int(runs.searchsorted(place, "right")) - 1
            begin, end = int(runs[run]), int(runs[run + 1])
            here = min(count, end - place)
            out.append((number, run, int(self._run(number, run).firsts[part]) + place - begin, here))
            first, count = first + here, count - here
        return out

    def _taken(self, entries: np.ndarray, places: np.ndarray) -> R:
        order = np.argsort(entries, kind="stable")
        ends = np.flatnonzero(np.diff(entries[order], append=-1)) + 1
        found, begin = [], 0
        for end in ends.tolist():
            mine = order[begin:end]
            found.append(self._group(int(entries[mine[0]]))[places[mine]])
            begin = end
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        columns = zip(*(vars(f).values() for f in found), strict=True)
        return type(found[0])(*(np.concatenate(column)[back] for column in columns))

    def _group(self, entry: int) -> R:
        return self._rows.get(entry, lambda: self._samples.rows(entry))

    def _run(self, number: int, run: int) -> _Run:
        return self._runs.get((number, run), lambda: self._mixed(number, run))

    def _mixed(self, number: int, run: int) -> _Run:
        """The order of a run's samples."""
        epoch = self._epoch(number)
        entries = epoch.order[epoch.cuts[run] : epoch.cuts[run + 1]]
        kinds = [self._group(entry).kind for entry in entries.tolist()]
        counts = [len(kind) for kind in kinds]
        mixed = Order.of(sum(counts), self._block, self._window).all(*self._key, number, run)
        parts = self._part_of[np.concatenate(kinds)][mixed]
        by_part = mixed[np.argsort(parts, kind="stable")]
        entry, place = np.repeat(entries, counts), np.concatenate([np.arange(count) for count in counts])
        kind = np.min_scalar_type(max(len(epoch.order), *counts))
        firsts = np.searchsorted(np.sort(parts), np.arange(len(self._counts)))
        return _Run(entry[by_part].astype(kind), place[by_part].astype(kind), firsts)

    def _ordered(self, number: int) -> _Epoch:
        counts, sizes = self._counts.sum(0), self._samples.sizes
        order = generator("plan/groups/1", *self._key, number).permutation(len(sizes))
        cuts, samples, rows = [0], 0, 0
        for place, (count, size) in enumerate(zip(counts[order].tolist(), sizes[order].tolist(), strict=True)):
            samples, rows = samples + count, rows + size
            if samples >= self._share or rows >= self._span or place == len(order) - 1:
                cuts.append(place + 1)
                samples = rows = 0
        ends = np.concatenate([np.zeros((len(self._counts), 1), np.int64), np.cumsum(self._counts[:, order], 1)], 1)
        return _Epoch(order, ends[:, cuts], np.array(cuts))
