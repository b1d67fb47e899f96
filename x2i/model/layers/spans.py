"""Who looks at whom in a pack: many documents one after the other in one sequence.

A token may look at another of the same document that stands before it, at itself, and at all of its own block (a
condition image, the noisy patches of a picture): same document & (causal | same block). Documents and blocks are
unbroken runs, so the keys of a token are one span, and the whole mask is two numbers a token:

    keys of token q: starts_T[q] <= k < ends_T[q]

From these follow the dense mask of SDPA, FlexAttention's BlockMask (one for all heads, made on the device in time
linear in the tokens: no T x T mask is evaluated) and the number of pairs that attention computes.

Tensor names carry their axes: T tokens of a pack (padding too) · Q, K blocks of queries and of keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

#: Tokens a side of one block of a BlockMask: what FlexAttention's kernels take by default.
TILE = 128


@dataclass(frozen=True)
class Spans:
    """The mask of a pack.

    Attributes:
        starts_T, ends_T: int32; token q sees the keys from `starts_T[q]` up to, and not with, `ends_T[q]`.
        pairs: how many pairs (query, key) of the documents are allowed. Padding, which sees itself alone, is not
            counted.
    """

    starts_T: Tensor
    ends_T: Tensor
    pairs: int

    def to(self, device: torch.device | str) -> Spans:
        """The same on another device."""
        return Spans(self.starts_T.to(device), self.ends_T.to(device), self.pairs)

    def dense(self) -> Tensor:
        """Bool [1, 1, T, T], True where the row may look at the column: what SDPA takes."""
        keys_T = torch.arange(len(self.starts_T), device=self.starts_T.device)
        return ((self.starts_T[:, None] <= keys_T) & (keys_T < self.ends_T[:, None]))[None, None]

    def block_mask(self) -> BlockMask:
        """The same mask for FlexAttention, one for all rows and heads, equal to what `create_block_mask` makes of it.

        Every span holds its own token, so the spans of neighbouring queries join to one. A block of keys has an allowed
        pair with a block of queries if it meets this joint span, and allowed pairs alone if it lies within every single
        one: no pair has to be looked at.
        """
        starts_T, ends_T = self.starts_T, self.ends_T
        length = len(starts_T)
        count = -(-length // TILE)
        rest = count * TILE - length
        # behind the last token: an empty span, so that an unfinished block is never taken for a full one
        starts_QT = torch.cat([starts_T, starts_T.new_full((rest,), length)]).view(count, TILE)
        ends_QT = torch.cat([ends_T, ends_T.new_zeros(rest)]).view(count, TILE)
        first_K = torch.arange(count, dtype=torch.int32, device=starts_T.device) * TILE
        some_QK = (starts_QT.amin(1)[:, None] < first_K + TILE) & (ends_QT.amax(1)[:, None] > first_K)
        full_QK = (starts_QT.amax(1)[:, None] <= first_K) & (ends_QT.amin(1)[:, None] >= first_K + TILE)

        def seen(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return (starts_T[q_idx] <= kv_idx) & (kv_idx < ends_T[q_idx])

        return BlockMask.from_kv_blocks(
            *_ordered(some_QK & ~full_QK),
            *_ordered(full_QK),
            BLOCK_SIZE=(TILE, TILE),
            mask_mod=seen,
            seq_lengths=(length, length),
        )


def spans(documents: Sequence[Sequence[int]], length: int) -> Spans:
    """The mask of documents one after the other, then padding up to `length` tokens; on the CPU.

    Args:
        documents: of each its tokens' blocks: 0 on text, another number on a token of a block. A run of one number is
            a block; blocks that touch must have different numbers.
        length: tokens of the pack, at least as many as the documents have.
    """
    blocks_T = torch.tensor([block for document in documents for block in document], dtype=torch.int64)
    sizes = torch.tensor([len(document) for document in documents], dtype=torch.int64)
    used, place_T = len(blocks_T), torch.arange(len(blocks_T))
    first_of_each = sizes.cumsum(0) - sizes
    starts_T = torch.repeat_interleave(first_of_each, sizes)
    edge_T = torch.ones(used + 1, dtype=torch.bool)  # before which token a run ends
    edge_T[1:used] = (blocks_T[1:] != blocks_T[:-1]) | (starts_T[1:] != starts_T[:-1])
    edges = edge_T.nonzero()[:, 0]
    ends_T = place_T + 1
    if used:
        run_ends_T = torch.repeat_interleave(edges[1:], edges.diff())
        ends_T = torch.where(blocks_T > 0, run_ends_T, ends_T)
    padding = torch.arange(used, length)
    return Spans(
        torch.cat([starts_T, padding]).to(torch.int32),
        torch.cat([ends_T, padding + 1]).to(torch.int32),
        int((ends_T - starts_T).sum()),
    )


def positions(sizes: Sequence[int], length: int) -> Tensor:
    """Positions [length] for the rotary embedding: from 0 in each document; 0 on padding."""
    position_T = torch.zeros(length, dtype=torch.int64)
    edges = [0, *torch.tensor(list(sizes), dtype=torch.int64).cumsum(0).tolist()]
    for first, last in pairwise(edges):
        position_T[first:last] = torch.arange(last - first)
    return position_T


def _ordered(chosen_QK: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, [1, 1, Q], and which, first of all those, [1, 1, Q, K]."""
    order_QK = chosen_QK.int().argsort(dim=1, descending=True, stable=True)
    return chosen_QK.sum(dim=1).int()[None, None], order_QK.int().contiguous()[None, None]
