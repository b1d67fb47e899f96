"""OmniGen in the folders of others: opened from them, and written so that they open it.

published    config.json (Phi-3), model.safetensors (or shards), the tokenizer's files, vae/: VectorSpaceLab's code
diffusers    model_index.json, transformer/, vae/, tokenizer/, scheduler/: diffusers' OmniGenPipeline
transformer  config.json, diffusion_pytorch_model.safetensors: diffusers' OmniGenTransformer2DModel alone
x2i          a checkpoint of this project: config.json (`ModelFile`), model.safetensors, tokenizer.json, vae/

The first three do not say all that this project knows of a model (its longest instruction, an autoencoder of another
kind): what is written here has it in a file x2i.json beside, which the others pass over.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from x2i.base.config import parse_config
from x2i.base.errors import X2IError
from x2i.base.weights import Weights
from x2i.model import lora, registry, vae, weights
from x2i.model.config import AutoencoderKLConfig, ModelFile
from x2i.model.omnigen import names, published
from x2i.model.omnigen.config import OmniGenConfig
from x2i.model.omnigen.model import OmniGen
from x2i.model.vae import VAE

log = logging.getLogger(__name__)

#: The autoencoder of published folders that have none of their own.
SDXL_VAE = "stabilityai/sdxl-vae"
CONFIG, TOKENIZER, EXTRA, INDEX = "config.json", "tokenizer.json", "x2i.json", "model_index.json"
DIFFUSERS = "diffusion_pytorch_model"  # the name of its files of weights


class Layout(StrEnum):
    """How a folder lays a model out."""

    PUBLISHED = "published"
    DIFFUSERS = "diffusers"
    TRANSFORMER = "transformer"
    X2I = "x2i"


@dataclass(frozen=True)
class Opened:
    """A model from disk, with what it needs; `vae` is None where it was not asked for."""

    model: OmniGen
    tokenizer: Tokenizer
    described: ModelFile
    vae: VAE | None
    layout: Layout


def layout_of(folder: Path) -> Layout | None:
    """How a folder is laid out; None if it is none of the layouts."""
    if (folder / INDEX).is_file():
        return Layout.DIFFUSERS
    if not (folder / CONFIG).is_file():
        return None
    numbers = _json(folder / CONFIG)
    if numbers.get("_class_name") == "OmniGenTransformer2DModel":
        return Layout.TRANSFORMER
    if "architecture" in numbers and "model" in numbers:
        return Layout.X2I
    return Layout.PUBLISHED if "model_type" in numbers else None


def describe(folder: Path, vae_weights: str | None = None) -> tuple[ModelFile, Layout]:
    """What a folder says of its model, without reading the weights.

    Args:
        folder: in any layout.
        vae_weights: an autoencoder in place of its own: a hub id or a folder.

    Raises:
        X2IError: it is no OmniGen in a known layout.
    """
    layout = layout_of(folder)
    if layout is None:
        raise X2IError(
            f"{folder}: no OmniGen. Expected {INDEX} (diffusers), or {CONFIG} with model.safetensors (published, x2i)"
        )
    if layout is Layout.X2I:
        described = parse_config(ModelFile, _json(folder / CONFIG), str(folder / CONFIG))
        if described.architecture != OmniGenConfig.architecture:
            raise X2IError(f"{folder}: a model {described.architecture!r}, not omnigen")
    elif (folder / EXTRA).is_file():
        described = parse_config(ModelFile, _json(folder / EXTRA), str(folder / EXTRA))
    else:
        numbers = _foreign_numbers(folder, layout)
        default = AutoencoderKLConfig(kind="autoencoder_kl", weights=SDXL_VAE)
        described = ModelFile(
            architecture=OmniGenConfig.architecture, model=numbers.model_dump(mode="json"), vae=default, resolution=1024
        )
    own = str(folder / "vae") if (folder / "vae" / CONFIG).is_file() else None
    if place := vae_weights or own:
        described = described.model_copy(update={"vae": AutoencoderKLConfig(kind="autoencoder_kl", weights=place)})
    return described, layout


def open_model(
    place: str | Path,
    *,
    vae_weights: str | None = None,
    dtype: torch.dtype | None = None,
    with_vae: bool = True,
) -> Opened:
    """Open a model in any of the layouts, in host memory; its averaged weights where a checkpoint has them.

    Args:
        place: a folder (of a run, its newest checkpoint), or a hub id (org/model[@revision]).
        vae_weights: an autoencoder in place of its own: a hub id or a folder.
        dtype: of the model's weights; default: float32.
        with_vae: whether to load the autoencoder.

    Raises:
        X2IError: it cannot be had, is no OmniGen in a known layout, or its weights do not fit its numbers.
    """
    folder = _newest(Weights(str(place)).fetch())
    described, layout = describe(folder, vae_weights)
    config = registry.config_of(described.architecture, described.model, str(folder / CONFIG))
    assert isinstance(config, OmniGenConfig)
    tokenizer = _tokenizer(folder)
    if layout is Layout.X2I and described.base is not None:
        base = open_model(described.base, dtype=dtype, with_vae=False)
        averaged = folder / "ema_adapter"
        lora.load_adapter(base.model, averaged if averaged.is_dir() else folder / "adapter")
        lora.merge(base.model)
        model, described = base.model, described.model_copy(update={"base": None})
    else:
        model = _empty(config, dtype or torch.float32)
        _load(model, folder, layout)
    model.eval().requires_grad_(False)
    encoder = vae.build(described.vae) if with_vae and described.vae is not None else None
    return Opened(model, tokenizer, described, encoder, layout)


def _newest(folder: Path) -> Path:
    """Of a run's output its newest checkpoint; any other folder is itself."""
    if layout_of(folder) is not None:
        return folder
    steps = [p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit() and (p / CONFIG).is_file()]
    return max(steps, key=lambda p: int(p.name.removeprefix("step-")), default=folder)


