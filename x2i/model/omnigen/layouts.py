"""OmniGen in the folders of others: opened from them, and written so that they open it.

published    config.json (Phi-3), model.safetensors (or shards), the tokenizer's files, vae/: VectorSpaceLab's code
diffusers    model_index.json, transformer/, vae/, tokenizer/, scheduler/: diffusers' OmniGenPipeline
transformer  config.json, diffusion_pytorch_model.safetensors: diffusers' OmniGenTransformer2DModel alone
x2i          a checkpoint of this project: config.json (`ModelFile`), model.safetensors, tokenizer.json, vae/

The first three do not say all that this project knows of a model (its longest instruction, an autoencoder of another
kind): what is written here has it in a file x2i.json beside, which the others pass over.
"""

from __future__ import annotations

import logging
from enum import StrEnum
from pathlib import Path

import torch

from x2i.base.config import parse_config
from x2i.base.errors import X2IError
from x2i.base.weights import Weights
from x2i.model import folders, layouts, lora, registry, vae, weights
from x2i.model.config import AutoencoderKLConfig, ModelFile
from x2i.model.folders import CONFIG, read_json
from x2i.model.layouts import EXTRA, Drawing
from x2i.model.omnigen import names, published
from x2i.model.omnigen.config import OmniGenConfig
from x2i.model.omnigen.model import OmniGen
from x2i.model.omnigen.processor import OmniGenProcessor

log = logging.getLogger(__name__)

#: The autoencoder of published folders that have none of their own.
SDXL_VAE = "stabilityai/sdxl-vae"
INDEX = "model_index.json"
DIFFUSERS = "diffusion_pytorch_model"  # the name of its files of weights
LAYOUTS = {
    "published": "VectorSpaceLab's OmniGen",
    "diffusers": "diffusers' OmniGenPipeline",
    "transformer": "diffusers' OmniGenTransformer2DModel alone",
}
EXPECTED = f"{CONFIG} of a phi3 with x_embedder.* in model.safetensors, or {INDEX} or {CONFIG} of diffusers' classes"
DRAWING = Drawing(words=(2.5, 1.6), edit=(2.5, 1.6), negative=OmniGenProcessor.NEGATIVE, max_input=1024)

Opened = layouts.Opened[OmniGen]


class Layout(StrEnum):
    """How a folder lays a model out."""

    PUBLISHED = "published"
    DIFFUSERS = "diffusers"
    TRANSFORMER = "transformer"
    X2I = "x2i"


def recognises(folder: Path) -> bool:
    """Whether a folder holds an OmniGen in one of `LAYOUTS`, or what should be one."""
    layout = layout_of(folder)
    if layout is Layout.PUBLISHED:
        return read_json(folder / CONFIG).get("model_type") == "phi3"
    if layout is Layout.DIFFUSERS:
        return read_json(folder / INDEX).get("_class_name") == "OmniGenPipeline"
    return layout is Layout.TRANSFORMER


def save(opened: Opened, folder: Path, layout: str) -> None:
    """As `writing.save`."""
    from x2i.model.omnigen import writing  # which builds on this module

    writing.save(opened, folder, Layout(layout))


def layout_of(folder: Path) -> Layout | None:
    """How a folder is laid out; None if it is none of the layouts."""
    if (folder / INDEX).is_file():
        return Layout.DIFFUSERS
    if not (folder / CONFIG).is_file():
        return None
    numbers = read_json(folder / CONFIG)
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
        described = parse_config(ModelFile, read_json(folder / CONFIG), str(folder / CONFIG))
        if described.architecture != OmniGenConfig.architecture:
            raise X2IError(f"{folder}: a model {described.architecture!r}, not omnigen")
    elif (folder / EXTRA).is_file():
        described = parse_config(ModelFile, read_json(folder / EXTRA), str(folder / EXTRA))
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
    tokenizer = folders.tokenizer_of(folder)
    if layout is Layout.X2I and described.base is not None:
        base = open_model(described.base, dtype=dtype, with_vae=False)
        averaged = folder / "ema_adapter"
        lora.load_adapter(base.model, averaged if averaged.is_dir() else folder / "adapter")
        lora.merge(base.model)
        model, described = base.model, described.model_copy(update={"base": None})
    else:
        model = folders.hollow(config, dtype or torch.float32)
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
        return published.from_phi3(read_json(folder / CONFIG), shapes, str(folder / CONFIG))
    inner = folder / "transformer" if layout is Layout.DIFFUSERS else folder
    return published.from_transformer(read_json(inner / CONFIG), str(inner / CONFIG))


def _load(model: OmniGen, folder: Path, layout: Layout) -> None:
    if layout is Layout.X2I:
        averaged = folder / "ema.safetensors"
        weights.load(model, averaged if averaged.is_file() else folder)
    elif layout is Layout.PUBLISHED:
        folders.fill(model, dict(weights.tensors_of(folder)), folder)
    else:
        inner = folder / "transformer" if layout is Layout.DIFFUSERS else folder
        state = names.from_diffusers(
            {n: t for file in _shards(inner) for n, t in weights.tensors_of(file)}, model.config
        )
        folders.fill(model, state, inner)


def _shards(folder: Path) -> list[Path]:
    """diffusers' files of weights."""
    if (folder / f"{DIFFUSERS}.safetensors").is_file():
        return [folder / f"{DIFFUSERS}.safetensors"]
    index = read_json(folder / f"{DIFFUSERS}.safetensors.index.json")
    return [folder / name for name in sorted(set(index.get("weight_map", {}).values()))]
