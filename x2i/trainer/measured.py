"""The samples of a stratum as packing sees them: counted by row group and class, measured when a row group is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from x2i.trainer.buckets import Size
from x2i.trainer.kept import Kept
from x2i.trainer.lengths import Measure
from x2i.trainer.table import Kinds, SampleTable


@dataclass(frozen=True)
class Rows:
    """A stratum's samples in one row group, one entry each.

    Attributes:
        sample: number in the table, int64.
        kind: class of the length.
        task: place in the stratum's `tasks`.
        size: place in its `boxes`, -1 without.
        shown: tokens; `bare`: without the condition; `drawn`: whether there is one that may be dropped.
        doubt: variance of the text's tokens, as far as they are an estimate.
    """

    sample: np.ndarray
    kind: np.ndarray
    task: np.ndarray
    size: np.ndarray
    shown: np.ndarray
    bare: np.ndarray
    drawn: np.ndarray
    doubt: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> Rows:
        return Rows(*(values[rows] for values in vars(self).values()))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(values.nbytes for values in vars(self).values())


class Classed(Protocol):
    """What packing draws from."""

    @property
    def counts(self) -> np.ndarray:
        """Samples by class and row group, int64 [classes, row groups]; every row group has some."""

    @property
    def sizes(self) -> np.ndarray:
        """All rows of these row groups."""

    @property
    def tasks(self) -> Sequence[str]:
        """Task types."""

    @property
    def boxes(self) -> Sequence[Size]:
        """Width and height in pixels of the buckets."""

    def rows(self, entry: int) -> Rows:
        """The samples of the `entry`-th of these row groups, in the table's order."""


class MeasuredGroups:
    """Row groups of a table, measured; what was measured is kept up to a number of bytes."""

    def __init__(self, table: SampleTable, measure: Measure, memory: int = 64 << 20) -> None:
        self.table, self.measure = table, measure
        self._kept: Kept[_Narrow] = Kept(memory)

    def of(self, group: int) -> _Narrow:
        """What is known of the rows of a row group."""
        return self._kept.get(group, lambda: self._measured(group))

    def _measured(self, group: int) -> _Narrow:
        found = self.measure(self.table.lengths(group), self.table.first(group))
        most = max(int(found.shown.max(initial=0)), int(found.bare.max(initial=0)))
        kind = np.uint16 if most < 1 << 16 else np.uint32
        return _Narrow(found.shown.astype(kind), found.bare.astype(kind), found.doubt.astype(np.float32), found.size)


@dataclass(frozen=True)
class _Narrow:
    """A row group's lengths, in few bytes."""

    shown: np.ndarray
    bare: np.ndarray
    doubt: np.ndarray
    size: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(values.nbytes for values in vars(self).values())


class MeasuredSamples:
    """Samples of some cells on one side (`Classed`)."""

    def __init__(self, groups: MeasuredGroups, codes: Sequence[int], side: int) -> None:
        table = groups.table
        self._measured, self._table = groups, table
        cells = [table.cells[code] for code in codes]
        self.tasks: Sequence[str] = sorted({cell.task for cell in cells})
        self.boxes: Sequence[Size] = groups.measure.stage.buckets
        classes = 1 if table.classes is None else len(table.classes)
        self._found = Kinds(table, {code: table.cells[code].length for code in codes}, side, classes)
        self.counts, self.sizes = self._found.counts, self._found.sizes
        self._task = np.zeros(len(table.cells), np.int16)
        for code, cell in zip(codes, cells, strict=True):
            self._task[code] = self.tasks.index(cell.task)
        self._chats = np.array([task in table.chats for task in self.tasks])

    def rows(self, entry: int) -> Rows:
        """The samples of the `entry`-th row group that holds any."""
        group, rows, kind = self._found.find(entry)
        task = self._task[self._table.kinds(group)[rows] // 3]
        found = self._measured.of(group)
        shown, bare = (v[rows].astype(np.int64) for v in (found.shown, found.bare))
        return Rows(
            *(self._table.first(group) + rows, kind, task, found.size[rows], shown, bare),
            *(~self._chats[task], found.doubt[rows].astype(float)),
        )
