"""What a step consists of, and what it did: told by each rank, and added up over all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from x2i.trainer.batch import Batch, ChatBatch, DrawBatch


@dataclass(frozen=True)
class RowReport:
    """What one sample lost; `t` is a picture's timestep, `tokens` are those of a conversation that were learned, `length` are
    all of the sample's, text and pictures.
    """

    draw: int
    key: str
    task: str
    sample: int
    replaced: str | None
    loss: float
    t: float | None = None
    tokens: int | None = None
    length: int | None = None


@dataclass(frozen=True)
class StepReport:
    """What one step did on all ranks: its samples, the gradient's norm before clipping, the learning rate.

    `rates` has those of the parts that have their own. Of packs: `left_out` has the keys of samples that did not fit,
    `fill` the share of the tokens that is no padding.
    """

    rows: tuple[RowReport, ...]
    grad_norm: float
    lr: float
    rates: dict[str, float] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    fill: float | None = None

    @property
    def loss(self) -> float:
        """Mean over the samples."""
        return float(np.mean([r.loss for r in self.rows]))

    def mean(self, key: Callable[[RowReport], str | None]) -> dict[str, float]:
        """Mean loss of the rows by what `key` says of them; those of which it says None are left out."""
        groups: dict[str, list[float]] = {}
        for row in self.rows:
            name = key(row)
            if name is not None:
                groups.setdefault(name, []).append(row.loss)
        return {name: float(np.mean(losses)) for name, losses in sorted(groups.items())}


@dataclass(frozen=True)
class Totals:
    """Of a step on all ranks: samples, conversations among them, and their tokens that are learned."""

    rows: float
    chats: float
    tokens: float

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> Totals:
        """Of one rank's batches; what does not count here is left out."""
        chats = [
            (b, own_rows(b)[-len(b.learned) :]) for b in batches if not isinstance(b, DrawBatch) and len(b.learned)
        ]
        tokens = sum(float((b.learned * own).sum()) for b, own in chats)
        return cls(sum(sum(b.own) for b in batches), sum(float(own.sum()) for _, own in chats), tokens)


def own_rows(batch: Batch) -> Tensor:
    """1 for rows that count here, 0 for others, [B]."""
    device = batch.learned.device if isinstance(batch, ChatBatch) else batch.t.device
    return torch.tensor(batch.own, dtype=torch.float32, device=device)
