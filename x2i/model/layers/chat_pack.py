"""Packs of conversations alone: one after the other in one causal sequence of a language model.

Within a conversation everything is as in a batch of its own: it sees itself alone, and its positions begin at 0. How its
pictures become tokens is the model's: it makes the embeddings of a `row`, as of a batch of one.

Tensor names carry their axes: T tokens of the pack · K conversations · J learned tokens · D width · V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from x2i.base.errors import X2IError
from x2i.model.base import Inputs
from x2i.model.layers.attention import mask_of
from x2i.model.layers.learned import Learned
from x2i.model.layers.spans import Spans, positions, spans

R = TypeVar("R", bound=Inputs)


@dataclass(frozen=True)
class ChatPack(Generic[R]):
    """Conversations as one sequence.

    Attributes:
        row: a batch of one row of T tokens, padding among them.
        positions_T: from 0 in each conversation.
        spans: who sees whom.
        lengths: tokens of each conversation.
        learned: what they teach.
    """

    row: R
    positions_T: Tensor
    spans: Spans
    lengths: tuple[int, ...]
    learned: Learned

    @classmethod
    def of(cls, row: R, labels: Sequence[Sequence[int]], length: int) -> ChatPack[R]:
        """Of a row of all conversations and padding, `length` tokens, and the labels of each conversation."""
        lengths = tuple(len(given) for given in labels)
        firsts = [sum(lengths[:i]) for i in range(len(lengths))]
        return cls(
            row=row,
            positions_T=positions(lengths, length),
            spans=spans([[0] * count for count in lengths], length),
            lengths=lengths,
            learned=Learned.of(zip(firsts, labels, strict=True)),
        )

    @property
    def pairs(self) -> int:
        """Pairs (query, key) that the mask allows, padding left out."""
        return self.spans.pairs

    def to(self, device: torch.device | str) -> ChatPack[R]:
        """The same pack on another device."""
        return replace(
            self,
            row=self.row.to(device),
            positions_T=self.positions_T.to(device),
            spans=self.spans.to(device),
            learned=self.learned.to(device),
        )


def room(lengths: Sequence[int], length: int) -> int:
    """Tokens of padding behind conversations of these lengths. Raises X2IError if they do not fit into `length` tokens."""
    rest = length - sum(lengths)
    if rest < 0:
        raise X2IError(
            f"{len(lengths)} conversations of {length - rest} tokens do not fit into a pack of {length}: "
            "leave some out, or make packs longer"
        )
    return rest


def no_pictures(name: str, *given: Sequence[Any] | Tensor) -> None:
    """Raise X2IError if a model that only writes was given anything to draw."""
    if any(len(one) for one in given):
        raise X2IError(f"{name} draws no pictures: its packs hold conversations alone")


def next_token(
    trunk: Any, head: Callable[[Tensor], Tensor], embeds_1TD: Tensor, pack: ChatPack[Any], flex: bool | None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """What `Model.packed` returns, of a model that only writes.

    Args:
        trunk: a decoder of transformers with the attention `x2i.model.layers.attention.NAME`.
        head: of the vocabulary, [J, D] -> [J, V].
        embeds_1TD: of `pack.row`. They must depend on all that learns, whatever the pack lacks.
        flex: as `Model.flex`.
    """
    hidden_TD = trunk(
        inputs_embeds=embeds_1TD,
        attention_mask=mask_of(pack.spans, flex),
        position_ids=pack.positions_T[None],
        use_cache=False,
    ).last_hidden_state[0]
    return [], pack.learned.sums(hidden_TD, head), pack.learned.counts_K
