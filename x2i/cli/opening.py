"""A model for a command: a run's output, a checkpoint, a folder in the layout of others, or a hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from x2i.base.errors import X2IError

if TYPE_CHECKING:
    from x2i.model.config import ModelFile
    from x2i.model.omnigen.layouts import Opened
    from x2i.model.ovis_u1.layouts import Opened as OpenedOvis
    from x2i.model.sampling import Painter


@dataclass(frozen=True)
class Ready:
    """A model ready to draw. `foreign`: published by others, and to be drawn with as they do."""

    painter: Painter
    described: ModelFile
    place: str
    foreign: bool

    def guidance(self, images: bool) -> tuple[float, float]:
        """Weights of the text and of the images unless others are asked for: the published ones, of ours none."""
        if not self.foreign:
            return 1.0, 1.0
        if self.described.architecture == "omnigen":
            return 2.5, 1.6
        from x2i.model.ovis_u1.processor import OvisU1Processor

        return OvisU1Processor.guidance_edit if images else (OvisU1Processor.guidance_text, 1.0)

    @property
    def negative(self) -> str | None:
        """What stands in the unconditional branch unless something else is asked for; None: the processor's own."""
        from x2i.model.omnigen.processor import OmniGenProcessor

        return OmniGenProcessor.NEGATIVE if self.foreign and self.described.architecture == "omnigen" else None


def is_ours(place: str) -> bool:
    """Whether a run's output or a checkpoint of this project is meant; also where a folder is nothing at all."""
    from x2i.model.omnigen.layouts import Layout, layout_of

    folder = Path(place).expanduser()
    return folder.is_dir() and layout_of(folder) in (None, Layout.X2I)


def painter(place: str, device: str) -> Ready:
    """A model to draw with, in host memory, to be moved to `device`: published ones in bfloat16, unless that is a CPU.

    Raises:
        X2IError: it cannot be had, or draws nothing.
    """
    import torch

    from x2i.base.weights import Weights
    from x2i.model import registry
    from x2i.model.omnigen import layouts as omnigen_layouts
    from x2i.model.ovis_u1 import layouts as ovis_layouts
    from x2i.model.sampling import Painter
    from x2i.trainer import checkpoint

    if is_ours(place):
        found = checkpoint.find(Path(place).expanduser())
        loaded, described = checkpoint.load_painter(found.path)
        return Ready(loaded, described, str(found.path), foreign=False)
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    folder = Weights(place).fetch()
    opened: Opened | OpenedOvis
    if ovis_layouts.is_published(folder):
        opened = ovis_layouts.open_model(folder, dtype=dtype)
    else:
        opened = omnigen_layouts.open_model(folder, dtype=dtype)
    autoencoder, described = opened.vae, opened.described
    if autoencoder is None:
        raise X2IError(f"{place}: a model without an autoencoder draws no pictures")
    processor = registry.processor_class(described.architecture)
    made = processor(opened.model.config, opened.tokenizer, autoencoder, described.max_text_tokens)
    return Ready(Painter(opened.model, autoencoder, made), described, place, foreign=True)


def omnigen(place: str) -> Opened:
    """An OmniGen with its description, adapters folded in, without its autoencoder's weights. Raises X2IError."""
    from x2i.model.omnigen import layouts
    from x2i.model.omnigen.config import OmniGenConfig
    from x2i.model.omnigen.layouts import Layout, Opened
    from x2i.model.omnigen.model import OmniGen
    from x2i.trainer import checkpoint

    if not is_ours(place):
        return layouts.open_model(place, with_vae=False)
    found = checkpoint.find(Path(place).expanduser())
    if (architecture := checkpoint.describe(found.path).architecture) != OmniGenConfig.architecture:
        raise X2IError(f"{found.path}: a model {architecture!r}; there are layouts of omnigen alone")
    loaded = checkpoint.load_model(found.path)
    assert isinstance(loaded.model, OmniGen)
    described = loaded.described.model_copy(update={"base": None})
    return Opened(loaded.model, loaded.processor.tokenizer, described, None, Layout.X2I)


def ovis_u1(place: str) -> OpenedOvis | None:
    """A published Ovis-U1, if that is what lies there. Raises X2IError if nothing does, or it is damaged."""
    from x2i.base.weights import Weights
    from x2i.model.ovis_u1 import layouts

    if is_ours(place):
        return None
    folder = Weights(place).fetch()
    return layouts.open_model(folder) if layouts.is_published(folder) else None
