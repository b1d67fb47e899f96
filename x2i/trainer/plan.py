"""The order of the samples: a pure function of the manifests, the mixture, the seed, the stage and the step.

Nothing is stored, so a step number is the whole state of the stream; and no shard is read for it.

- Draws are numbered through a stage; step n takes draws [n * batch, (n + 1) * batch).
- A window is `WINDOW` draws. The mixture is rounded once to whole draws per window (largest remainder, at
  least one for each stratum), and each window shuffles them anew with a generator of its own.
- A stratum is what the mixture names: a task, a source or a corpus. Each is a stream of its own, which walks through
  its samples epoch by epoch, each time in another order. An epoch puts the manifest's row groups in a random order,
  cuts them into runs, and shuffles the stratum's samples within each run, by an order that is computed at a point
  (`x2i.trainer.order`). So a place in the stream leads to one row group, which is read then, and the row groups of one
  run serve all draws until the next. A run ends with the row group that brings it to its share of `OPEN` samples, or to
  `SPAN` rows of whatever stratum.
- Within a run blocks of neighbours are shuffled (`shuffle.block`), and the samples of a block come within
  `shuffle.window` draws of all strata: so they can be read at once. A run that is no longer than its stratum's part of
  the window is shuffled sample by sample.

The order is that of the manifests' rows: the same samples in other row groups, or in another order, make another plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np

from x2i.base.errors import RecipeError
from x2i.base.seeds import generator
from x2i.trainer.buckets import Size
from x2i.trainer.config import Shuffle
from x2i.trainer.order import Order

WINDOW = 4096

#: Steps within which the buckets' shares are kept.
STEPS = 1024

#: Samples in the current runs of all strata together: as many as 32 row groups hold. Fewer, and neighbours in a corpus
#: meet too often; more, and more of the manifest must be kept (150 MB for this many).
OPEN = 1 << 19

#: Rows of the manifest that a run may span, for strata that are rare and everywhere.
SPAN = 1 << 19


@dataclass(frozen=True)
class Draw:
    """One place of the stream.

    Attributes:
        index: number of the draw within its stage, from 0.
        stratum: the task, source or corpus that it was dealt.
        task: the sample's task_type.
        sample: number in the sample table.
        position: place in the stratum's stream; `position // len(samples)` is the epoch.
        size: of the step's bucket, width and height in pixels, if there are buckets; in packs, of the sample's own.
        pack: in packed stages, its place in the step, from 0; `tokens`: what the sample is planned to take of it;
            `dropped`: whether it is planned to be shown without its condition; `part`: which samples of the stratum, by
            length, `position` counts.
    """

    index: int
    stratum: str
    task: str
    sample: int
    position: int
    size: Size | None = None
    pack: int | None = None
    tokens: int | None = None
    dropped: bool | None = None
    part: int | None = None


class Plan(Protocol):
    """The stream of a stage. `key` (seed and stage) seeds all that is random in it; `strata` are what it deals."""

    key: tuple[int, str]
    strata: list[str]

    def step(self, number: int) -> list[Draw]:
        """The draws of step `number` (from 0), in order: the global batch, to be split by rank."""

    def draw(self, index: int) -> Draw:
        """The draw of this number."""

    def spare(self, draw: Draw, attempt: int) -> Draw:
        """What stands in for a damaged sample: the `attempt`-th choice (from 1), of the same stratum."""


class Stratum(Protocol):
    """Samples to be drawn alike, as `x2i.trainer.table.Samples`: counted by row group, found when asked for."""

    @property
    def counts(self) -> np.ndarray:
        """Samples in each row group that has any."""

    @property
    def sizes(self) -> np.ndarray:
        """All rows of these row groups."""

    def at(self, entry: int, rank: int) -> int:
        """The number of the `rank`-th sample in the `entry`-th of these row groups."""

    def task(self, sample: int) -> str:
        """A sample's task."""


class Stream(Protocol):
    """A stratum's samples in the order in which they are drawn, epoch after epoch."""

    def at(self, position: int) -> int:
        """The number of the sample at a position, from 0."""

    def task(self, sample: int) -> str:
        """A sample's task."""


