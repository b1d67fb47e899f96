"""Ovis-U1 in its published folder (AIDC-AI/Ovis-U1-3B): read, and written as a checkpoint of this project.

The published file of weights holds the autoencoder too, and its config.json that one's numbers. The tokenizer lies
there as Qwen's vocab.json and merges.txt, or as tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from x2i.base.errors import X2IError
from x2i.base.files import atomic
from x2i.base.weights import Weights
from x2i.model import weights
from x2i.model.config import AutoencoderKLConfig, ModelFile
from x2i.model.ovis_u1 import names
from x2i.model.ovis_u1.config import OvisU1Config
from x2i.model.ovis_u1.model import OvisU1
from x2i.model.vae import AutoencoderKL

CONFIG, TOKENIZER = "config.json", "tokenizer.json"


@dataclass(frozen=True)
class Opened:
    """A published model with what it needs. `vae.weights` of `described` is the folder, which has it within."""

    model: OvisU1
    tokenizer: Tokenizer
    described: ModelFile
    vae: Held


class Held(AutoencoderKL):
    """An autoencoder that is in memory already."""

    def __init__(self, module: Any) -> None:
        self._vae = module.eval().requires_grad_(False)
        self.channels = int(module.config.latent_channels)
        self.shrink = 2 ** (len(module.config.block_out_channels) - 1)
        self._scale = float(module.config.scaling_factor)
        self._shift = float(module.config.shift_factor or 0.0)

    def save(self, folder: Path) -> None:
        """Write it as diffusers does."""
        self._vae.save_pretrained(folder)


def is_published(folder: Path) -> bool:
    """Whether a folder holds a published Ovis-U1."""
    return (folder / CONFIG).is_file() and _json(folder / CONFIG).get("model_type") == "ovis_u1"


def numbers(published: Mapping[str, Any], where: str) -> OvisU1Config:
    """Our numbers of a published config.json. Raises X2IError if one is missing, or what they say is not known here."""
    try:
        llm, seen, drawn = (published[f"{part}_config"] for part in ("llm", "visual_tokenizer", "visual_generator"))
        encoder = seen["backbone_config"]
        found = {
            "llm": {
                "hidden_size": llm["hidden_size"],
                "layers": llm["num_hidden_layers"],
                "heads": llm["num_attention_heads"],
                "kv_heads": llm["num_key_value_heads"],
                "head_dim": llm["head_dim"],
                "intermediate_size": llm["intermediate_size"],
                "vocab_size": llm["vocab_size"],
                "norm_eps": llm["rms_norm_eps"],
                "rope_theta": llm["rope_theta"],
                "max_positions": llm["max_position_embeddings"],
            },
            "tokenizer": {
                "encoder": {
                    "hidden_size": encoder["hidden_size"],
                    "layers": encoder["num_hidden_layers"],
                    "heads": encoder["num_attention_heads"],
                    "intermediate_size": encoder["intermediate_size"],
                    "patch_size": encoder["patch_size"],
                    "image_size": encoder["image_size"],
                    "norm_eps": encoder["rms_norm_eps"],
                    "rope": not encoder["disable_rope"],
                    "hidden_stride": encoder["hidden_stride"],
                    "qkv_bias": encoder["qkv_bias"],
                    "use_bias": encoder["use_bias"],
                },
                "vocab_size": seen["vocab_size"],
                "tokenize": seen["tokenize_function"],
                "tau": seen["tau"],
            },
            "decoder": {
                "in_channels": drawn["in_channels"],
                "out_channels": drawn["out_channels"],
                "vec_in_dim": drawn["vec_in_dim"],
                "context_in_dim": drawn["context_in_dim"],
                "hidden_size": drawn["hidden_size"],
                "mlp_ratio": drawn["mlp_ratio"],
                "heads": drawn["num_heads"],
                "depth": drawn["depth"],
                "depth_single": drawn["depth_single_blocks"],
                "axes_dim": drawn["axes_dim"],
                "theta": drawn["theta"],
                "qkv_bias": drawn["qkv_bias"],
                "base_shift": drawn["base_shift"],
                "max_shift": drawn["max_shift"],
            },
            "min_pixels": seen["min_pixels"],
            "max_pixels": seen["max_pixels"],
            "max_tokens": published["multimodal_max_length"],
        }
        return OvisU1Config.model_validate(found)
    except KeyError as error:
        raise X2IError(f"{where}: no published Ovis-U1: {error} is not there") from None
    except ValueError as error:
        raise X2IError(f"{where}: {error}") from None


def open_model(place: str | Path, dtype: torch.dtype | None = None) -> Opened:
    """Open a published folder, or the hub's repository, in host memory.

    Args:
        place: a folder or a hub id.
        dtype: of the model's weights; default: float32. The autoencoder's stay float32.

    Raises:
        X2IError: it cannot be had, is no published Ovis-U1, or its weights do not fit its numbers.
    """
    import diffusers

    folder = Weights(str(place)).fetch()
    if not is_published(folder):
        raise X2IError(f"{folder}: no published Ovis-U1: its {CONFIG} must say model_type ovis_u1")
    published = _json(folder / CONFIG)
    config = numbers(published, str(folder / CONFIG))
    state, of_vae = names.split_vae(weights.read(folder))
    model = _fresh(config, dtype or torch.float32)
    _fill(model, state, folder)
    autoencoder = diffusers.AutoencoderKL.from_config(published["visual_generator_config"]["vae_config"])
    _fill(autoencoder, of_vae, folder)
    described = ModelFile(
        architecture=OvisU1Config.architecture,
        model=config.model_dump(mode="json"),
        vae=AutoencoderKLConfig(kind="autoencoder_kl", weights=str(folder)),
        resolution=1024,
    )
    return Opened(model.eval().requires_grad_(False), tokenizer_of(folder), described, Held(autoencoder))


def save_checkpoint(opened: Opened, folder: Path) -> None:
    """Write a checkpoint of this project, whole or not at all. Raises X2IError if the folder exists."""
    if folder.exists():
        raise X2IError(f"{folder}: exists already; remove it, or name another folder")
    place = AutoencoderKLConfig(kind="autoencoder_kl", weights=str(folder.absolute() / "vae"))
    described = opened.described.model_copy(update={"vae": place})
    with atomic(folder) as temporary:
        temporary.mkdir()
        (temporary / CONFIG).write_text(
            json.dumps(described.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8"
        )
        (temporary / "trainer.json").write_text('{"step": 0}\n', encoding="utf-8")
        weights.save(opened.model.state_dict(), temporary / weights.FILE)
        opened.tokenizer.save(str(temporary / TOKENIZER))
        opened.vae.save(temporary / "vae")


def tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer of a published folder. Raises X2IError if it has none."""
    try:
        if (folder / TOKENIZER).is_file():
            return Tokenizer.from_file(str(folder / TOKENIZER))
        from transformers import AutoTokenizer

        found: Tokenizer = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    except Exception as error:  # noqa: BLE001 - the libraries raise nothing narrower
        raise X2IError(f"{folder}: no tokenizer that can be read ({error})") from None
    return found


def _fresh(config: OvisU1Config, dtype: torch.dtype) -> OvisU1:
    """A network in `dtype` whose rotary frequencies are float32: a cast would round them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return OvisU1(config)
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def _fill(module: Any, state: Mapping[str, Tensor], where: Path) -> None:
    wanted = module.state_dict()
    faults = [f"missing {n}" for n in sorted(wanted.keys() - state.keys())]
    faults += [f"unknown {n}" for n in sorted(state.keys() - wanted.keys())]
    both = sorted(wanted.keys() & state.keys())
    faults += [f"{n} is {list(state[n].shape)}" for n in both if state[n].shape != wanted[n].shape]
    if faults:
        raise X2IError(f"{where}: not weights of these numbers: {'; '.join(faults[:5])} ({len(faults)} in all)")
    for name, tensor in wanted.items():
        tensor.copy_(state[name])


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise X2IError(f"{path}: cannot be read ({error})") from None
    return value if isinstance(value, dict) else {}
