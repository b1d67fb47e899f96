"""How full packs become: as many draws as fit into windows like those that will come, made up from some of the samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, sqrt

import numpy as np

from x2i.trainer.bins import Pattern, most

#: The share of the budget that packs are to reach.
FULL = 0.97

#: Budgets that are tried in its place where they do not, and draws in a window of these.
_TIMES, _WINDOW = (1.0625, 1.125, 1.25, 1.5, 1.75, 2.0, 3.0, 4.0), 1500

_GOLDEN = (sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Lot:
    """Some samples that stand for all.

    Attributes:
        shown: what each takes of a pack, int64; `bare`: without its condition, which `dropout` of its draws lack.
        weight: of each, what it stands for. `kind`: those of one are drawn at their share in every window.
    """

    shown: np.ndarray
    bare: np.ndarray
    dropout: np.ndarray
    weight: np.ndarray
    kind: np.ndarray

    def mean(self, limit: int) -> float:
        """Mean length of what fits, to six digits: not to hang on the last bit of a sum."""
        fits = self.shown <= limit
        lengths, drop = self.shown[fits], self.dropout[fits]
        return float(f"{np.average(lengths - drop * (lengths - self.bare[fits]), weights=self.weight[fits]):.6g}")

    def most(self, limit: int, packs: int, random: np.random.Generator) -> Pattern:
        """A window of so many packs: as many draws as fit into it again and again."""
        windows, fits = self.windows(random), self.shown <= limit

        def drawn(count: int) -> np.ndarray:
            """Lengths of so many draws that fit, in order."""
            chosen, dropped = windows(count)
            chosen, dropped = chosen[fits[chosen]], dropped[fits[chosen]]
            return np.sort(np.where(dropped, self.bare[chosen], self.shown[chosen]))

        share = round(float(self.weight[fits].sum() / self.weight.sum()), 9)
        return most(drawn, packs, limit, int(packs * limit / self.mean(limit) / share) + 1)

    def windows(self, random: np.random.Generator) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
        """What makes up so many draws, others each time: their places, and which are shown without their condition."""
        order = random.permutation(len(self.weight))
        kind = self.kind[order]
        order = order[np.argsort(kind.astype(np.uint16) if kind.max() < 1 << 16 else kind, kind="stable")]
        ends = np.cumsum(self.weight[order])

        def drawn(count: int) -> tuple[np.ndarray, np.ndarray]:
            places = (np.arange(count) + random.random()) / count * ends[-1]
            chosen = order[np.minimum(np.searchsorted(ends, places, "right"), len(order) - 1)]
            return chosen, (np.arange(count) * _GOLDEN + random.random()) % 1 < self.dropout[chosen]

        return drawn

    def few(self, random: np.random.Generator, count: int = 4 * _WINDOW) -> Lot:
        """Some of them, which stand for all."""
        if len(self.weight) <= count:
            return self
        chosen, _ = self.windows(random)(count)
        return Lot(self.shown[chosen], self.bare[chosen], self.dropout[chosen], np.ones(count), self.kind[chosen])

    def fill(self, budget: int, random: np.random.Generator, margin: float = 0.0) -> float:
        """Share of packs that is planned, in a small window. 0 if nothing fits.

        Args:
            margin: of the budget, what is left for estimates.
        """
        limit = int(budget * (1 - margin))
        if not (self.shown <= limit).any():
            return 0.0
        packs = max(round(_WINDOW * self.mean(limit) / limit), 4)
        return self.most(limit, packs, random).fill / (packs * budget)

    def better(self, budget: int, random: np.random.Generator, margin: float = 0.0) -> tuple[int, float] | None:
        """The first larger budget of whose packs `FULL` are planned, and how much of them; None if there is none near."""
        for times in _TIMES:
            tokens = ceil(budget * times / 64) * 64
            found = self.fill(tokens, random, margin / sqrt(times))
            if found >= FULL:
                return tokens, found
        return None


def words(stage: str, budget: int, fill: float, better: tuple[int, float] | None) -> str:
    """What a person should know of packs that are not full; empty where they are."""
    if fill >= FULL:
        return ""
    told = f"stage {stage}: packs of {budget:,} tokens are planned {fill:.1%} full, for its samples fit no better"
    if better is None:
        return f"{told}; nor do they into larger ones"
    return f"{told}; of {better[0]:,} tokens they would be {better[1]:.1%} full"
