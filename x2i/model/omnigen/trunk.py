"""OmniGen's trunk: any decoder of transformers, built from our numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from x2i.base.errors import X2IError
from x2i.model.layers import attention
from x2i.model.omnigen.config import OmniGenConfig

#: Rotary embeddings of transformers whose frequencies depend on the longest position of a call.
_BY_LENGTH = {"longrope", "dynamic"}


def build(config: OmniGenConfig) -> Any:
    """The decoder without a text head, with fresh weights. Raises X2IError if transformers does not know it."""
    return AutoModel.from_config(numbers(config), attn_implementation=attention.NAME)


def numbers(config: OmniGenConfig) -> PretrainedConfig:
    """Our numbers as transformers' configuration of the trunk; `trunk_options` have the last word."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    lengths: dict[str, Any] = {"max_position_embeddings": config.max_positions}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope |= {
            "rope_type": "longrope",
            "short_factor": list(scaling.short_factor),
            "long_factor": list(scaling.long_factor),
            "original_max_position_embeddings": scaling.original,
            "factor": config.max_positions / scaling.original,
        }
        lengths["original_max_position_embeddings"] = scaling.original
    given: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        **lengths,
    }
    try:
        return AutoConfig.for_model(config.trunk, **given | config.trunk_options)
    except ValueError as error:
        raise X2IError(f"trunk {config.trunk!r}: transformers builds no such decoder ({error})") from None


def depends_on_length(trunk: nn.Module) -> bool:
    """Whether the rotary frequencies depend on the longest position of a call (Phi-3's long-rope)."""
    return _rope(trunk).get("rope_type") in _BY_LENGTH


def switches_at(trunk: nn.Module, length: int) -> bool:
    """Whether a sequence of this length is the first whose rotary frequencies are not those of the shorter ones."""
    return depends_on_length(trunk) and length == _rope(trunk).get("original_max_position_embeddings", 0) + 1


@contextmanager
def frequencies_by_document(trunk: Any, lengths: Sequence[int], length: int) -> Iterator[None]:
    """Within the block each document of a pack has the rotary frequencies that it has alone.

    Long-rope takes the long factors for all tokens of a call if one position lies beyond the first pretraining's. In a
    pack that would change the short documents beside a long one, so both kinds are computed where a pack has both.
    ("dynamic" frequencies, which `trunk_options` may ask for, go by the longest document of a pack.)

    Args:
        trunk: the decoder.
        lengths: tokens of the documents, in order.
        length: tokens of the pack.
    """
    rope = _rope(trunk)
    limit = rope.get("original_max_position_embeddings", 0)
    beyond = [count > limit for count in lengths]
    if rope.get("rope_type") != "longrope" or all(beyond) or not any(beyond):
        yield
        return
    counts = [*lengths, length - sum(lengths)]
    long_T = torch.repeat_interleave(torch.tensor([*beyond, False]), torch.tensor(counts))
    rotary = trunk.rotary_emb
    whole = rotary.forward

    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        chosen_1T = long_T.to(position_ids.device)[None]
        long = whole(x, position_ids)
        short = whole(x, position_ids.masked_fill(chosen_1T, 0))
        return tuple(torch.where(chosen_1T[..., None], a, b) for a, b in zip(long, short, strict=True))

    rotary.forward = forward
    try:
        yield
    finally:
        del rotary.forward


def restore_frequencies(trunk: Any) -> None:
    """Compute the rotary frequencies anew, in float32 on the trunk's device.

    They are buffers: a cast of the model to bfloat16 would round them, and positions in the thousands would be off by
    whole turns; a model that was built on the meta device would have none.
    """
    old = getattr(trunk, "rotary_emb", None)
    if old is None:
        return
    device = next(old.buffers()).device
    with torch.device(device):
        trunk.rotary_emb = type(old)(config=trunk.config).to(device)


def _rope(trunk: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = getattr(trunk.config, "rope_parameters", None) or {}
    return found
