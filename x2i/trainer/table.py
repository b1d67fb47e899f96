"""The samples of a run: what the corpora hold, counted; a sample is found in its manifest when it is asked for.

A sample's number is its row, the corpora's manifests one after the other. Nothing here grows with their rows but the
counts (by row group, task and source); row groups are read when a sample in them is wanted, and what is kept of them is
bounded in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

import numpy as np
import pyarrow as pa

from x2i.base.errors import RecipeError
from x2i.corpus.corpus import Corpus
from x2i.trainer.buckets import Size
from x2i.trainer.classes import Classes, classes_of
from x2i.trainer.index import APART, HELD_OUT, TRAIN, ManifestReader, split_sides
from x2i.trainer.kept import Kept

By = Literal["task", "source", "corpus"]

#: Row groups, evenly spaced, from which the classes of lengths are chosen.
_GROUPS = 24

#: What of the manifest a `SampleRef` is made of.
_COLUMNS = ["key", "task_type", "shard", "offset", "size", "sha256", "members", "source", "image_id"]


@dataclass(frozen=True)
class SampleRef:
    """Where one sample lies: its corpus, and what the manifest says of it."""

    corpus: Corpus
    key: str
    task: str
    shard: str
    offset: int
    size: int
    sha256: str
    members: tuple[tuple[str, int, int], ...]  # suffix, offset in the shard, size
    source: str
    image_id: str
    place: int  # of the corpus in the run's list


@dataclass(frozen=True)
class Cell:
    """Samples that a mixture can tell apart from others.

    `corpus` is the place in the run's list, `buckets` has the place of their bucket in each of the table's lists,
    `length` is the class of their length.
    """

    corpus: int
    task: str
    source: str
    buckets: tuple[int, ...] = ()
    length: int = 0


class SampleTable:
    """Samples of all corpora, in the order of their manifests.

    An image, with every sample made from it, is either for training or held out: decided by a digest of its id alone,
    so growing a corpus moves no image from one side to the other. (Only where no image at all falls below the share,
    the lowest is held out.) Samples of other images that hold a held-out one too, as the example of a few-shot
    sequence, are on neither side: `apart`.

    Attributes:
        tasks: task types that occur, sorted; `chats`: those whose samples have no output image, conversations to be
            answered.
        train, held_out: samples by task.
        derived: paths of the corpora whose split had to be computed, as an earlier build wrote them.

    Args:
        corpora: to read from, in the run's order.
        held_out: share of the images.
        buckets: lists of sizes; samples are told apart by which of them is theirs.
        packed: whether samples are told apart by the class of their length.
        memory: bytes of the manifests' parts that are kept.

    Raises:
        RecipeError: the corpora have no sample.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        held_out: float,
        buckets: Sequence[tuple[Size, ...]] = (),
        packed: bool = False,
        memory: int = 640 << 20,
    ) -> None:
        self.corpora = list(corpora)
        names = [str(c.info.get("name") or Path(str(c.path)).name) for c in corpora]
        self._names = [n if names.count(n) == 1 else str(c.path) for n, c in zip(names, corpora, strict=True)]
        self.buckets = list(buckets)
        self._readers = [ManifestReader(corpus, self.buckets) for corpus in corpora]
        self.classes = self._classes() if packed else None
        for reader in self._readers:
            reader.classes = self.classes
        self._below = min(int(np.ceil(held_out * 2**32)), 2**32 - 1)
        found = [reader.count(self._below) for reader in self._readers]
        points = [p for f in found for p in (f.least, f.most) if p is not None]
        if not points:
            told = ", ".join(str(c.path) for c in corpora)
            raise RecipeError(f"corpora: {told}: no sample; nothing to train on")
        if held_out > 0 and not any(f.counts[:, HELD_OUT].any() for f in found) and min(points) < max(points):
            self._below = min(points) + 1
            found = [reader.count(self._below) for reader in self._readers]
        sizes = [reader.sizes for reader in self._readers]
        self.sizes = np.concatenate(sizes)
        self._firsts = np.concatenate([[0], np.cumsum(self.sizes)])  # first row of each row group, and the end
        self._groups = np.concatenate([[0], np.cumsum([len(s) for s in sizes])])  # first row group of each corpus
        self.cells = [Cell(place, *name) for place, f in enumerate(found) for name in f.names]
        self._codes = {cell: code for code, cell in enumerate(self.cells)}
        self._cells_of: dict[tuple[int, int], np.ndarray] = {}
        before = np.cumsum([0] + [len(f.names) for f in found])
        self._group = np.concatenate([f.group + first for f, first in zip(found, self._groups, strict=False)])
        cell = np.concatenate([f.cell + first for f, first in zip(found, before, strict=False)])
        self._counts = np.concatenate([f.counts for f in found])
        order = np.argsort(cell, kind="stable")  # the entries of a cell are neighbours
        self._group, self._counts = self._group[order], self._counts[order]
        self._entries = cell[order].searchsorted(np.arange(len(self.cells) + 1))
        self.apart = int(self._counts[:, APART].sum())
        self.chats = {task for f in found for task in f.chats}
        self.derived = [str(r.corpus.path) for r in self._readers if r.derived]
        self.tasks = sorted({cell.task for cell in self.cells})
        together = sorted({(cell.task, cell.buckets) for cell in self.cells})  # what is kept together of a row group
        self._blocked = np.array([together.index((cell.task, cell.buckets)) for cell in self.cells])
        self.train = self.samples(TRAIN)
        self.held_out = self.samples(HELD_OUT)
        self._sides: Kept[_Group] = Kept(memory * 2 // 5)
        self._blocks: Kept[_Block] = Kept(memory * 3 // 5)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, sample: int) -> SampleRef:
        group, row = self._locate(sample)
        code = int(self._blocked[self._group_of(group).cell(row)])
        block = self._blocks.get((group, code), lambda: self._block(group, code))
        found = block.table.slice(int(block.rows.searchsorted(row)), 1).to_pylist()[0]
        members = tuple((m["suffix"], m["offset"], m["size"]) for m in found["members"])
        place = self._place(group)
        return SampleRef(
            *(self.corpora[place], found["key"], found["task_type"], found["shard"], found["offset"], found["size"]),
            *(found["sha256"], members, found["source"], found["image_id"], place),
        )

    def task(self, sample: int) -> str:
        """A sample's task."""
        group, row = self._locate(sample)
        return self.cells[self._group_of(group).cell(row)].task

    def samples(self, side: int, by: By = "task", of: Callable[[Cell], bool] = lambda _: True) -> dict[str, Samples]:
        """The samples of one side by task, source or corpus; `of` says of which cells."""
        parts: dict[str, list[int]] = {name: [] for name in sorted({self.name(cell, by) for cell in self.cells})}
        for code, cell in enumerate(self.cells):
            if of(cell):
                parts[self.name(cell, by)].append(code)
        return {name: Samples(self, codes, side) for name, codes in parts.items()}

    def name(self, cell: Cell, by: By) -> str:
        """What a mixture calls the samples of a cell: the task, the source or the corpus.

        A corpus is called by the name in its recipe; or by its path, where two have the same.
        """
        if by != "corpus":
            return cell.task if by == "task" else cell.source
        return self._names[cell.corpus]

    def counted(self, codes: Sequence[int], side: int) -> tuple[np.ndarray, np.ndarray]:
        """The row groups that hold samples of these cells on this side, and how many."""
        spans = [np.arange(self._entries[code], self._entries[code + 1]) for code in codes]
        chosen = np.concatenate(spans) if spans else np.empty(0, np.int64)
        counts = np.bincount(self._group[chosen], self._counts[chosen, side], len(self.sizes)).astype(np.int64)
        groups = np.flatnonzero(counts)
        return groups, counts[groups]

    def row(self, codes: tuple[int, ...], side: int, group: int, rank: int) -> int:
        """The sample that is the `rank`-th (from 0) of these cells on this side in a row group."""
        rows = self._group_of(group).rows(codes, side)
        return int(self._firsts[group]) + int(rows[rank])

    def rows(self, codes: tuple[int, ...], side: int, group: int, columns: list[str]) -> pa.Table:
        """What the manifest says of these cells' samples on this side in a row group."""
        place = self._place(group)
        table = self._readers[place].read(group - int(self._groups[place]), columns)
        return table.take(pa.array(self._group_of(group).rows(codes, side)))

    def kinds(self, group: int) -> np.ndarray:
        """Of each row in a row group three times its cell (its place in `cells`), and its side."""
        return self._group_of(group).kinds

    def lengths(self, group: int) -> pa.Table:
        """What `x2i.trainer.lengths` wants to know of the rows of a row group."""
        place = self._place(group)
        return self._readers[place].lengths(group - int(self._groups[place]))

    def group(self, sample: int) -> int:
        """The row group in which a sample lies."""
        return self._locate(sample)[0]

    def first(self, group: int) -> int:
        """The number of the first sample of a row group."""
        return int(self._firsts[group])

    def _classes(self) -> Classes:
        """The grid of lengths, from row groups evenly spaced over all corpora."""
        ends = np.cumsum([0] + [len(reader.sizes) for reader in self._readers])
        chosen = np.unique(np.linspace(0, ends[-1] - 1, min(_GROUPS, int(ends[-1]))).astype(int))
        homes = (np.searchsorted(ends, chosen, "right") - 1).tolist()
        return classes_of([self._readers[h].lengths(g - int(ends[h])) for h, g in zip(homes, chosen, strict=True)])

    def _locate(self, sample: int) -> tuple[int, int]:
        if not 0 <= sample < len(self):
            raise IndexError(sample)
        group = int(self._firsts.searchsorted(sample, "right")) - 1
        return group, sample - int(self._firsts[group])

    def _place(self, group: int) -> int:
        return int(self._groups.searchsorted(group, "right")) - 1

    def _group_of(self, group: int) -> _Group:
        return self._sides.get(group, lambda: self._parsed(group))

    def _parsed(self, group: int) -> _Group:
        place = self._place(group)
        kinds, own, others = self._readers[place].kinds_and_split(group - int(self._groups[place]))
        names = place, id(kinds.names)  # the reader keeps its lists of names
        if names not in self._cells_of:
            kind = np.min_scalar_type(3 * len(self.cells) + 2)
            found = [3 * self._codes.get(Cell(place, *name), 0) for name in kinds.names]
            self._cells_of[names] = np.array(found, kind)
        return _Group(self._cells_of[names][kinds.codes] + split_sides(own, others, self._below))

    def _block(self, group: int, code: int) -> _Block:
        rows = np.flatnonzero(self._blocked[self._group_of(group).kinds // 3] == code)
        place = self._place(group)
        table = self._readers[place].read(group - int(self._groups[place]), _COLUMNS)
        return _Block(rows, table.take(pa.array(rows)).combine_chunks())


class Samples(Sequence[int]):
    """Numbers of samples, in the table's order: those of some cells on one side. Counted, and found when asked for.

    Attributes:
        counts: samples in each of the row groups that hold any, in order; `sizes`: all rows of these row groups.
    """

    def __init__(self, table: SampleTable, codes: Sequence[int], side: int) -> None:
        self._table, self._codes, self._side = table, tuple(codes), side
        self._groups, self.counts = table.counted(codes, side)
        self.sizes = table.sizes[self._groups]
        self._tasks = {table.cells[code].task for code in codes}
        self._ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> list[int]: ...
    def __getitem__(self, place: int | slice) -> int | list[int]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if place < 0:
            place += len(self)
        if not 0 <= place < len(self):
            raise IndexError(place)
        entry = int(self._ends.searchsorted(place, "right"))
        return self.at(entry, place - int(self._ends[entry] - self.counts[entry]))

    def at(self, entry: int, rank: int) -> int:
        """The `rank`-th sample of the `entry`-th row group that holds any, both from 0."""
        return self._table.row(self._codes, self._side, int(self._groups[entry]), rank)

    def task(self, sample: int) -> str:
        """The task of one of them."""
        return next(iter(self._tasks)) if len(self._tasks) == 1 else self._table.task(sample)

    def some(self, columns: list[str], groups: int) -> pa.Table:
        """Columns of those in at most so many row groups, evenly spaced."""
        chosen = np.unique(np.linspace(0, len(self._groups) - 1, min(groups, len(self._groups))).astype(int))
        parts = (self._table.rows(self._codes, self._side, int(self._groups[i]), columns) for i in chosen)
        return pa.concat_tables(parts, promote_options="default")

    def spread(self, count: int) -> list[int]:
        """At most `count` of them, evenly spaced."""
        places = np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).astype(np.int64))
        return [self[int(p)] for p in places]


class Kinds:
    """Samples of some cells on one side, each of a kind: counted, and found when asked for.

    Attributes:
        counts: samples by kind and row group, int64 [kinds, row groups], of those that hold any; `sizes`: all rows of these.

    Args:
        kinds: of each cell, by its place in the table's `cells`, the kind of its samples.
        count: how many kinds there are.
    """

    def __init__(self, table: SampleTable, kinds: Mapping[int, int], side: int, count: int) -> None:
        self._table = table
        counts = np.zeros((count, len(table.sizes)), np.int64)
        for kind in set(kinds.values()):
            groups, number = table.counted([code for code, of in kinds.items() if of == kind], side)
            counts[kind, groups] = number
        self._groups = np.flatnonzero(counts.any(0))
        self.counts, self.sizes = counts[:, self._groups], table.sizes[self._groups]
        self._kind = np.full(3 * len(table.cells), -1, np.int16)
        for code, kind in kinds.items():
            self._kind[3 * code + side] = kind

    def find(self, entry: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The `entry`-th row group that holds any: its number, the rows of these samples in it, and their kinds."""
        group = int(self._groups[entry])
        kind = self._kind[self._table.kinds(group)]
        rows = np.flatnonzero(kind >= 0)
        return group, rows, kind[rows]


class _Group:
    """Cell and side of the rows of one row group: three times the cell, and the side."""

    def __init__(self, kinds: np.ndarray) -> None:
        self.kinds = kinds
        self._rows: dict[tuple[tuple[int, ...], int], np.ndarray] = {}

    def cell(self, row: int) -> int:
        """The cell of a row."""
        return int(self.kinds[row]) // 3

    def rows(self, codes: tuple[int, ...], side: int) -> np.ndarray:
        """The rows of these cells on this side, in order."""
        if (codes, side) not in self._rows:
            there = np.isin(self.kinds, [3 * code + side for code in codes])
            self._rows[codes, side] = np.flatnonzero(there).astype(np.min_scalar_type(len(there)))
        return self._rows[codes, side]

    @property
    def nbytes(self) -> int:
        """Bytes, with the rows of half the strata."""
        return self.kinds.nbytes + len(self.kinds) * np.min_scalar_type(len(self.kinds)).itemsize // 2


@dataclass(frozen=True)
class _Block:
    """Rows of one task and bucket in a row group, and what the manifest says of them."""

    rows: np.ndarray
    table: pa.Table

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return int(self.table.nbytes)
