"""Packs: samples of several lengths side by side in sequences of one budget, planned from the manifest.

As all plans, a pure function of the manifests, the mixture, the seed, the stage and the step; any step can be had at once.

- A window is a fixed number of packs, whole steps, and a fixed number of draws. The samples of a stratum are told apart by
  length (`x2i.trainer.classes`); each part of a stratum gets its share of the window's draws, so that all windows have
  about the same lengths in them, however the corpora are sorted. Shares are not rounded window by window, but over all
  windows from the first (as a line is drawn in pixels): parts of one stratum go through their epochs side by side, and
  the mixture is off by less than a draw for each part, after however many steps, but for draws that are left out.
- Each part is a stream, as the strata of `x2i.trainer.plan` are. The parts of a stratum go through the row groups in the
  same order, and are shuffled in the same runs and blocks.
- How many draws fit into a window, and which ranks of length make up a pack, is found once for a stage, on windows that
  are made up like those that will come (`x2i.trainer.capacity`). In a window the draws, measured by the manifest, take the
  places of their ranks, and packs that came out too long exchange samples with others. Then the packs are dealt to the
  steps.
- Texts are counted by the run's tokenizer where there are few (`x2i.trainer.counted`), else estimated. Beside its tokens
  a sample takes of a pack what its estimate may be wrong (`x2i.trainer.survey.Room`): now and then a pack is too long all
  the same, and its last samples have to be left out.

Samples longer than the budget are never drawn. A draw that no exchange makes room for, of a few in a thousand, is left out
until the next epoch. Which samples are shown without their condition is planned too, for they are short.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from x2i.base.errors import RecipeError
from x2i.base.seeds import digest, generator
from x2i.trainer.bins import fitted, placed, repair
from x2i.trainer.capacity import FULL
from x2i.trainer.config import Shuffle
from x2i.trainer.measured import Classed, Rows
from x2i.trainer.plan import OPEN, SPAN, Draw
from x2i.trainer.stage import Pack
from x2i.trainer.streams import PartStream
from x2i.trainer.survey import Room, Survey
from x2i.trainer.window import ONE, divide

#: Draws in a window, about; fewer where an epoch is shorter.
WINDOW = 4096

#: Bytes of all strata's samples, by row group, that are kept.
_MEMORY = 64 << 20

#: Draws, in order of length, that change places with each other; 0: those of one length.
_NEAR = (256, 64, 0)

_GOLDEN = 0x9E3779B97F4A7C15
_SPARES = 128


@dataclass(frozen=True)
class _Window:
    """The draws of a window, by step, pack and place. `firsts`: of each step; `taken`: of a
    pack's limit by each, `loads`: by step and pack.
    """

    stratum: np.ndarray
    part: np.ndarray
    position: np.ndarray
    rows: Rows
    dropped: np.ndarray
    tokens: np.ndarray
    pack: np.ndarray
    firsts: np.ndarray
    taken: np.ndarray
    loads: np.ndarray


class PackPlan:
    """The stream of a packed stage. `key` (seed and stage) seeds all that is random in it.

    Attributes:
        strata: names.
        batch: mean number of samples in a step.
        fill: planned mean share of the budget that is used.
        too_long: by task, samples that are longer than a pack and are never drawn: exact if the corpora are small,
            else estimated from some row groups.
        limit: tokens to which packs are planned.

    Args:
        samples: for each stratum, its training samples.
        mixture: weights by stratum; need not sum to 1.
        pack: the budget, and packs in a step.
        seed: the run's seed.
        stage: the stage's name.
        by_tokens: whether the weights are shares of the tokens, not of the samples.
        dropout: share of the samples that are shown without their condition.
        window: draws in a window, about.
        open_samples, span: of the runs within which a stratum's samples are shuffled; `shuffle`: how.

    Raises:
        RecipeError: a stratum of the mixture has no samples that fit, or there are more than draws in a window.
    """

    def __init__(
        self,
        samples: Mapping[str, Classed],
        mixture: Mapping[str, float],
        pack: Pack,
        seed: int,
        stage: str,
        by_tokens: bool = False,
        dropout: float = 0.0,
        window: int = WINDOW,
        open_samples: int = OPEN,
        span: int = SPAN,
        shuffle: Shuffle | None = None,
    ) -> None:
        self.strata = sorted(mixture)
        self.key = (seed, stage)
        self._samples = [samples[name] for name in self.strata]
        self._dropped_below = round(dropout * 2**64)
        self._drop_key = int(digest("plan/dropped/1", *self.key)[:16], 16)
        weights = np.array([mixture[name] for name in self.strata], float)
        weights /= weights.sum()
        some = Survey.of(self._samples, weights)
        if by_tokens:
            weights = weights / [some.mean(some.stratum == number, dropout) for number in range(len(weights))]
            weights /= weights.sum()
            some = some.weighted(weights)
        self._room = some.room(pack.tokens, dropout)
        self.limit = self._room.limit
        self.too_long = self._check(some, stage)
        lot = some.lot(self._room, dropout)
        mean, shown = lot.mean(self.limit), some.mean(some.rows.shown <= self.limit, dropout)
        epoch = min(float(s.counts.sum()) / w for s, w in zip(self._samples, weights, strict=True))
        wanted = min(window, max(epoch, 512))
        self.steps = max(round(wanted * mean / (self.limit * pack.packs)), 1)
        self.packs, packs = pack.packs, pack.packs * self.steps
        random = generator("plan/pattern/2", *self.key)
        pattern = lot.most(self.limit, packs, random)
        self._home, self.window = pattern.home, pattern.count
        self.batch = pattern.items / self.steps
        self.fill = pattern.fill * shown / mean / (packs * pack.tokens)
        margin = 1 - self.limit / pack.tokens * shown / mean
        self._budget, self._lot = (pack.tokens, margin), some.lot(Room(pack.tokens), dropout).few(random)
        if len(self.strata) > self.window:
            raise RecipeError(
                f"stages.{stage}: a mixture of {len(self.strata)} parts does not fit into windows of {self.window} draws"
            )
        self._parts, self._ends = divide([s.counts.sum(1) for s in self._samples], some, weights, self.window)
        share, memory = max(open_samples // len(self.strata), 1), _MEMORY // len(self.strata)
        shuffle, ends = shuffle or Shuffle(), [0, *self._ends]
        self._streams = []
        for number, (name, of) in enumerate(zip(self.strata, self._samples, strict=True)):
            mine = [place for place, part in enumerate(self._parts) if part.stratum == number]
            wide = shuffle.window * sum(ends[place + 1] - ends[place] for place in mine) // ends[-1]
            limits = share, span, shuffle.block, wide, memory
            self._streams.append(PartStream(of, [self._parts[p].kinds for p in mine], (*self.key, name), *limits))
        self._window = lru_cache(maxsize=4)(self._made)

    def better(self) -> tuple[int, float] | None:
        """Where packs do not reach `capacity.FULL`: a larger budget that would, and how far; None if none does nearby."""
        if self.fill >= FULL:
            return None
        budget, margin = self._budget
        return self._lot.better(budget, generator("plan/better/1", *self.key), margin)

    def step(self, number: int) -> list[Draw]:
        """The draws of step `number` (from 0), pack by pack: the global batch, to be split by rank."""
        window, step = divmod(number, self.steps)
        made = self._window(window)
        first, last = made.firsts[step : step + 2].tolist()
        return self._draws(window, made, slice(first, last))

    def draw(self, index: int) -> Draw:
        """The draw of this number. Raises IndexError if the sample that would have it was too long."""
        window, place = divmod(index, self.window)
        made = self._window(window)
        if place >= len(made.tokens):
            raise IndexError(index)
        return self._draws(window, made, slice(place, place + 1))[0]

    def spare(self, draw: Draw, attempt: int) -> Draw:
        """What stands in for a damaged sample: the `attempt`-th (from 1) of those after it that fit into its pack.

        They are of the same stratum, each another sample, and about as long or shorter. If so many do not fit, the
        shortest of the others.
        """
        assert draw.pack is not None and draw.tokens is not None and draw.part is not None
        made = self._window(draw.index // self.window)
        place = draw.index % self.window
        step = int(made.firsts.searchsorted(place, "right")) - 1
        room = int(made.taken[place]) + max(self.limit - int(made.loads[step, draw.pack]), 0)
        stratum = self.strata.index(draw.stratum)
        stream = self._streams[stratum]
        wanted = [(draw.part, draw.position + 1, _SPARES)]
        near = [*range(draw.part - 1, -1, -1)[:4], *range(draw.part + 1, len(stream.totals))[:4]]
        for part in near:  # shorter ones and, if none is left, longer ones, as far as this one has come
            wanted.append((part, draw.position * stream.totals[part] // stream.totals[draw.part] + 1, _SPARES // 4))
        positions, parts = (
            np.concatenate([np.arange(n) + first for _, first, n in wanted]),
            np.repeat([part for part, _, _ in wanted], [n for *_, n in wanted]),
        )
        rows = stream.at(wanted)
        dropped = rows.drawn & bool(draw.dropped)
        tokens = np.where(dropped, rows.bare, rows.shown)
        taken = np.where(dropped, rows.bare, self._room.taken(rows.shown, rows.doubt))
        taken = np.where(rows.shown > self.limit, 1 << 40, taken)
        order = np.lexsort((np.where(taken <= room, 0, taken), taken > room))
        order = order[np.sort(np.unique(rows.sample[order], return_index=True)[1])]  # small parts come round soon
        others = order[rows.sample[order] != draw.sample]
        order = others if len(others) else order
        chosen = int(order[(attempt - 1) % len(order)])
        of = self._samples[stratum]
        return Draw(
            *(draw.index, draw.stratum, of.tasks[int(rows.task[chosen])], int(rows.sample[chosen])),
            *(int(positions[chosen]), _size(of, rows, chosen), draw.pack, int(tokens[chosen])),
            *(bool(dropped[chosen]), int(parts[chosen])),
        )

    def _draws(self, window: int, made: _Window, places: slice) -> list[Draw]:
        first = window * self.window + places.start
        columns = (made.stratum, made.part, made.position, made.rows.task, made.rows.sample, made.rows.size)
        told = (made.pack, made.tokens, made.dropped)
        out = []
        for number, (stratum, part, position, task, sample, size, pack, tokens, dropped) in enumerate(
            zip(*(column[places].tolist() for column in (*columns, *told)), strict=True)
        ):
            of = self._samples[stratum]
            box = None if size < 0 else of.boxes[size]
            name = self.strata[stratum]
            out.append(Draw(first + number, name, of.tasks[task], sample, position, box, pack, tokens, dropped, part))
        return out

    def _made(self, number: int) -> _Window:
        """Window `number`: its draws, each in a pack."""
        random = generator("plan/packs/1", *self.key, number)
        begin, end = (self._before(n) for n in (number, number + 1))
        stratum, part, position, found = [], [], [], []
        for place in range(len(self.strata)):
            mine = [k for k, p in enumerate(self._parts) if p.stratum == place]
            wanted = [(within, begin[k], end[k] - begin[k]) for within, k in enumerate(mine) if end[k] > begin[k]]
            if wanted:
                found.append(self._streams[place].at(wanted))
                part.append(np.repeat([w for w, _, _ in wanted], [n for _, _, n in wanted]))
                position.append(np.concatenate([np.arange(first, first + n) for _, first, n in wanted]))
                stratum.append(np.full(len(part[-1]), place))
        rows = Rows(*(np.concatenate(column) for column in zip(*(vars(f).values() for f in found), strict=True)))
        made = [np.concatenate(column) for column in (stratum, part, position)]
        dropped = rows.drawn & self._drops(*made)
        tokens = np.where(dropped, rows.bare, rows.shown)
        taken = np.where(dropped, rows.bare, self._room.taken(rows.shown, rows.doubt))
        mixed = random.permutation(np.flatnonzero(rows.shown <= self.limit))  # equal lengths lie anyhow
        mixed = mixed[np.argsort(taken[mixed], kind="stable")]
        packs = self.packs * self.steps
        home = placed(taken[mixed], packs, self.limit, fitted(self._home, taken[mixed], packs))
        mixed, home = mixed[home >= 0], home[home >= 0]
        home = random.permutation(packs)[home]
        home = self._together(taken[mixed], rows.sample[mixed], home, random)
        order = np.lexsort((random.random(len(mixed)), home))
        mixed, home = mixed[order], home[order]
        loads = np.bincount(home, taken[mixed], packs).astype(np.int64).reshape(self.steps, self.packs)
        firsts = np.searchsorted(home, np.arange(self.steps + 1) * self.packs)
        mine, parts, positions = (column[mixed] for column in made)
        dropped, tokens, home = dropped[mixed], tokens[mixed], home % self.packs
        return _Window(mine, parts, positions, rows[mixed], dropped, tokens, home, firsts, taken[mixed], loads)

    def _together(
        self, taken: np.ndarray, samples: np.ndarray, home: np.ndarray, random: np.random.Generator
    ) -> np.ndarray:
        """Packs with neighbours in a corpus among neighbours of a step's packs, which one rank takes.

        Draws of about one length, which follow one another here, change places; then packs that are too long are mended.
        """
        ties = random.random(len(home))
        for near in _NEAR:
            groups = np.arange(len(home)) // near if near else taken
            by_place = np.lexsort((samples, groups))
            by_pack = np.lexsort((ties, home % self.packs, groups))
            moved = home.copy()
            moved[by_place] = home[by_pack]
            if repair(taken, moved, self.packs * self.steps, self.limit):
                return moved
        return home

    def _before(self, window: int) -> list[int]:
        """For each part, its draws in all windows before this one."""
        ends = [window * end // ONE for end in self._ends]
        return [end - before for before, end in zip([0, *ends], ends, strict=False)]

    def _drops(self, stratum: np.ndarray, part: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Which draws are shown without their condition: evenly spread over each part's stream (Weyl's sequence)."""
        if not self._dropped_below:
            return np.zeros(len(position), bool)
        begin = (stratum.astype(np.uint64) << np.uint64(32)) + part.astype(np.uint64)
        begin = (begin + np.uint64(self._drop_key)) * np.uint64(0xBF58476D1CE4E5B9)
        return np.asarray(position.astype(np.uint64) * np.uint64(_GOLDEN) + begin < np.uint64(self._dropped_below))

    def _check(self, some: Survey, stage: str) -> dict[str, int]:
        """Samples by task that are longer than a pack. Raises RecipeError if they are all of a stratum."""
        found: dict[str, float] = {}
        long = some.rows.shown > self.limit
        for number, (name, of) in enumerate(zip(self.strata, self._samples, strict=True)):
            mine = some.stratum == number
            if long[mine].all():
                raise RecipeError(
                    f"stages.{stage}.pack: no sample of {name} fits into {self.limit} tokens (the budget, less what the "
                    f"text's estimate may be wrong); the shortest seen takes {int(some.rows.shown[mine].min())}"
                )
            for task, each in zip(some.rows.task[mine & long].tolist(), some.stands[mine & long].tolist(), strict=True):
                found[of.tasks[task]] = found.get(of.tasks[task], 0.0) + each
        return {task: max(round(count), 1) for task, count in sorted(found.items())}


def _size(of: Classed, rows: Rows, place: int) -> tuple[int, int] | None:
    return None if rows.size[place] < 0 else of.boxes[int(rows.size[place])]
