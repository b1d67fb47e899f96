"""The loss on samples that are never trained on, beside what the best constant answer would lose.

The ranks divide the work, and each gets the whole result.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from x2i.base.errors import X2IError
from x2i.base.seeds import generator
from x2i.trainer.batch import Batcher, ChatBatch
from x2i.trainer.data import Example
from x2i.trainer.learner import Learner
from x2i.trainer.stage import Stage
from x2i.trainer.world import World

log = logging.getLogger(__name__)

T = TypeVar("T")

#: The middles of the quarters of a logit-normal distribution of mean 0 and spread 1; one in each quarter of [0, 1].
_TIMES = tuple(float(t) for t in 1 / (1 + np.exp(-np.array([-1.1503, -0.3186, 0.3186, 1.1503]))))

_PICTURES, _CHATS = 32, 16  # rows at once


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss on held-out samples, and what the best constant answer would lose.

    Of pictures: squared error of the velocity, beside that of its mean; `by_time` has it by quarter of the timesteps. Of
    conversations: negative log-likelihood per token in nats, beside the entropy of the tokens' frequencies.
    """

    loss: float
    baseline: float
    samples: int
    by_time: dict[str, float] = field(default_factory=dict)


def timestep_bin(t: float) -> str:
    """The name of the quarter of [0, 1] in which a timestep lies."""
    quarter = min(int(t * 4), 3)
    return f"t_{quarter / 4:.2f}_{(quarter + 1) / 4:.2f}"


@torch.no_grad()
def held_out(
    learner: Learner, batcher: Batcher, examples: Mapping[str, Sequence[Example]], stage: Stage | None = None
) -> dict[str, HeldOutLoss]:
    """Loss by task: of pictures with fixed noise, at the middles of the quarters of the timesteps.

    All ranks call it together, with the same examples.
    """
    learner.model.eval()
    plain = stage is not None and stage.plain_captions
    out: dict[str, HeldOutLoss] = {}
    for task, some in examples.items():
        found = (
            _pictures(learner, batcher, some) if some[0].output is not None else _chats(learner, batcher, some, plain)
        )
        if found is not None:
            out[task] = found
    return out


def _pictures(learner: Learner, batcher: Batcher, some: Sequence[Example]) -> HeldOutLoss:
    count = len(_TIMES)
    repeated = [e for e in some for _ in _TIMES]
    places = list(range(len(repeated)))
    parts: list[tuple[list[float], Tensor]] = []
    for part in _mine([places[i : i + _PICTURES] for i in range(0, len(places), _PICTURES)], learner.world):
        rows = [repeated[i] for i in part]
        drawn = [generator("held-out/1", learner.run.seed, e.key, i % count) for i, e in zip(part, rows, strict=True)]
        batch = batcher.draw(rows, drawn, [_TIMES[i % count] for i in part])
        parts.append((learner.velocity_losses(batch).tolist(), (batch.data - batch.noise).float().cpu()))
    together = _together(parts, -(-len(places) // _PICTURES), learner.world)
    values = np.array([value for losses, _ in together for value in losses])
    velocity = torch.cat([v for _, v in together])
    spread = (velocity - velocity.mean(dim=(0, 2, 3), keepdim=True)).pow(2).mean()
    by_time = {timestep_bin(t): float(values[i::count].mean()) for i, t in enumerate(_TIMES)}
    return HeldOutLoss(float(values.mean()), float(spread), len(some), by_time)


def _chats(learner: Learner, batcher: Batcher, some: Sequence[Example], plain: bool) -> HeldOutLoss | None:
    """None if no token of the answers is left to be judged by."""
    batches: list[ChatBatch] = []
    for start in range(0, len(some), _CHATS):
        try:
            batches.append(batcher.chat(some[start : start + _CHATS], plain))
        except X2IError as error:  # the model can be shown none of them
            log.warning("left out: %s", error)
    parts = [learner.next_token_sums(batch.inputs) for batch in _mine(batches, learner.world)]
    together = _together(parts, len(batches), learner.world)
    tokens = sum(count for _, count in together)
    if not tokens:
        return None
    return HeldOutLoss(sum(total for total, _ in together) / tokens, batcher.token_entropy(some), len(some))


def _mine(parts: Sequence[T], world: World) -> list[T]:
    """This rank's parts; all ranks get as many, so that none waits for another."""
    mine = list(parts[world.rank :: world.size])
    return mine + [parts[0]] * (-(-len(parts) // world.size) - len(mine))


def _together(found: Sequence[Any], count: int, world: World) -> list[Any]:
    """What the ranks found for their parts, in the parts' order."""
    each = world.gather(list(found))
    return [each[i % world.size][i // world.size] for i in range(count)]
