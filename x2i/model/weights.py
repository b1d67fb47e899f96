"""Weights of OmniGen in and out: safetensors in the published names, and the map to diffusers' class."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from x2i.base.errors import X2IError

#: Published prefix -> diffusers' OmniGenTransformer2DModel (its conversion script, and version 0.42).
_PREFIXES = {
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
_QKV = re.compile(r"(layers\.\d+\.self_attn\.)qkv_proj\.weight")


def save(state: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by their published names. Not atomic: wrap the path."""
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}, path)


def load(model: nn.Module, path: Path) -> None:
    """Read published names into a model; `path` is the file, or a folder with model.safetensors.

    Raises:
        X2IError: not a safetensors file, or tensors are missing, unknown or of another shape (the first few named).
    """
    file = path / "model.safetensors" if path.is_dir() else path
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise X2IError(f"{file}: cannot be read as safetensors ({error})") from None
    wanted = model.state_dict()
    faults = [f"missing {n}" for n in sorted(wanted.keys() - found.keys())]
    faults += [f"unknown {n}" for n in sorted(found.keys() - wanted.keys())]
    faults += [
        f"{n} is {list(found[n].shape)}, expected {list(wanted[n].shape)}"
        for n in sorted(wanted.keys() & found.keys())
        if found[n].shape != wanted[n].shape
    ]
    if faults:
        raise X2IError(f"{file}: not weights of this model: {'; '.join(faults[:5])} ({len(faults)} in all)")
    model.load_state_dict(found)


def to_diffusers(state: Mapping[str, Tensor], query_width: int, key_width: int) -> dict[str, Tensor]:
    """Rename a published state for diffusers' OmniGenTransformer2DModel.

    Args:
        state: tensors by published names.
        query_width: heads * head_dim; `key_width`: kv_heads * head_dim. They cut the fused qkv projection.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "pos_embed":
            out["patch_embedding.pos_embed"] = tensor
            continue
        prefix = next(p for p in _PREFIXES if name.startswith(p))
        renamed = _PREFIXES[prefix] + name.removeprefix(prefix)
        if found := _QKV.fullmatch(renamed):
            parts = tensor.split([query_width, key_width, key_width])
            out |= {f"{found[1]}to_{k}.weight": part for k, part in zip("qkv", parts, strict=True)}
        else:
            out[renamed.replace("self_attn.o_proj", "self_attn.to_out.0")] = tensor
    return out
