"""Ovis2's packs: conversations one after the other in one causal sequence, with the visual tokens of all their tiles.

Within a conversation everything is as in a batch of its own: it sees itself alone, and its positions begin at 0.

Tensor names carry their axes: T tokens of the pack · K conversations · D width of the language model
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from x2i.base.errors import X2IError
from x2i.model.layers.attention import mask_of
from x2i.model.layers.learned import Learned
from x2i.model.layers.spans import Spans, positions, spans

if TYPE_CHECKING:
    from x2i.model.ovis2.model import Ovis2, Ovis2Batch


@dataclass(frozen=True)
class Ovis2Pack:
    """Conversations as one sequence.

    Attributes:
        row: a batch of one row of T tokens, padding among them.
        positions_T: from 0 in each conversation.
        spans: who sees whom.
        lengths: tokens of each conversation.
        learned: what they teach.
    """

    row: Ovis2Batch
    positions_T: Tensor
    spans: Spans
    lengths: tuple[int, ...]
    learned: Learned

    @classmethod
    def of(cls, row: Ovis2Batch, labels: Sequence[Sequence[int]]) -> Ovis2Pack:
        """Of a row of all conversations and of padding, and the labels of each."""
        lengths = tuple(len(given) for given in labels)
        length = row.ids_BL.shape[1]
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

    def to(self, device: torch.device | str) -> Ovis2Pack:
        """The same pack on another device."""
        return replace(
            self,
            row=self.row.to(device),
            positions_T=self.positions_T.to(device),
            spans=self.spans.to(device),
            learned=self.learned.to(device),
        )


def packed(model: Ovis2, inputs: Ovis2Pack, x: Sequence[Tensor], t_G: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """See `Model.packed`. One call of the visual tokenizer takes the tiles of all images; without any, a grey one."""
    if len(x) or len(t_G):
        raise X2IError("Ovis2 draws no pictures: its packs hold conversations alone")
    hidden_TD = model.llm.model(
        inputs_embeds=model.embed(inputs.row, dummy=True),
        attention_mask=mask_of(inputs.spans, model.flex),
        position_ids=inputs.positions_T[None],
        use_cache=False,
    ).last_hidden_state[0]
    return [], inputs.learned.sums(hidden_TD, model.llm.lm_head), inputs.learned.counts_K
