"""Checkpoints: folders step-NNNNNN, whole or not there at all. Files are the same whatever the number of ranks that wrote
them, each its part (`x2i.trainer.onefile`); any other number can go on from them.

model.safetensors    the weights, in the published names
ema.safetensors      the averaged weights, if the run keeps them: what is drawn with
adapter/             with adapters instead of the two: their weights alone, as the library peft lays them out
ema_adapter/         the averaged ones, if the run keeps them
adapted.safetensors  within a stage that trains adapters: they, and the weights that they are merged into in the two
vae/                 the autoencoder, where `x2i convert` has put it beside the weights
config.json          the model's and the autoencoder's configuration, the resolution
tokenizer.json       the tokenizer
optimizer/           the optimiser's state (torch.distributed.checkpoint), within a stage
trainer.json         stage, step, what the stage began with, seed, digests of run and corpora, held-out losses
preview.png          pictures drawn from these weights
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from x2i.base.config import parse_config
from x2i.base.errors import X2IError
from x2i.base.files import remove
from x2i.model.config import AutoencoderKLConfig, ModelFile

if TYPE_CHECKING:
    import torch

    from x2i.model.base import Model, Processor
    from x2i.model.layouts import Opened
    from x2i.model.sampling import Painter
    from x2i.model.vae import VAE

MODEL, EMA, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer"
ADAPTER, EMA_ADAPTER, VAE_FOLDER = "adapter", "ema_adapter", "vae"
ADAPTED = "adapted.safetensors"
CONFIG, TRAINER, PREVIEW = "config.json", "trainer.json", "preview.png"
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. `step` counts over all stages."""

    path: Path
    step: int

    @property
    def info(self) -> dict[str, Any]:
        """The content of trainer.json. Raises X2IError if it cannot be read."""
        return _json(self.path / TRAINER)

    @property
    def preview(self) -> Path | None:
        """The preview picture, if one was drawn."""
        path = self.path / PREVIEW
        return path if path.is_file() else None


