"""The attention of our trunks: SDPA, or FlexAttention where the mask is a BlockMask.

transformers looks an attention up by its name; a trunk that is built with `NAME` takes either mask, whatever decoder
it is, and hands what is given to it through to `attend`. Other masks and calls are served as by transformers' "sdpa".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from x2i.base.errors import X2IError
from x2i.model.layers.spans import Spans

#: Name of this attention among those of transformers.
NAME = "x2i"


def mask_of(spans: Spans, flex: bool | None = None) -> Tensor | BlockMask:
    """The mask of a pack for all layers of a pass, on the device of the spans.

    Args:
        spans: who sees whom.
        flex: a BlockMask or, if not, a dense mask; default: a BlockMask on a GPU. On a CPU FlexAttention has no
            backward pass, as far as torch 2.15.
    """
    if spans.starts_T.device.type == "cuda" if flex is None else flex:
        return spans.block_mask()
    return spans.dense()


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: the layer's attention.
        query: [B, heads, T, head_dim].
        key, value: [B, key heads, S, head_dim]; there may be fewer key heads than heads.
        attention_mask: additive or bool [B, 1, T, S], a BlockMask, or None for causal.
        dropout: share of the weights that is dropped.
        scaling: of the scores; default: 1 / sqrt(head_dim).
        kwargs: whatever else transformers tells an attention.

    Returns:
        [B, T, heads, head_dim], and no weights.

    Raises:
        X2IError: dropout with a BlockMask: FlexAttention knows none.
    """
    if not isinstance(attention_mask, BlockMask):
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out
    if dropout:
        raise X2IError(
            "FlexAttention has no dropout: set the trunk's attention_dropout to 0, or the model's flex to False"
        )
    device = query.device.type
    # autocast leaves rotated queries and keys in float32, and casts the inputs of SDPA, but not of FlexAttention
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    # uncompiled, FlexAttention fills a T x T matrix; within a compiled block it is compiled with the block
    flex = flex_attention if device == "cpu" or torch.compiler.is_compiling() else _compiled()
    found = flex(
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        block_mask=attention_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return found.transpose(1, 2).contiguous(), None


@cache
def _compiled() -> Callable[..., Tensor]:
    # the second length of pack that comes makes one graph for all further ones
    compiled: Callable[..., Tensor] = torch.compile(flex_attention)
    return compiled


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
