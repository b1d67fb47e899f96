"""The samples of a stratum by the bucket that serves them: streams of their own, which go through the same blocks.

Buckets take their steps by turns, each at the pace at which its samples occur. So what lies together in a shard is drawn
in the same stretch of steps whatever its shape, and is read at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from x2i.trainer.plan import OPEN, SPAN
from x2i.trainer.streams import PartStream
from x2i.trainer.table import Kinds, SampleTable

#: Bytes of all strata's samples, by row group, that are kept.
_MEMORY = 64 << 20


@dataclass(frozen=True)
class BucketRows:
    """A stratum's samples in one row group: numbers in the table, and the place of each one's bucket among those kept."""

    sample: np.ndarray
    kind: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> BucketRows:
        return BucketRows(self.sample[rows], self.kind[rows])

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.sample.nbytes + self.kind.nbytes


class BucketSamples:
    """A stratum's samples on one side, counted by bucket (`x2i.trainer.streams.Parted`).

    Args:
        places: of the stratum's cells the place of their bucket, from 0 without gaps.
    """

    def __init__(self, table: SampleTable, places: Mapping[int, int], side: int) -> None:
        self._table = table
        self._found = Kinds(table, places, side, max(places.values()) + 1)
        self.counts, self.sizes = self._found.counts, self._found.sizes

    def rows(self, entry: int) -> BucketRows:
        """The samples of the `entry`-th row group that holds any."""
        group, rows, kind = self._found.find(entry)
        return BucketRows(self._table.first(group) + rows, kind)


class BucketStream:
    """One bucket of a stratum (`x2i.trainer.plan.Stream`)."""

    def __init__(self, stream: PartStream[BucketRows], place: int, table: SampleTable) -> None:
        self._stream, self._place, self._table = stream, place, table

    def at(self, position: int) -> int:
        """The sample at a position of the stream."""
        return self._stream.sample(self._place, position)

    def task(self, sample: int) -> str:
        """A sample's task."""
        return self._table.task(sample)


def bucket_streams(
    table: SampleTable,
    places: Mapping[int, int],
    side: int,
    key: tuple[int | str, ...],
    block: int,
    window: int,
    of: int,
) -> list[BucketStream]:
    """The streams of a stratum's buckets, in the order of their places.

    Args:
        places: of the stratum's cells the place of their bucket, from 0 without gaps.
        key: seeds the order.
        block, window: neighbours that come within so many places of all its buckets' streams together.
        of: how many strata there are.
    """
    samples = BucketSamples(table, places, side)
    parts: list[tuple[int, ...]] = [(place,) for place in range(len(samples.counts))]
    stream = PartStream(samples, parts, key, max(OPEN // of, 1), SPAN, block, window, _MEMORY // of)
    return [BucketStream(stream, place, table) for place in range(len(parts))]
