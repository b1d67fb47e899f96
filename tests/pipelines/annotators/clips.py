"""A tiny CLIP in open_clip's hub format, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

#: As in open_clip/model_configs, but small; a head's width of 32 gives two heads.
ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
PREPARATION = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def tiny(folder: Path, binary: bool = False, preparation: dict[str, Any] | None = None, **architecture: Any) -> Path:
    """Random weights in the published format: open_clip_config.json, and .safetensors or a .bin state dict."""
    import open_clip

    torch.manual_seed(0)
    made = {**ARCHITECTURE, **architecture}
    model = open_clip.model.CLIP(**made)
    for name, tensor in model.named_parameters():  # else all embeddings, and both activations, are nearly alike
        if tensor.ndim > 1:
            tensor.data.mul_(30 if "mlp.c_proj" in name else 3)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": made, "preprocess_cfg": {**PREPARATION, **(preparation or {})}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if binary:
        torch.save(state, folder / "open_clip_pytorch_model.bin")
    else:
        save_file(state, folder / "open_clip_model.safetensors")
    return folder
