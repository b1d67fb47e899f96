"""What a packed stage knows of its samples before it is planned: some of them, measured, which stand for all."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from x2i.trainer.lengths import Fit
from x2i.trainer.measured import Classed, Rows

#: Standard deviations by which the texts of a mean pack may be longer than estimated.
MARGIN = 3.0

#: Rows of the manifest from which the lengths within a stratum's classes are taken: those of row groups evenly spaced.
_ROWS = 1 << 18


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

    def mean_of(self, stratum: int, dropout: float) -> float:
        """Mean length of a stratum's samples, to six digits: not to hang on the last bit of a sum."""
        values, weight = self.lengths(self.stratum == stratum, dropout)
        return float(f"{np.average(values, weights=weight):.6g}")

    def weighted(self, weights: np.ndarray) -> Survey:
        """The same samples, for strata of these weights."""
        total = np.bincount(self.stratum, self.weight)
        return replace(self, weight=self.weight * (weights / total)[self.stratum])

    def margin(self, fit: Fit, budget: int, dropout: float) -> int:
        """Tokens by which the texts of a mean pack may be longer than they are estimated."""
        mine = self.rows.shown <= budget
        if not mine.any():
            return 0
        mean = float(np.average(self.rows.shown[mine], weights=self.weight[mine]))
        text = float(np.average(np.maximum(self.rows.text[mine], 4.0), weights=self.weight[mine])) * (1 - dropout)
        # rounded: nothing is to hang on the last bit of a sum
        return int(np.ceil(round(MARGIN * fit.spread * np.sqrt(text * max(budget / mean, 1.0)), 6)))

    def lengths(self, of: np.ndarray, dropout: float) -> tuple[np.ndarray, np.ndarray]:
        """Lengths in order, and how often each comes, of the chosen samples."""
        drop = np.where(self.rows.drawn, dropout, 0.0)[of] * self.weight[of]
        values = np.concatenate([self.rows.shown[of], self.rows.bare[of]])
        weight = np.concatenate([self.weight[of] - drop, drop])
        found, places = np.unique(values, return_inverse=True)
        return found, np.bincount(places, weight)

    def means(self, stratum: int) -> np.ndarray:
        """Mean length of each class of a stratum; 0 where there is none."""
        mine = self.stratum == stratum
        kind = self.rows.kind[mine]
        number = np.bincount(kind, minlength=self.classes)
        return np.asarray(np.bincount(kind, self.rows.shown[mine], self.classes) / np.maximum(number, 1))

    def spread(self, of: np.ndarray) -> float:
        """Standard deviation of the length of a draw within its class."""
        name = self.stratum[of].astype(np.int64) * self.classes + self.rows.kind[of]
        weight, shown = self.weight[of], self.rows.shown[of].astype(float)
        total = np.maximum(np.bincount(name, weight), 1e-300)
        mean = np.bincount(name, weight * shown) / total
        return float(f"{np.sqrt(np.average((shown - mean[name]) ** 2, weights=weight)):.6g}")