def _foreign_numbers(folder: Path, layout: Layout) -> OmniGenConfig:
    if layout is Layout.PUBLISHED:
        shapes = weights.shapes(folder)
        return published.from_phi3(_json(folder / CONFIG), shapes, str(folder / CONFIG))
    inner = folder / "transformer" if layout is Layout.DIFFUSERS else folder
    return published.from_transformer(_json(inner / CONFIG), str(inner / CONFIG))


def _empty(config: OmniGenConfig, dtype: torch.dtype) -> OmniGen:
    """A model in host memory whose weights are still to be read: nothing is drawn for them."""
    with torch.device("meta"):
        model = OmniGen(config)
    return model.to(dtype).to_empty(device="cpu")


def _load(model: OmniGen, folder: Path, layout: Layout) -> None:
    if layout is Layout.X2I:
        averaged = folder / "ema.safetensors"
        weights.load(model, averaged if averaged.is_file() else folder)
    elif layout is Layout.PUBLISHED:
        weights.load(model, folder)
    else:
        inner = folder / "transformer" if layout is Layout.DIFFUSERS else folder
        state = names.from_diffusers(
            {n: t for file in _shards(inner) for n, t in weights.tensors_of(file)}, model.config
        )
        _fill(model, state, inner)


@torch.no_grad()
def _fill(model: OmniGen, state: Mapping[str, Tensor], where: Path) -> None:
    wanted = model.state_dict()
    faults = [f"missing {n}" for n in sorted(wanted.keys() - state.keys())]
    faults += [f"unknown {n}" for n in sorted(state.keys() - wanted.keys())]
    both = sorted(wanted.keys() & state.keys())
    faults += [f"{n} is {list(state[n].shape)}" for n in both if state[n].shape != wanted[n].shape]
    if faults:
        raise X2IError(f"{where}: not weights of this model: {'; '.join(faults[:5])} ({len(faults)} in all)")
    for name, tensor in wanted.items():
        tensor.copy_(state[name])


def _shards(folder: Path) -> list[Path]:
    """diffusers' files of weights."""
    if (folder / f"{DIFFUSERS}.safetensors").is_file():
        return [folder / f"{DIFFUSERS}.safetensors"]
    index = _json(folder / f"{DIFFUSERS}.safetensors.index.json")
    return [folder / name for name in sorted(set(index.get("weight_map", {}).values()))]


def _tokenizer(folder: Path) -> Tokenizer:
    file = next((f for f in (folder / TOKENIZER, folder / "tokenizer" / TOKENIZER) if f.is_file()), None)
    if file is None:
        raise X2IError(f"{folder}: no {TOKENIZER}, here or in tokenizer/")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        raise X2IError(f"{file}: not a tokenizer of the tokenizers library ({error})") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise X2IError(f"{path}: cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise X2IError(f"{path}: expected a JSON object")
    return value
