"""Mini-Gemini in its published folder (YanweiLi/MGM-*): read and written.

config.json, safetensors by the published names, the tokenizer's files. The encoders lie within, or in their own
checkpoints, which config.json names. Written they lie within, and there is always an index: MGM's code reads that.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from x2i.base.errors import X2IError
from x2i.base.files import atomic
from x2i.base.weights import Weights
from x2i.model import folders, layouts, registry, weights
from x2i.model.config import ModelFile
from x2i.model.folders import CONFIG, peek, read_json, write_json
from x2i.model.layouts import EXTRA
from x2i.model.mini_gemini import published
from x2i.model.mini_gemini.config import HighConfig, LowConfig, MiniGeminiConfig
from x2i.model.mini_gemini.model import MiniGemini

log = logging.getLogger(__name__)

LAYOUTS = {"published": "dvlab-research's MGM"}
EXPECTED = f"{CONFIG} of an {' or an '.join(published.KINDS)}"
DRAWING = None
#: Names of folders in MGM's own tree -> where the same lie on the hub.
_HUB = {
    "clip-vit-large-patch14-336": "openai/clip-vit-large-patch14-336",
    "openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup": (
        "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup"
    ),
}
#: Key of config.json -> part of the model, and the name that tells whether it lies within.
_ENCODERS = {
    "mm_vision_tower": ("low_encoder", f"{published.LOW}embeddings.patch_embedding.weight"),
    "mm_vision_tower_aux": ("high_encoder", f"{published.HIGH}vision_stem.0.weight"),
}
_SPECIAL = (
    {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
    {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
)

Opened = layouts.Opened[MiniGemini]


def recognises(folder: Path) -> bool:
    """Whether a folder holds a published Mini-Gemini."""
    return str(folders.peek(folder / CONFIG).get("model_type")).startswith("mgm")


def open_model(place: str | Path, *, dtype: torch.dtype | None = None, with_vae: bool = True) -> Opened:
    """Open a published folder, or the hub's repository, in host memory.

    Args:
        place: a folder or a hub id.
        dtype: of the weights; default: float32.
        with_vae: changes nothing: there is no autoencoder.

    Raises:
        X2IError: it cannot be had, is no published Mini-Gemini, its weights do not fit its numbers or are pickles, or
            an encoder lies neither within nor where config.json says.
    """
    folder = Weights(str(place)).fetch()
    if not recognises(folder):
        raise X2IError(
            f"{folder}: no published Mini-Gemini: its {CONFIG} must say model_type {', '.join(published.KINDS)}"
        )
    numbers, where = read_json(folder / CONFIG), str(folder / CONFIG)
    state = folders.tensors(folder)
    clip: dict[str, Any] = {}
    for key, (part, mark) in _ENCODERS.items():
        tower = _tower(str(numbers[key]), folder) if numbers.get(key) else None
        if mark not in state:
            if tower is None:
                raise X2IError(f"{where}: its {part.replace('_', ' ')} is not within, and no {key} says where it is")
            state = {**_encoder(tower.fetch(), part, where), **state}
        if key == "mm_vision_tower" and tower is not None and (local := tower.local()) is not None:
            clip = peek(local / CONFIG)
            clip = clip.get("vision_config") or clip
    described = layouts.beside(folder)
    if described is None:
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        read = published.from_published(numbers, shapes, clip, where)
        described = ModelFile(architecture=MiniGeminiConfig.architecture, model=read.model_dump(mode="json"))
    config = registry.config_of(described.architecture, described.model, where)
    assert isinstance(config, MiniGeminiConfig)
    model = folders.hollow(config, dtype or torch.float32)
    folders.fill(model, state, folder)
    return Opened(model, folders.tokenizer_of(folder), described, None, "published")


def save(opened: Opened, folder: Path, layout: str) -> None:
    """Write the published folder, whole or not at all.

    Raises:
        X2IError: the folder exists, the model has adapters, or its language model is none of the published ones.
    """
    layouts.check_free(opened, folder)
    config = opened.model.config
    dtype = str(next(opened.model.parameters()).dtype).removeprefix("torch.")
    numbers = published.to_published(config, opened.model.model.config.to_dict(), dtype)
    usual = LowConfig(select_layer=config.low.select_layer), HighConfig(image_size=config.high.image_size)
    if (config.low, config.high) != usual:
        log.warning("MGM's code cannot open %s: its encoders are not the published ones", folder)
    known = opened.tokenizer
    special: Mapping[str, str] = next((s for s in _SPECIAL if known.token_to_id(s["eos_token"]) is not None), {})
    with atomic(folder) as temporary:
        temporary.mkdir()
        write_json(temporary / CONFIG, numbers)
        folders.save_shards(opened.model.state_dict(), temporary, index=True)
        folders.save_tokenizer(known, temporary, int(numbers["max_position_embeddings"]), special)
        write_json(temporary / EXTRA, opened.described.model_dump(mode="json"))


def _tower(spec: str, folder: Path) -> Weights:
    """An encoder's own checkpoint: a folder as config.json names it, here or from the model's; else the hub's."""
    for path in (Path(spec).expanduser(), folder / spec):
        if path.is_dir():
            return Weights(str(path))
    return Weights(_HUB.get(Path(spec).name, spec))


def _encoder(folder: Path, part: str, where: str) -> dict[str, Tensor]:
    """The tensors of an encoder's own checkpoint by our names."""
    folders.refuse_pickles(folder, "*pytorch_model")
    file = folder / "open_clip_model.safetensors"
    prefixes = MiniGemini.pretrained[part]
    found = {
        ours + name.removeprefix(theirs): tensor
        for name, tensor in weights.tensors_of(file if file.is_file() else folder)
        for ours, theirs in prefixes.items()
        if name.startswith(theirs) and not name.endswith("position_ids")
    }
    if not found:
        raise X2IError(
            f"{where}: its {part.replace('_', ' ')} is not within, and {folder} has no {next(iter(prefixes.values()))}*"
        )
    return found
