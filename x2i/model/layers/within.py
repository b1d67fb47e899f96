"""Attention of sequences that lie one after the other without padding, each within itself.

Where every token sees all of its own sequence no mask is needed: the fast kernels of SDPA run on each sequence, on any
device, and pairs of different sequences are never computed.

Tensor names carry their axes: N tokens of all sequences · H heads · E width of a head
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(q_NHE: Tensor, k_NHE: Tensor, v_NHE: Tensor, lengths: Sequence[int]) -> Tensor:
    """Attention of each of the sequences of so many tokens within itself, [N, H, E].

    Neighbouring sequences of one length go together as a batch.
    """
    runs = _runs(lengths)
    # split, not sliced: the gradients of all parts are then put together by one copy
    parts = [x.split([count * length for count, length in runs]) for x in (q_NHE, k_NHE, v_NHE)]
    outputs = []
    for (count, length), *some in zip(runs, *parts, strict=True):
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in some)
        outputs.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if runs and runs[-1][1] == length:
            runs[-1] = (runs[-1][0] + 1, length)
        else:
            runs.append((1, length))
    return runs
