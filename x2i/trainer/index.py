"""What a manifest holds, counted by row group: the one pass over a corpus that a run begins with.

Four narrow columns are read (task_type, source and the two of `x2i.corpus.manifest.SPLIT`), a row group at a time, and
what stays in memory is the counts: for each row group, how many samples of each task and source are for training, held
out, or apart. Corpora of earlier builds lack the split's columns; then they are computed from the images' ids, which
takes some microseconds a sample, and are kept. Where stages have buckets, the pictures' sizes are read too; where they
are packed, what tells the samples' lengths.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from x2i.base.errors import X2IError
from x2i.corpus.corpus import MANIFEST, Corpus
from x2i.corpus.manifest import SPLIT, split_columns
from x2i.trainer.buckets import COLUMNS, Size, nearest, sizes_of
from x2i.trainer.classes import Classes
from x2i.trainer.lengths import COLUMNS as LENGTHS
from x2i.trainer.lengths import REJECTED, columns_of

#: The sides of the split, as numbers of a row.
TRAIN, HELD_OUT, APART = range(3)

_KINDS = ["task_type", "source"]
_THREADS = 4

#: Seconds before a URL is asked again, each time.
_PAUSES = (0.5, 1.0)

_T = TypeVar("_T")


#: What is told apart: task, source, for each list of buckets the place of the one that the picture is for, and the class
#: of its length.
Kind = tuple[str, str, tuple[int, ...], int]


@dataclass(frozen=True)
class Kinds:
    """The kinds of the rows of one row group: `codes` are places in `names`."""

    codes: np.ndarray
    names: list[Kind]


@dataclass(frozen=True)
class Counted:
    """One manifest's counts: entry i says that row group `group[i]` holds `counts[i]` rows of `names[cell[i]]` by side.

    Attributes:
        least, most: of the split points that occur, None if there is no row.
        chats: tasks with samples that have no output image.
    """

    names: list[Kind]
    group: np.ndarray
    cell: np.ndarray
    counts: np.ndarray  # [entries, 3]
    least: int | None
    most: int | None
    chats: set[str]


class ManifestReader:
    """Row groups of one corpus's manifest, read by threads at will.

    Attributes:
        sizes: rows of each row group.
        derived: whether the split must be computed.
    """

    def __init__(
        self, corpus: Corpus, buckets: Sequence[tuple[Size, ...]] = (), classes: Classes | None = None
    ) -> None:
        self.corpus = corpus
        self.classes = classes
        self._buckets = buckets
        self._lock = threading.Lock()
        self._file = corpus.open_manifest(read_dictionary=[*_KINDS, "shard"])
        metadata = self._file.metadata
        self.sizes = np.array([metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)], np.int64)
        self._columns = set(self._file.schema_arrow.names)
        self._estimated = self._has_estimates()
        self.derived = not set(SPLIT.names) <= self._columns
        self._computed: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._names: dict[tuple[tuple[str, ...], tuple[str, ...]], list[Kind]] = {}

    def read(self, group: int, columns: list[str]) -> pa.Table:
        """Columns of one row group. Raises X2IError."""
        with self._lock:
            return self._asked(self._file, group, columns=columns)

    def _asked(self, file: pq.ParquetFile, group: int, **options: Any) -> pa.Table:
        """Of one row group what the options say; a URL, which may fail now and not a moment later, is asked again."""
        remote = not isinstance(self.corpus.path, Path)
        for pause in (*_PAUSES, 0) if remote else (0,):
            try:
                return file.read_row_group(group, **options)
            except MemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - each filesystem raises what its library does, as aiohttp's errors
                failed = error
            time.sleep(pause)
        remedy = "The server must be one that serves ranges of files." if remote else "Build the corpus again."
        where = f"{str(self.corpus.path).rstrip('/')}/{MANIFEST}: row group {group}"
        raise X2IError(f"{where} cannot be read ({type(failed).__name__}: {failed}). {remedy}") from failed

    def lengths(self, group: int) -> pa.Table:
        """What `x2i.trainer.lengths` wants to know of one row group."""
        rejected = [REJECTED] if REJECTED in self._columns else []
        return self.read(group, [*columns_of(self._columns, self._estimated), *rejected])

    def kinds_and_split(self, group: int) -> tuple[Kinds, np.ndarray, np.ndarray]:
        """Task and source, the image's split point (uint32), and the least of the sample's other images (or the most)."""
        return self._parsed(group, self.read(group, self._narrow))

    def count(self, below: int) -> Counted:
        """One pass over the manifest: samples are held out whose image's split point lies `below`."""
        codes: dict[Kind, int] = {}
        known: dict[int, np.ndarray] = {}  # of each list of names the codes, -1 before they are needed
        parts: list[tuple[int, np.ndarray, np.ndarray]] = []
        chats = set[str]()
        least, most = 2**32, -1
        for group, kinds, own, others, without in self._all():
            if not len(own):
                continue
            sides = split_sides(own, others, below)
            found = np.bincount(kinds.codes * 3 + sides, minlength=3 * len(kinds.names)).reshape(-1, 3)
            there = np.flatnonzero(found.any(1))
            mine = known.setdefault(id(kinds.names), np.full(len(kinds.names), -1, np.int32))
            for i in there[mine[there] < 0].tolist():
                mine[i] = codes.setdefault(kinds.names[i], len(codes))
            cells = mine[there]
            parts.append((group, cells, found[there].astype(np.int32)))
            least, most = min(least, int(own.min())), max(most, int(own.max()))
            if without:
                totals = dict.fromkeys((kinds.names[i][0] for i in there), 0)
                for i, rows in zip(there, found[there].sum(1).tolist(), strict=True):
                    totals[kinds.names[i][0]] += rows
                if without == len(own):
                    chats |= totals.keys()
                elif without != sum(n for task, n in totals.items() if task in chats):
                    chats |= self._chats(group, kinds)
        names = sorted(codes)
        new = np.empty(len(codes), np.int32)
        new[[codes[n] for n in names]] = np.arange(len(names))
        empty = np.empty(0, np.int32)
        return Counted(
            names,
            np.concatenate([np.full(len(c), g, np.int32) for g, c, _ in parts] or [empty]),
            new[np.concatenate([c for _, c, _ in parts] or [empty])],
            np.concatenate([n for _, _, n in parts] or [np.empty((0, 3), np.int32)]),
            least if parts else None,
            most if parts else None,
            chats,
        )

    @property
    def _narrow(self) -> list[str]:
        derived = [n for n in ("image_id", "images") if n in self._columns]
        names = [*_KINDS, *(derived if self.derived else SPLIT.names), *(COLUMNS if self._buckets else ())]
        lengths: Sequence[str] = ()
        if self.classes:
            lengths = columns_of(self._columns, self._estimated)
            if lengths == LENGTHS and not self._buckets:
                lengths = self._counting
        return list(dict.fromkeys([*names, *lengths]))

    @cached_property
    def _counting(self) -> list[str]:
        """What tells the class of a length: of the pictures' sizes only as much as is needed to count them."""
        schema = self._file.schema
        paths = [schema.column(place).path for place in range(len(schema))]
        return ["text_tokens", *(next(p for p in paths if p.startswith(f"{n}.")) for n in COLUMNS)]

    def _has_estimates(self) -> bool:
        """Whether every sample has an estimate of its text, by the file's statistics."""
        metadata = self._file.metadata
        found = [p for p in range(len(self._file.schema)) if self._file.schema.column(p).path == "text_tokens"]
        chunks = [metadata.row_group(g).column(p) for p in found for g in range(metadata.num_row_groups)]
        return all(
            c.statistics is not None and c.statistics.has_null_count and not c.statistics.null_count for c in chunks
        )

    def _all(self) -> Iterator[tuple[int, Kinds, np.ndarray, np.ndarray, int]]:
        """Every row group in order, read in threads, with the number of samples that have no output image."""
        mine = threading.local()

        def read(group: int) -> tuple[int, Kinds, np.ndarray, np.ndarray, int]:
            if not hasattr(mine, "file"):
                options: dict[str, Any] = {"metadata": self._file.metadata, "read_dictionary": _KINDS}
                mine.file = self.corpus.open_manifest(**options)
            table = self._asked(mine.file, group, columns=self._narrow, use_threads=False)
            return (group, *self._parsed(group, table), self._without_output(mine.file, group))

        yield from _in_order(read, range(len(self.sizes)))

    def _parsed(self, group: int, table: pa.Table) -> tuple[Kinds, np.ndarray, np.ndarray]:
        (tasks, task), (sources, source) = (_sorted(_encoded(table[name])) for name in _KINDS)
        shape, shapes = self._shapes(table)
        codes = (task * len(sources) + source) * len(shapes) + shape
        with self._lock:
            if (tasks, sources) not in self._names:  # long where there are classes, and mostly that of other row groups
                self._names[tasks, sources] = [(t, s, *p) for t in tasks for s in sources for p in shapes]
            kinds = self._names[tasks, sources]
        if not self.derived:
            return Kinds(codes, kinds), _plain(table["split"]), _plain(table["split_others"])
        if group not in self._computed:
            images = table["images"] if "images" in self._columns else None
            own, others = split_columns(table["image_id"], images)
            self._computed[group] = own.to_numpy(), _plain(others)
        return Kinds(codes, kinds), *self._computed[group]

    def _shapes(self, table: pa.Table) -> tuple[np.ndarray | int, list[tuple[tuple[int, ...], int]]]:
        """Of each row the place in a list of shapes: the place in each list of buckets, and the class."""
        if not self._buckets and not self.classes:
            return 0, [((), 0)]
        codes = np.zeros(len(table), np.int64)
        if self._buckets:
            widths, heights = sizes_of(table)
            for buckets in self._buckets:
                codes = codes * len(buckets) + nearest(widths, heights, buckets)
        if self.classes:
            codes = codes * len(self.classes) + self.classes.of(table)
        places = product(*(range(len(buckets)) for buckets in self._buckets))
        return codes, list(product(places, range(len(self.classes) if self.classes else 1)))

    def _without_output(self, file: pq.ParquetFile, group: int) -> int:
        """Samples of a row group without an output image; the file's statistics say how many."""
        column = file.metadata.row_group(group).column(self._width)
        if column.statistics is not None and column.statistics.has_null_count:
            return int(column.statistics.null_count)
        return int(self._asked(file, group, columns=["output_size"])["output_size"].null_count)

    @cached_property
    def _width(self) -> int:
        """The place of `output_size.width` among the file's leaves."""
        schema = self._file.schema
        return next(i for i in range(len(schema)) if schema.column(i).path == "output_size.width")

    def _chats(self, group: int, kinds: Kinds) -> set[str]:
        """Tasks with samples that have no output image, of one row group."""
        missing = self.read(group, ["output_size"])["output_size"].combine_chunks().is_null().to_numpy(False)
        return {kinds.names[i][0] for i in np.unique(kinds.codes[missing])}


