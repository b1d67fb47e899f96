"""Which draws of a step are which rank's: a pure function of the plan, so that nobody needs to ask.

All ranks get as many rows of each kind, because a model that is sharded over them makes them wait for each other in
every pass. Where a step's rows cannot be divided, some ranks compute a row that is another's: `owned` says whose it is.

Rows are divided in the order in which the samples lie in the corpora, and so neighbours, which come one after the other,
are mostly read by the same rank.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TypeVar

from x2i.trainer.plan import Draw

T = TypeVar("T")


@dataclass(frozen=True)
class Shares:
    """Divides steps among the ranks.

    Attributes:
        rank, size: of the world.
        chats: tasks whose samples are conversations.
    """

    rank: int
    size: int
    chats: Container[str]

    def take(self, draws: Sequence[Draw]) -> list[Draw]:
        """The rows of a step that this rank computes: pictures, then conversations, or its packs."""
        return [draw for draw, _ in self._rows(draws)]

    def owned(self, draws: Sequence[Draw]) -> set[int]:
        """The draws' numbers among them that count here; each draw of the step counts on one rank."""
        return {draw.index for draw, own in self._rows(draws) if own}

    def _rows(self, draws: Sequence[Draw]) -> list[tuple[Draw, bool]]:
        if draws and draws[0].pack is not None:
            packs: dict[int | None, list[Draw]] = {}
            for draw in draws:
                packs.setdefault(draw.pack, []).append(draw)
            return [(draw, own) for pack, own in self._divided(list(packs.values())) for draw in pack]
        there = sorted(draws, key=lambda draw: draw.sample)
        pictures = [d for d in there if d.task not in self.chats]
        chats = [d for d in there if d.task in self.chats]
        return [row for kind in (pictures, chats) for row in self._divided(kind)]

    def _divided(self, rows: Sequence[T]) -> list[tuple[T, bool]]:
        # rounded up: the first rank, whose row fills up the others, is never short of one itself (it would count twice)
        begin, end = (-(-len(rows) * rank // self.size) for rank in (self.rank, self.rank + 1))
        mine = [(row, True) for row in rows[begin:end]]
        if len(mine) < -(-len(rows) // self.size):
            mine.append((rows[0], False))
        return mine
