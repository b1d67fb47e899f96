"""The order of the samples: a pure function of the samples, the mixture, the seed, the stage and the step.

Nothing is stored and nothing grows with the corpus, so a step number is the whole state of the stream.

- Draws are numbered through a stage; step n takes draws [n * batch, (n + 1) * batch).
- A window is `WINDOW` draws. The mixture is rounded once to whole draws per window (largest remainder, at
  least one for each task), and each window shuffles them anew with a generator of its own.
- Each task is a stream of its own. It walks through its samples epoch by epoch, each time in another order:
  a keyed permutation that is computed at a point (a Feistel network with cycle walking), never stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from x2i.base.errors import RecipeError
from x2i.base.seeds import digest, generator

WINDOW = 4096
_ROUNDS = 6


@dataclass(frozen=True)
class Draw:
    """One place of the stream.

    Attributes:
        index: number of the draw within its stage, from 0.
        task: the task_type it was dealt.
        sample: row of the sample table.
        position: place in the task's stream; `position // len(samples)` is the epoch.
    """

    index: int
    task: str
    sample: int
    position: int


class StagePlan:
    """The stream of one stage. `key` (seed and stage) seeds all that is random in it.

    Args:
        samples: for each task, the rows of its training samples, in the table's order.
        mixture: weights by task; need not sum to 1.
        batch: draws per step.
        seed: the run's seed.
        stage: the stage's name.
        window: draws per window.

    Raises:
        RecipeError: a task of the mixture has no samples, or there are more tasks than draws in a window.
    """

    def __init__(
        self,
        samples: Mapping[str, np.ndarray],
        mixture: Mapping[str, float],
        batch: int,
        seed: int,
        stage: str,
        window: int = WINDOW,
    ) -> None:
        missing = [t for t in mixture if not len(samples.get(t, ()))]
        if missing:
            there = ", ".join(t for t in samples if len(samples[t])) or "none"
            raise RecipeError(
                f"stages.{stage}.mixture: the corpora have no training samples of {', '.join(missing)}; they have {there}"
            )
        self.tasks = sorted(mixture)
        self.batch = batch
        self.window = window
        self._samples = {t: samples[t] for t in self.tasks}
        self.key = (seed, stage)
        self.counts = dict(zip(self.tasks, round_mixture([mixture[t] for t in self.tasks], window), strict=True))
        self._deal_window = lru_cache(maxsize=4)(self._deal)

    def step(self, number: int) -> list[Draw]:
        """The draws of step `number` (from 0), in order: the global batch, to be split by rank."""
        return [self.draw(index) for index in range(number * self.batch, (number + 1) * self.batch)]

    def draw(self, index: int) -> Draw:
        """The draw of this number."""
        window, offset = divmod(index, self.window)
        tasks, ranks = self._deal_window(window)
        task = self.tasks[tasks[offset]]
        position = window * self.counts[task] + int(ranks[offset])
        return Draw(index, task, self._at(task, position), position)

    def spare(self, draw: Draw, attempt: int) -> Draw:
        """What stands in for a damaged sample: the `attempt`-th (from 1) sample after it in its task's stream."""
        return Draw(draw.index, draw.task, self._at(draw.task, draw.position + attempt), draw.position + attempt)

    def _at(self, task: str, position: int) -> int:
        samples = self._samples[task]
        epoch, place = divmod(position, len(samples))
        return int(samples[permuted(place, len(samples), *self.key, task, epoch)])

    def _deal(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """For each draw of a window: the task's number, and how many of that task came before it."""
        dealt = np.repeat(np.arange(len(self.tasks)), list(self.counts.values()))
        generator("plan/window/1", *self.key, window).shuffle(dealt)
        ranks = np.empty(self.window, np.int64)
        for task in range(len(self.tasks)):
            where = np.flatnonzero(dealt == task)
            ranks[where] = np.arange(len(where))
        return dealt, ranks


def round_mixture(weights: list[float], total: int) -> list[int]:
    """Whole numbers in these proportions that sum to `total`: largest remainder, at least one each.

    Raises:
        RecipeError: more weights than `total`.
    """
    if len(weights) > total:
        raise RecipeError(f"a mixture of {len(weights)} tasks does not fit into windows of {total} draws")
    exact = np.array(weights, float) / sum(weights) * total
    counts = np.maximum(np.floor(exact).astype(int), 1)
    while (rest := total - counts.sum()) != 0:
        gap = exact - counts
        if rest < 0:
            gap[counts == 1] = np.inf  # never below one
        counts[gap.argmax() if rest > 0 else gap.argmin()] += np.sign(rest)
    return [int(c) for c in counts]


def permuted(place: int, size: int, *key: int | str) -> int:
    """Where a keyed permutation of range(size) sends `place`. Every key is another permutation.

    A balanced Feistel network over the next even number of bits (Luby and Rackoff 1988), applied again
    while its result lies outside the range (cycle walking, Black and Rogaway 2002): four times at most
    on average, and no memory.
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    rounds = _round_keys(*key)
    while True:
        left, right = place >> half, place & mask
        for round_key in rounds:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        place = left << half | right
        if place < size:
            return place


@lru_cache(maxsize=256)
def _round_keys(*key: int | str) -> tuple[int, ...]:
    whole = digest("plan/permutation/1", *key)
    return tuple(int(whole[i * 8 : i * 8 + 8], 16) for i in range(_ROUNDS))


def _mix(x: int) -> int:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31