def split_sides(own: np.ndarray, others: np.ndarray, below: int) -> np.ndarray:
    """The side of each row: held out if its image lies `below`; apart if only another of its images does."""
    if not below:
        return np.zeros(len(own), np.uint8)
    last = np.uint32(below - 1)
    held = own <= last
    return np.where(held, np.uint8(HELD_OUT), np.uint8(APART) * (others <= last))


def _encoded(column: pa.ChunkedArray) -> pa.DictionaryArray:
    if column.num_chunks == 1:
        return column.chunk(0)
    if pa.types.is_dictionary(column.type):
        return column.unify_dictionaries().combine_chunks()
    return column.combine_chunks().dictionary_encode()


def _sorted(column: pa.DictionaryArray) -> tuple[tuple[str, ...], np.ndarray]:
    """The values that occur, sorted, and for each row the place of its own."""
    values = column.dictionary.to_pylist()
    order = sorted(range(len(values)), key=values.__getitem__)
    places = np.empty(len(values), np.int64)
    places[order] = np.arange(len(values))
    return tuple(values[place] for place in order), places[column.indices.to_numpy()]


def _plain(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Values as uint32; nulls are the greatest."""
    if column.null_count == len(column):
        return np.full(len(column), 2**32 - 1, np.uint32)
    return column.fill_null(2**32 - 1).to_numpy() if column.null_count else column.to_numpy()


def _in_order(work: Callable[[int], _T], items: Iterable[int]) -> Iterator[_T]:
    """`work` of every item, in order, by threads that run no more than a little ahead."""
    rest = iter(items)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="x2i-index") as pool:
        running = deque(pool.submit(work, item) for item in islice(rest, 4 * _THREADS))
        while running:
            yield running.popleft().result()
            running.extend(pool.submit(work, item) for item in islice(rest, 1))
