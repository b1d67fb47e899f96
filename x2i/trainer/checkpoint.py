"""Checkpoints: folders step-NNNNNN, whole or not there at all.

model.safetensors    the weights, in the published names
ema.safetensors      the averaged weights, if the run keeps them: what is drawn with
config.json          the model's and the autoencoder's configuration, the resolution
tokenizer.json       the tokenizer
optimizer.pt         the optimiser's state
trainer.json         stage, step, seed, digests of run and corpora, held-out losses
preview.png          pictures drawn from these weights
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from x2i.base.config import parse_config
from x2i.base.errors import X2IError
from x2i.base.files import atomic, remove
from x2i.model.config import ModelFile

if TYPE_CHECKING:
    import torch

    from x2i.model.sampling import Painter

MODEL, EMA, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.pt"
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


def write(target: Path, files: dict[str, Any]) -> Checkpoint:
    """Write a checkpoint aside, flush it to disk, and rename it into place.

    Args:
        target: the folder step-NNNNNN.
        files: by name; JSON values, bytes, or functions that write to the path that they are given.
    """
    with atomic(target) as temporary:
        temporary.mkdir()
        for name, content in files.items():
            path = temporary / name
            if callable(content):
                content(path)
            elif isinstance(content, bytes):
                path.write_bytes(content)
            else:
                path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            with path.open("rb") as file:
                os.fsync(file.fileno())
        remove(target)  # one of the same step, left by a run that --fresh did away with
    return Checkpoint(target, int(files[TRAINER]["step"]))


def prune(output: Path, keep: int, always: set[int]) -> None:
    """Remove all but the newest `keep` checkpoints and those of the steps in `always`."""
    for checkpoint in all_of(output)[:-keep]:
        if checkpoint.step not in always:
            remove(checkpoint.path)


def load_painter(path: Path, device: torch.device | str = "cpu") -> tuple[Painter, ModelFile]:
    """A checkpoint's model, ready to draw: its averaged weights where it has them.

    Returns:
        The painter, and the content of config.json.

    Raises:
        X2IError: there is no checkpoint at `path`, or it is damaged.
    """
    import torch

    from x2i.model import vae, weights
    from x2i.model.omnigen import OmniGen
    from x2i.model.prompt import PromptEncoder
    from x2i.model.sampling import Painter
    from x2i.trainer import tokens

    found = find(path)
    described = parse_config(ModelFile, _json(found.path / CONFIG), str(found.path / CONFIG))
    model = OmniGen(described.model)
    averaged = found.path / EMA
    weights.load(model, averaged if averaged.is_file() else found.path / MODEL)
    model.to(device).eval().requires_grad_(False)
    encoder = PromptEncoder(tokens.load(found.path), described.max_text_tokens)
    return Painter(model, vae.build(described.vae).to(torch.device(device)), encoder), described


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise X2IError(f"{path}: cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise X2IError(f"{path}: expected a JSON object")
    return value
