"""OmniGen's published names, which are ours, and those of diffusers' class, both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from x2i.base.errors import X2IError
from x2i.model.omnigen.config import OmniGenConfig

#: Published prefix -> that of diffusers' OmniGenTransformer2DModel (its conversion script, and version 0.42). Of
#: prefixes that fit, the first counts.
_PREFIXES = {
    "pos_embed": "patch_embedding.pos_embed",
    "x_embedder.proj.": "patch_embedding.output_image_proj.",
    "input_x_embedder.proj.": "patch_embedding.input_image_proj.",
    "final_layer.adaLN_modulation.1.": "norm_out.linear.",
    "final_layer.linear.": "proj_out.",
    "time_token.mlp.0.": "time_token.linear_1.",
    "time_token.mlp.2.": "time_token.linear_2.",
    "t_embedder.mlp.0.": "t_embedder.linear_1.",
    "t_embedder.mlp.2.": "t_embedder.linear_2.",
    "llm.": "",
}
_OURS_QKV = re.compile(r"(layers\.\d+\.self_attn\.)qkv_proj\.weight")
_THEIRS_QKV = re.compile(r"(layers\.\d+\.self_attn\.)to_([qkv])\.weight")
_OURS_OUT, _THEIRS_OUT = "self_attn.o_proj.", "self_attn.to_out.0."
_TEXT_HEAD = "lm_head.weight"


def to_diffusers(state: Mapping[str, Tensor], config: OmniGenConfig) -> dict[str, Tensor]:
    """A published state by the names of diffusers' OmniGenTransformer2DModel, which has no text head: it is left out.

    Raises:
        X2IError: the trunk is not Phi-3, which is all that diffusers' class knows; or a name is not OmniGen's.
    """
    _check(config)
    heads, kv_heads, width = config.heads, config.kv_heads, config.hidden_size // config.heads
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == _TEXT_HEAD:
            continue
        renamed = _renamed(name, _PREFIXES)
        if found := _OURS_QKV.fullmatch(renamed):
            parts = tensor.split([heads * width, kv_heads * width, kv_heads * width])
            out |= {f"{found[1]}to_{k}.weight": part for k, part in zip("qkv", parts, strict=True)}
        else:
            out[renamed.replace(_OURS_OUT, _THEIRS_OUT)] = tensor
    return out


def from_diffusers(state: Mapping[str, Tensor], config: OmniGenConfig) -> dict[str, Tensor]:
    """A state of diffusers' OmniGenTransformer2DModel by the published names.

    Raises:
        X2IError: as `to_diffusers`, or a layer lacks its query, key or value.
    """
    _check(config)
    back = {theirs: ours for ours, theirs in _PREFIXES.items()}
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found = _THEIRS_QKV.fullmatch(name)
        if not found:
            out[_renamed(name.replace(_THEIRS_OUT, _OURS_OUT), back)] = tensor
        elif found[2] == "q":
            parts = [f"{found[1]}to_{k}.weight" for k in "qkv"]
            if absent := [p for p in parts if p not in state]:
                raise X2IError(f"not weights of diffusers' OmniGen: missing {absent[0]}")
            out[f"llm.{found[1]}qkv_proj.weight"] = torch.cat([state[p] for p in parts])
    return out


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    prefix = next((p for p in prefixes if name.startswith(p)), None)
    if prefix is None:
        raise X2IError(f"not a weight of OmniGen: {name}")
    return prefixes[prefix] + name.removeprefix(prefix)


def _check(config: OmniGenConfig) -> None:
    if config.trunk != "phi3":
        raise X2IError(
            f"diffusers' OmniGen has a phi3 trunk, this one {config.trunk}: it has no names for these weights"
        )