class StagePlan:
    """The stream of one stage. `key` (seed and stage) seeds all that is random in it.

    Args:
        samples: for each stratum, its training samples.
        mixture: weights by stratum; need not sum to 1.
        batch: draws per step.
        seed: the run's seed.
        stage: the stage's name.
        window: draws per window.
        open_samples, span: of the runs within which a stratum's samples are shuffled; `shuffle`: how.
        streams: of all strata, where they are made already.

    Raises:
        RecipeError: a stratum of the mixture has no samples, or there are more than draws in a window.
    """

    def __init__(
        self,
        samples: Mapping[str, Stratum],
        mixture: Mapping[str, float],
        batch: int,
        seed: int,
        stage: str,
        window: int = WINDOW,
        open_samples: int = OPEN,
        span: int = SPAN,
        shuffle: Shuffle | None = None,
        streams: Mapping[str, Stream] | None = None,
    ) -> None:
        there = {name for name, stratum in samples.items() if len(stratum.counts)}
        if missing := [name for name in mixture if name not in there]:
            known = ", ".join(sorted(there)) or "none"
            raise RecipeError(
                f"stages.{stage}.mixture: the corpora have no training samples of {', '.join(missing)}; they have {known}"
            )
        self.strata = sorted(mixture)
        self.batch = batch
        self.window = window
        self.key = (seed, stage)
        share, shuffle = max(open_samples // len(self.strata), 1), shuffle or Shuffle()
        counts = round_mixture([mixture[name] for name in self.strata], window)
        self.counts = dict(zip(self.strata, counts, strict=True))
        self._streams: Mapping[str, Stream] = streams or {
            name: _Stream(
                samples[name], (*self.key, name), share, span, shuffle.block, shuffle.window * count // window
            )
            for name, count in self.counts.items()
        }
        self._deal_window = lru_cache(maxsize=4)(
            lambda number: _dealt(list(self.counts.values()), "plan/window/1", *self.key, number)
        )

    def step(self, number: int) -> list[Draw]:
        """The draws of step `number` (from 0), in order: the global batch, to be split by rank."""
        return [self.draw(index) for index in range(number * self.batch, (number + 1) * self.batch)]

    def draw(self, index: int) -> Draw:
        """The draw of this number."""
        window, offset = divmod(index, self.window)
        dealt, ranks = self._deal_window(window)
        stratum = self.strata[dealt[offset]]
        return self._drawn(index, stratum, window * self.counts[stratum] + int(ranks[offset]))

    def spare(self, draw: Draw, attempt: int) -> Draw:
        """What stands in for a damaged sample: the `attempt`-th (from 1) sample after it in its stratum's stream."""
        return self._drawn(draw.index, draw.stratum, draw.position + attempt)

    def _drawn(self, index: int, stratum: str, position: int) -> Draw:
        stream = self._streams[stratum]
        sample = stream.at(position)
        return Draw(index, stratum, stream.task(sample), sample, position)


class BucketPlan:
    """The stream of a stage in which all samples of a step are of one bucket: a plan for each, taken by turns.

    A window is `STEPS` steps. Their buckets are dealt as strata are: in the buckets' shares, rounded once to whole
    steps, shuffled anew in each window. So the mixture is exact within each bucket's windows; over all it is as exact
    as the rounding of their shares.

    Args:
        plans: of each bucket; all have the same batch.
        shares: of the draws that each is to have; need not sum to 1.
        seed: the run's seed.
        stage: the stage's name.
        window: steps per window.
    """

    def __init__(
        self, plans: Mapping[Size, StagePlan], shares: Mapping[Size, float], seed: int, stage: str, window: int = STEPS
    ) -> None:
        self.key = (seed, stage)
        self.sizes = sorted(plans)
        self.batch = plans[self.sizes[0]].batch
        self.strata = sorted({name for plan in plans.values() for name in plan.strata})
        self.window = window
        self.counts = dict(zip(self.sizes, round_mixture([shares[s] for s in self.sizes], window), strict=True))
        self._plans = dict(plans)
        self._deal_window = lru_cache(maxsize=4)(
            lambda number: _dealt(list(self.counts.values()), "plan/steps/1", *self.key, number)
        )

    def step(self, number: int) -> list[Draw]:
        """The draws of step `number` (from 0), in order: the global batch, to be split by rank."""
        window, offset = divmod(number, self.window)
        dealt, ranks = self._deal_window(window)
        size = self.sizes[dealt[offset]]
        draws = self._plans[size].step(window * self.counts[size] + int(ranks[offset]))
        return [replace(draw, index=number * self.batch + place, size=size) for place, draw in enumerate(draws)]

    def draw(self, index: int) -> Draw:
        """The draw of this number."""
        return self.step(index // self.batch)[index % self.batch]

    def spare(self, draw: Draw, attempt: int) -> Draw:
        """What stands in for a damaged sample: as `StagePlan.spare`, of the same bucket."""
        assert draw.size is not None
        return replace(self._plans[draw.size].spare(draw, attempt), size=draw.size)


def _dealt(counts: list[int], *key: int | str) -> tuple[np.ndarray, np.ndarray]:
    """So many of each number, shuffled; and for each, how many of the same came before it."""
    dealt = np.repeat(np.arange(len(counts)), counts)
    generator(*key).shuffle(dealt)
    ranks = np.empty(len(dealt), np.int64)
    for number in range(len(counts)):
        where = np.flatnonzero(dealt == number)
        ranks[where] = np.arange(len(where))
    return dealt, ranks


@dataclass(frozen=True)
class _Epoch:
    """The order of one epoch: row groups, where each ends in the stream, and where the runs begin (and the last ends)."""

    order: np.ndarray
    ends: np.ndarray
    runs: np.ndarray


class _Stream:
    """One stratum's samples, epoch after epoch."""

    def __init__(
        self, samples: Stratum, key: tuple[int | str, ...], share: int, span: int, block: int, window: int
    ) -> None:
        self._samples = samples
        self._key, self._share, self._span = key, share, span
        self._block, self._window = block, window
        self._size = int(samples.counts.sum())
        self._epoch = lru_cache(maxsize=4)(self._ordered)

    def at(self, position: int) -> int:
        """The sample at a position of the stream."""
        number, place = divmod(position, self._size)
        epoch = self._epoch(number)
        run = int(epoch.runs.searchsorted(place, "right")) - 1
        begin, end = int(epoch.runs[run]), int(epoch.runs[run + 1])
        place = begin + Order.of(end - begin, self._block, self._window).at(place - begin, *self._key, number, run)
        entry = int(epoch.ends.searchsorted(place, "right"))
        group = int(epoch.order[entry])
        return self._samples.at(group, place - int(epoch.ends[entry]) + int(self._samples.counts[group]))

    def task(self, sample: int) -> str:
        """A sample's task."""
        return self._samples.task(sample)

    def _ordered(self, number: int) -> _Epoch:
        counts, sizes = self._samples.counts, self._samples.sizes
        order = generator("plan/groups/1", *self._key, number).permutation(len(counts))
        ends = np.cumsum(counts[order])
        runs, before, rows = [0], 0, 0  # where each begins; samples up to here, and rows of the run at hand
        for end, size in zip(ends.tolist(), sizes[order].tolist(), strict=True):
            before, rows = end, rows + size
            if before - runs[-1] >= self._share or rows >= self._span:
                runs.append(before)
                rows = 0
        return _Epoch(order, ends, np.array(runs if before == runs[-1] else [*runs, before]))


def round_mixture(weights: list[float], total: int) -> list[int]:
    """Whole numbers in these proportions that sum to `total`: largest remainder, at least one each.

    Raises:
        RecipeError: more weights than `total`.
    """
    if len(weights) > total:
        raise RecipeError(f"a mixture of {len(weights)} parts does not fit into windows of {total} draws")
    exact = np.array(weights, float) / sum(weights) * total
    counts = np.maximum(np.floor(exact).astype(int), 1)
    while (rest := total - counts.sum()) != 0:
        gap = exact - counts
        if rest < 0:
            gap[counts == 1] = np.inf  # never below one
        counts[gap.argmax() if rest > 0 else gap.argmin()] += np.sign(rest)
    return [int(c) for c in counts]
