"""The map between the published names of Ovis2's weights, which are ours, and those of transformers' class, both ways.

The same weights do not give the same outputs there: transformers takes the encoder's features after its last norm, the
published code (and ours) before it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from x2i.base.errors import X2IError

#: Published prefix -> prefix in transformers' Ovis2ForConditionalGeneration (5.17 to 5.23). The first that fits counts.
_PREFIXES = {
    "llm.lm_head.": "lm_head.",
    "llm.model.": "model.language_model.",
    "visual_tokenizer.backbone.preprocessor.patchifier.proj.": "model.vision_tower.transformer.embeddings.patch_embedding.",
    "visual_tokenizer.backbone.preprocessor.patchifier.norm.": "model.vision_tower.transformer.embeddings.rms_norm.",
    "visual_tokenizer.backbone.trunk.post_trunk_norm.": "model.vision_tower.transformer.rms_norm.",
    "visual_tokenizer.head.0.": "model.vision_tower.head_linear.",
    "visual_tokenizer.head.1.": "model.vision_tower.head_norm.",
    "vte.": "model.visual_embeddings_table.",
}
_BLOCK = re.compile(r"visual_tokenizer\.backbone\.trunk\.blocks\.(\d+)\.(.+)")
_LAYER = re.compile(r"model\.vision_tower\.transformer\.encoder\.layers\.(\d+)\.(.+)")
#: Inside a block. The fused `attn.qkv` is cut in three.
_INNER = {
    "attn.proj.": "attention.out_proj.",
    "mlp.fc1.": "ffn.gate_proj.",
    "mlp.fc2.": "ffn.down_proj.",
    "mlp.fc3.": "ffn.up_proj.",
    "norm_1.": "rms_norm1.",
    "norm_2.": "rms_norm2.",
}
_POSITIONS = "visual_tokenizer.backbone.preprocessor.pos_embed"
_THEIR_POSITIONS = "model.vision_tower.transformer.embeddings.position_embedding.weight"


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state for transformers' Ovis2ForConditionalGeneration. Raises X2IError for an unknown name."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == _POSITIONS:
            out[_THEIR_POSITIONS] = tensor[0]
        elif found := _BLOCK.fullmatch(name):
            layer = f"model.vision_tower.transformer.encoder.layers.{found[1]}."
            if found[2].startswith("attn.qkv."):
                kind = found[2].removeprefix("attn.qkv.")
                for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                    out[f"{layer}attention.{letter}_proj.{kind}"] = piece
            else:
                out[layer + _renamed(found[2], _INNER)] = tensor
        else:
            out[_renamed(name, _PREFIXES)] = tensor
    return out


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state of transformers' Ovis2ForConditionalGeneration for ours. Raises X2IError for an unknown name."""
    prefixes = {theirs: ours for ours, theirs in _PREFIXES.items()}
    inner = {theirs: ours for ours, theirs in _INNER.items()}
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == _THEIR_POSITIONS:
            out[_POSITIONS] = tensor[None]
        elif found := _LAYER.fullmatch(name):
            block = f"visual_tokenizer.backbone.trunk.blocks.{found[1]}."
            if fused := re.fullmatch(r"attention\.([qkv])_proj\.(.+)", found[2]):
                if fused[1] == "q":
                    pieces = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                    out[f"{block}attn.qkv.{fused[2]}"] = torch.cat(pieces)
            else:
                out[block + _renamed(found[2], inner)] = tensor
        else:
            out[_renamed(name, prefixes)] = tensor
    return out


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise X2IError(f"no name for the tensor {name!r}: not a state of an Ovis2")