def folder(output: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return output / f"step-{step:06d}"


def all_of(output: Path) -> list[Checkpoint]:
    """The checkpoints of a run, oldest first."""
    if not output.is_dir():
        return []
    found = ((p, _NAME.fullmatch(p.name)) for p in output.iterdir() if p.is_dir())
    return sorted((Checkpoint(p, int(m[1])) for p, m in found if m), key=lambda c: c.step)


def find(path: Path) -> Checkpoint:
    """The checkpoint at `path`, or the newest one of the run at `path`.

    Raises:
        X2IError: there is none.
    """
    if (path / TRAINER).is_file():
        return Checkpoint(path, int(_json(path / TRAINER)["step"]))
    found = all_of(path)
    if not found:
        raise X2IError(f"{path}: neither a checkpoint (no {TRAINER}) nor a run with one (no step-NNNNNN folder)")
    return found[-1]


def fill(temporary: Path, files: Mapping[str, Any], target: Path) -> None:
    """Write a checkpoint's files into a folder beside it, flush them to disk, and rename the folder into place.

    Args:
        temporary: the folder; whatever lies there already becomes part of the checkpoint.
        files: by name; JSON values, bytes, or functions that write to the path that they are given.
        target: the folder step-NNNNNN.

    Raises:
        X2IError: the disk is full, or refuses.
        OSError: the same, where it is told so.
    """
    for name, content in files.items():
        path = temporary / name
        if callable(content):
            _filled(content, path, target)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for each in [path] if path.is_file() else sorted(path.iterdir()):
            with each.open("rb") as file:
                os.fsync(file.fileno())
    remove(target)  # one of the same step, left by a run that --fresh did away with
    os.replace(temporary, target)


def unwritten(path: Path, error: BaseException) -> X2IError:
    """What to say where a checkpoint could not be written."""
    return X2IError(
        f"{path}: cannot be written ({error}). Make room and run the same command again: it goes on from the checkpoint "
        "before"
    )


@contextlib.contextmanager
def resuming(place: Path) -> Iterator[None]:
    """Where a run goes on from its checkpoint at `place`: if that is damaged, the X2IError says what to do."""
    try:
        yield
    except X2IError as error:
        raise X2IError(f"{error}. Remove {place} to go on from the checkpoint before it, or use --fresh") from None


def _filled(content: Callable[[Path], None], path: Path, target: Path) -> None:
    from safetensors import SafetensorError

    try:
        content(path)
    except (SafetensorError, RuntimeError) as error:  # what safetensors and torch make of a full disk
        raise unwritten(target / path.name, error) from None


def prune(output: Path, keep: int, always: set[int], until: int) -> None:
    """Of the checkpoints up to step `until` remove all but the newest `keep` and those of the steps in `always`."""
    for checkpoint in [c for c in all_of(output) if c.step <= until][:-keep]:
        if checkpoint.step not in always:
            remove(checkpoint.path)


@dataclass(frozen=True)
class Loaded:
    """A model ready to use: with its processor, its autoencoder (None: it draws nothing), and its config.json."""

    model: Model[Any]
    processor: Processor[Any]
    vae: VAE | None
    described: ModelFile

    @property
    def painter(self) -> Painter:
        """To draw with. Raises X2IError for a model that only writes."""
        from x2i.model.sampling import Painter

        if self.vae is None or not self.model.draws:
            raise X2IError(f"a model of {self.described.architecture} draws no pictures: ask it (`x2i ask`)")
        return Painter(self.model, self.vae, self.processor)


def load_model(path: Path, device: torch.device | str = "cpu", adapters: bool = True) -> Loaded:
    """A checkpoint's model: its averaged weights where it has them.

    Args:
        path: a checkpoint, or a run's output: then its newest.
        device: where to put it.
        adapters: with adapters, fold them into the weights; without, leave them out.

    Raises:
        X2IError: there is no checkpoint at `path`, or it is damaged.
    """
    import torch

    from x2i.model import lora, registry, vae, weights
    from x2i.trainer import tokens

    place = find(path).path
    described = describe(place)
    config = registry.config_of(described.architecture, described.model, str(place / CONFIG))
    model = registry.build(config)
    if described.base is None:
        weights.load(model, weights_of(place))
    else:
        load_weights(model, fetched(described.base))
        if adapters:
            averaged = place / EMA_ADAPTER
            lora.load_adapter(model, averaged if averaged.is_dir() else place / ADAPTER)
            lora.merge(model)
    model.to(device).eval().requires_grad_(False)
    autoencoder = None if described.vae is None else vae.build(described.vae).to(torch.device(device))
    processor = registry.processor_class(described.architecture)
    return Loaded(
        model,
        processor(config, tokens.load(place), autoencoder, described.max_text_tokens),
        autoencoder,
        described,
    )


def load_painter(path: Path, device: torch.device | str = "cpu") -> tuple[Painter, ModelFile]:
    """A checkpoint's model, ready to draw, and the content of its config.json. Raises X2IError as `load_model`."""
    loaded = load_model(path, device)
    return loaded.painter, loaded.described


def describe(place: Path) -> ModelFile:
    """The content of a checkpoint's config.json; an autoencoder that lies within is named by where it lies now.

    Raises:
        X2IError: it cannot be read, or is of another kind.
    """
    found = parse_config(ModelFile, _json(place / CONFIG), str(place / CONFIG))
    if isinstance(found.vae, AutoencoderKLConfig) and (place / VAE_FOLDER).is_dir():
        return found.model_copy(
            update={"vae": AutoencoderKLConfig(kind="autoencoder_kl", weights=str(place / VAE_FOLDER))}
        )
    return found


def fetched(spec: str) -> Path:
    """Weights by name on this machine: of a run's output, its newest checkpoint. Raises X2IError."""
    from x2i.base.weights import Weights

    path = Weights(spec).fetch()
    newest = all_of(path)
    return newest[-1].path if newest else path


def load_weights(model: Model[Any], place: Path, opened: Opened[Any] | None = None) -> None:
    """Read all weights that a run starts from into a model.

    Args:
        model: of the same numbers; adapters that it has stay as they are.
        place: a checkpoint (its averaged weights where it has them), a file, or a folder in its publishers' layout.
        opened: that folder's model, if it is open already.

    Raises:
        X2IError: they are no weights of this model.
    """
    from x2i.model import lora, weights

    adapters = lora.adapter_state(model)
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name not in adapters}
    opened = opened or published(place)
    if opened is None:
        weights.load_state(wanted, weights_of(place))
        return
    state = opened.model.state_dict()
    if {n: tuple(t.shape) for n, t in wanted.items()} != {n: tuple(t.shape) for n, t in state.items()}:
        raise X2IError(f"{place}: its {type(opened.model).__name__} has other numbers than the run's model")
    for name, tensor in wanted.items():
        weights.assign(tensor, state[name])


def published(place: Path) -> Opened[Any] | None:
    """The model of a folder in its publishers' layout, its weights as they lie there; None if the folder is none."""
    from x2i.model import folders, layouts

    if not place.is_dir() or layouts.is_checkpoint(place):
        return None
    architecture = layouts.published(place)
    module = None if architecture is None else layouts.of(architecture)
    if module is None:
        return None
    with folders.as_read():
        return module.open_model(place)


def pinned(spec: str) -> str:
    """A name of weights that stays: of a run's output, its newest checkpoint, for the run may go on. Raises X2IError."""
    from x2i.base.weights import Weights

    newest = all_of(Weights(spec).fetch())
    return str(newest[-1].path) if newest else spec


def weights_of(place: Path) -> Path:
    """The file of weights to use: of a checkpoint its averaged ones, where it has them; else what was given.

    Raises:
        X2IError: the checkpoint has adapters alone.
    """
    if (place / ADAPTER).is_dir() and not (place / MODEL).is_file():
        raise X2IError(
            f"{place}: adapters alone, without the weights beside which they were trained: fold them in and write all "
            f"with `x2i convert {place} FOLDER --layout x2i`, and take FOLDER"
        )
    return place / EMA if (place / EMA).is_file() else place


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise X2IError(f"{path}: cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise X2IError(f"{path}: expected a JSON object")
    return value
