"""Models in the folders of others: what every architecture's `layouts.py` offers, and what these share.

    LAYOUTS      name -> who opens it; `x2i` (a checkpoint of this project) is known for every architecture
    EXPECTED     by what a folder of its publishers is known, for messages
    DRAWING      how its publishers draw with it; None for models that draw nothing
    recognises   (folder) -> whether it is one of these layouts
    open_model   (place, *, dtype, with_vae) -> `Opened`
    save         (opened, folder, layout) -> None

Such folders do not say all that this project knows of a model (its longest instruction, numbers that their code has as
constants): what is written here has it in a file x2i.json beside, which the others pass over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from tokenizers import Tokenizer

from x2i.base.config import parse_config
from x2i.base.errors import X2IError
from x2i.base.files import atomic
from x2i.model import lora, registry, weights
from x2i.model.base import Model
from x2i.model.config import AutoencoderKLConfig, ModelFile
from x2i.model.folders import CONFIG, TOKENIZER, Held, copy_vae, peek, read_json, write_json
from x2i.model.vae import VAE

X2I = "x2i"
EXTRA = "x2i.json"

M = TypeVar("M", bound=Model[Any])


@dataclass(frozen=True)
class Opened(Generic[M]):
    """A model from disk, with what it needs; `vae` is None where it has none, or it was not asked for."""

    model: M
    tokenizer: Tokenizer
    described: ModelFile
    vae: VAE | None
    layout: str


@dataclass(frozen=True)
class Drawing:
    """How a model's publishers draw with it.

    Attributes:
        words: weights of the text and of the input images where there are none of these.
        edit: the same with input images.
        negative: instruction of the unconditional branch; None: the processor's own.
        max_input: input images keep their aspect and are scaled down to this side; None: they are cropped to the
            picture's size.
        edit_size: (processor, height, width of the input) -> height and width of its edited picture; None: the
            input's own.
    """

    words: tuple[float, float]
    edit: tuple[float, float]
    negative: str | None = None
    max_input: int | None = None
    edit_size: Callable[[Any, int, int], tuple[int, int]] | None = None


class Layouts(Protocol):
    """An architecture's `layouts.py`; see the top of this file."""

    LAYOUTS: Mapping[str, str]
    EXPECTED: str
    DRAWING: Drawing | None

    def recognises(self, folder: Path) -> bool: ...

    def open_model(
        self, place: str | Path, *, dtype: torch.dtype | None = None, with_vae: bool = True
    ) -> Opened[Any]: ...

    def save(self, opened: Opened[Any], folder: Path, layout: str) -> None: ...


def of(architecture: str) -> Layouts | None:
    """An architecture's layouts; None if it has none."""
    found: Layouts | None = registry.module(architecture, "layouts")
    return found


def published(folder: Path) -> str | None:
    """The architecture whose publishers' layout a folder has; None if it is none."""
    for architecture in registry.architectures():
        if (found := of(architecture)) is not None and found.recognises(folder):
            return architecture
    return None


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a model in our own layout."""
    return {"architecture", "model"} <= peek(folder / CONFIG).keys()


def unknown(place: str | Path) -> X2IError:
    """The error for a folder that holds no model: what was looked for, and what its config.json says."""
    each = ((name, of(name)) for name in registry.architectures())
    sought = "; ".join(f"{name}: {module.EXPECTED}" for name, module in each if module is not None)
    numbers = peek(Path(place) / CONFIG)
    said = numbers.get("model_type") or numbers.get("_class_name")
    has = f" Its {CONFIG} says {said!r}." if said else ""
    return X2IError(
        f"{place}: neither a checkpoint (config.json with an `architecture`, trainer.json) nor a run with one "
        f"(step-NNNNNN), nor a model in its publishers' layout ({sought}).{has}"
    )


def save(opened: Opened[Any], folder: Path, layout: str) -> None:
    """Write a model in a layout, x2i or one of its architecture's; the folder is there whole or not at all.

    Raises:
        X2IError: the folder exists, the architecture has no such layout, or the layout cannot hold this model.
    """
    check(opened.described.architecture, layout)
    if layout == X2I:
        check_free(opened, folder)
        save_checkpoint(opened, folder)
    elif (module := of(opened.described.architecture)) is not None:
        module.save(opened, folder, layout)


def check(architecture: str, layout: str) -> None:
    """Raise X2IError that names the layouts of an architecture if this is none of them."""
    module = of(architecture)
    known = [*(module.LAYOUTS if module else ()), X2I]
    if layout not in known:
        raise X2IError(f"layout {layout!r}: a model of {architecture} can be written as {', '.join(known)}")


def check_free(opened: Opened[Any], folder: Path) -> None:
    """Raise X2IError if a model cannot be written: the folder exists, or it has adapters beside its weights."""
    if folder.exists():
        raise X2IError(f"{folder}: exists already; remove it, or name another folder")
    if lora.adapters(opened.model):
        raise X2IError("the model has adapters: merge them into its weights, or take them away, before it is written")


def save_checkpoint(opened: Opened[Any], folder: Path) -> None:
    """Write a checkpoint of this project: to use, and to train on. An autoencoder with weights lies within."""
    described = opened.described
    with atomic(folder) as temporary:
        temporary.mkdir()
        if save_vae(opened, temporary / "vae"):
            described = with_vae(described, str(folder.absolute() / "vae"))
        write_json(temporary / CONFIG, described.model_dump(mode="json"))
        write_json(temporary / "trainer.json", {"step": 0})
        weights.save(opened.model.state_dict(), temporary / weights.FILE)
        opened.tokenizer.save(str(temporary / TOKENIZER))


def save_vae(opened: Opened[Any], folder: Path) -> bool:
    """Write an autoencoder as diffusers does, if the model has one with weights that lie in a folder or in memory.

    One that is named by a hub id, and not open, stays named so.
    """
    if isinstance(opened.vae, Held):
        opened.vae.module.save_pretrained(folder)
        return True
    described = opened.described.vae
    if not isinstance(described, AutoencoderKLConfig) or not Path(described.weights).expanduser().is_dir():
        return False
    copy_vae(described, folder)
    return True


def with_vae(described: ModelFile, place: str) -> ModelFile:
    """A description whose autoencoder lies at `place`."""
    return described.model_copy(update={"vae": AutoencoderKLConfig(kind="autoencoder_kl", weights=place)})


def beside(folder: Path) -> ModelFile | None:
    """What x2i.json says of a model in another's layout; None if it is not there. Raises X2IError."""
    path = folder / EXTRA
    return parse_config(ModelFile, read_json(path), str(path)) if path.is_file() else None
