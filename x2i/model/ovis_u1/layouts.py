"""Ovis-U1 in its published folder (AIDC-AI/Ovis-U1-3B): read and written.

config.json, model.safetensors (or shards) with the autoencoder within (visual_generator.vae.*), the tokenizer as
tokenizer.json or in Qwen's files, preprocessor_config.json.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import diffusers
import torch

from x2i.base.errors import X2IError
from x2i.base.files import atomic
from x2i.base.weights import Weights
from x2i.model import folders, layouts, registry, vae
from x2i.model.config import AutoencoderKLConfig, ModelFile
from x2i.model.folders import CONFIG, Held, read_json, write_json
from x2i.model.layouts import EXTRA, Drawing
from x2i.model.ovis_u1 import names, published
from x2i.model.ovis_u1.config import OvisU1Config
from x2i.model.ovis_u1.model import OvisU1
from x2i.model.ovis_u1.processor import OvisU1Processor
from x2i.model.vae import AutoencoderKL

log = logging.getLogger(__name__)

LAYOUTS = {"published": "AIDC-AI's Ovis-U1"}
EXPECTED = f"{CONFIG} of an ovis_u1"
DRAWING = Drawing(
    words=(OvisU1Processor.guidance_text, 1.0),
    edit=OvisU1Processor.guidance_edit,
    edit_size=lambda processor, height, width: processor.edit_size(height, width),
)
_SPECIAL = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}

Opened = layouts.Opened[OvisU1]


def recognises(folder: Path) -> bool:
    """Whether a folder holds a published Ovis-U1."""
    return folders.peek(folder / CONFIG).get("model_type") == "ovis_u1"


def open_model(place: str | Path, *, dtype: torch.dtype | None = None, with_vae: bool = True) -> Opened:
    """Open a published folder, or the hub's repository, in host memory.

    Args:
        place: a folder or a hub id.
        dtype: of the model's weights; default: float32. The autoencoder's stay float32.
        with_vae: changes nothing for an autoencoder that lies within.

    Raises:
        X2IError: it cannot be had, is no published Ovis-U1, or its weights do not fit its numbers.
    """
    folder = Weights(str(place)).fetch()
    if not recognises(folder):
        raise X2IError(f"{folder}: no published Ovis-U1: its {CONFIG} must say model_type ovis_u1")
    numbers = read_json(folder / CONFIG)
    described = layouts.beside(folder) or _described(numbers, folder)
    config = registry.config_of(described.architecture, described.model, str(folder / CONFIG))
    assert isinstance(config, OvisU1Config)
    state, of_vae = names.split_vae(folders.tensors(folder))
    model = folders.hollow(config, dtype or torch.float32)
    folders.fill(model, state, folder)
    autoencoder: vae.VAE | None = None
    if isinstance(described.vae, AutoencoderKLConfig):
        described = layouts.with_vae(described, str(folder))
        network: Any = diffusers.AutoencoderKL.from_config(numbers["visual_generator_config"]["vae_config"])
        folders.fill(network, of_vae, folder)
        autoencoder = Held(network)
    elif with_vae and described.vae is not None:
        autoencoder = vae.build(described.vae)
    return Opened(model, folders.tokenizer_of(folder), described, autoencoder, "published")


def save(opened: Opened, folder: Path, layout: str) -> None:
    """Write the published folder, whole or not at all.

    Raises:
        X2IError: the folder exists, or the model has adapters or an autoencoder that is not open.
    """
    layouts.check_free(opened, folder)
    config, state, vae_config = opened.model.config, dict(opened.model.state_dict()), None
    state[names.HEAD] = state[names.EMBEDDING]
    if isinstance(opened.vae, AutoencoderKL):
        network = opened.vae.module
        state = names.with_vae(state, network.state_dict())
        vae_config = {k: v for k, v in network.config.items() if k != "_name_or_path"}
    elif isinstance(opened.described.vae, AutoencoderKLConfig):
        raise X2IError(
            f"{folder}: the published layout holds the autoencoder, which is not open: open the model with it"
        )
    other = published.unusual(config) + ([] if vae_config else ["its autoencoder is no AutoencoderKL"])
    if other:
        log.warning("AIDC-AI's code cannot open %s, whose numbers are not its: %s", folder, "; ".join(other))
    dtype = str(next(opened.model.parameters()).dtype).removeprefix("torch.")
    with atomic(folder) as temporary:
        temporary.mkdir()
        write_json(temporary / CONFIG, published.to_published(config, vae_config, dtype))
        write_json(temporary / "preprocessor_config.json", published.preprocessor(config))
        folders.save_shards(state, temporary)
        folders.save_tokenizer(opened.tokenizer, temporary, config.llm.max_positions, _SPECIAL)
        write_json(temporary / EXTRA, opened.described.model_dump(mode="json"))


def _described(numbers: dict[str, Any], folder: Path) -> ModelFile:
    config = published.from_published(numbers, str(folder / CONFIG))
    return ModelFile(
        architecture=OvisU1Config.architecture,
        model=config.model_dump(mode="json"),
        vae=AutoencoderKLConfig(kind="autoencoder_kl", weights=str(folder)),
        resolution=1024,
    )
