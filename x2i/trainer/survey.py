"""What a packed stage knows of its samples before it is planned: some of them, measured, which stand for all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log, pi, sqrt
from statistics import NormalDist

import numpy as np

from x2i.trainer.capacity import Lot
from x2i.trainer.lengths import ASKED
from x2i.trainer.measured import Classed, Rows

#: Packs that may come out too long, and samples that may be left out for it, at most, by what estimates are worth.
_OVER, _LEFT_OUT = 0.01, 0.0025

#: Of the budget, at most one in so many tokens is left for what texts' estimates may be wrong: where they say little,
#: packs are more often too long.
_MARGIN = 8

_GOLDEN = (sqrt(5) - 1) / 2

#: Rows of the manifest from which the lengths within a stratum's classes are taken: those of row groups evenly spaced.
_ROWS = 1 << 18


@dataclass(frozen=True)
class Room:
    """What packs are planned to, and what each sample takes of that beside its tokens, as its text is only estimated.

    A pack whose texts have the variance V needs a margin of z sqrt(V). The tangent of the root at the V0 of a mean pack
    is z sqrt(V0) / 2 for every pack and z V / (2 sqrt(V0)), of which each sample has its share; and nowhere below the root.

    Attributes:
        limit: tokens, at most those of the budget.
        rate: tokens for each of a text's variance.
    """

    limit: int
    rate: float = 0.0

    def taken(self, tokens: np.ndarray, doubt: np.ndarray) -> np.ndarray:
        """What samples take, int64. One that is as long as a pack takes all of it."""
        found = np.minimum(tokens + np.rint(self.rate * doubt).astype(np.int64), np.maximum(tokens, self.limit))
        return np.asarray(found)


@dataclass(frozen=True)
class Survey:
    """Some samples of all strata, which stand for all.

    `weight`: of each, what it stands for of all that is drawn; `stands`: of how many samples it is one.
    """

    rows: Rows
    stratum: np.ndarray
    weight: np.ndarray
    stands: np.ndarray
    classes: int

    @classmethod
    def of(cls, samples: list[Classed], weights: np.ndarray) -> Survey:
        found, stratum, weight, stands = [], [], [], []
        for number, each in enumerate(samples):
            totals, groups = each.counts.sum(1), each.counts.shape[1]
            number_of = min(max(int(_ROWS / each.sizes.mean()), 1), groups)
            chosen = set(np.unique(np.linspace(0, groups - 1, number_of).astype(int)).tolist())
            seen = each.counts[:, sorted(chosen)].sum(1)
            chosen |= set(each.counts[(totals > 0) & (seen == 0)].argmax(1).tolist())
            entries = sorted(chosen)
            seen = each.counts[:, entries].sum(1)
            for entry in entries:
                rows = each.rows(entry)
                found.append(rows)
                stands.append(totals[rows.kind] / seen[rows.kind])
                weight.append(stands[-1] / totals.sum() * weights[number])
                stratum.append(np.full(len(rows.kind), number))
        rows = Rows(*(np.concatenate(column) for column in zip(*(vars(f).values() for f in found), strict=True)))
        mine, stand, each_weight = (np.concatenate(column) for column in (stratum, stands, weight))
        return cls(rows, mine, each_weight, stand, len(samples[0].counts))

    def mean(self, of: np.ndarray, dropout: float) -> float:
        """Mean length of the chosen samples, to six digits: not to hang on the last bit of a sum."""
        lengths, drop = self.rows.shown[of], np.where(self.rows.drawn, dropout, 0.0)[of]
        return float(f"{np.average(lengths - drop * (lengths - self.rows.bare[of]), weights=self.weight[of]):.6g}")

    def weighted(self, weights: np.ndarray) -> Survey:
        """The same samples, for strata of these weights."""
        total = np.bincount(self.stratum, self.weight)
        return replace(self, weight=self.weight * (weights / total)[self.stratum])

    def room(self, budget: int, dropout: float) -> Room:
        """What packs are planned to, so that the most tokens of them are used.

        A margin of z standard deviations costs as much; without it a sample is lost wherever a text is so much longer.
        What both cost together is least where the normal density at z is the standard deviation by a sample's mean length.
        """
        mine = self.rows.shown <= budget
        if not mine.any():
            return Room(budget)
        mean = self.mean(mine, dropout)
        count = max(budget / mean, 1.0)
        kept = np.where(self.rows.drawn, 1 - dropout, 1.0)[mine]
        variance = count * float(np.average(kept * self.rows.doubt[mine], weights=self.weight[mine]))
        variance *= 1 + count / ASKED  # what the texts that were asked for are longer or shorter, all are taken to be
        if variance < 0.01:
            return Room(budget)
        least = -NormalDist().inv_cdf(min(_OVER, _LEFT_OUT * count))
        z = max(least, sqrt(max(2 * log(mean / sqrt(2 * pi * variance)), 0.0)))
        margin = min(z * sqrt(variance), budget / _MARGIN)
        # rounded: nothing is to hang on the last bit of a sum
        return Room(budget - round(margin / 2), float(f"{margin / 2 / variance:.6g}"))

    def lot(self, room: Room, dropout: float) -> Lot:
        """What packing makes of them."""
        rows, kind = self.rows, self.stratum * self.classes + self.rows.kind
        return Lot(
            *(room.taken(rows.shown, rows.doubt), rows.bare, np.where(rows.drawn, dropout, 0.0), self.weight, kind)
        )

    def means(self, stratum: int) -> np.ndarray:
        """Mean length of each class of a stratum; 0 where there is none."""
        mine = self.stratum == stratum
        kind = self.rows.kind[mine]
        number = np.bincount(kind, minlength=self.classes)
        return np.asarray(np.bincount(kind, self.rows.shown[mine], self.classes) / np.maximum(number, 1))
