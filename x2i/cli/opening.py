"""A model for a command: a run's output, a checkpoint, a folder in the layout of others, or a hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from x2i.base.errors import X2IError

if TYPE_CHECKING:
    import torch

    from x2i.model.base import Processor
    from x2i.model.layouts import Drawing, Opened
    from x2i.model.sampling import Painter


@dataclass(frozen=True)
class Source:
    """A model that lies on this machine, not yet open. `foreign`: in the layout of its publishers, or of others."""

    folder: Path
    place: str
    architecture: str
    foreign: bool


@dataclass(frozen=True)
class Ready:
    """A model with its processor, in host memory."""

    opened: Opened[Any]
    processor: Processor[Any]
    source: Source

    @property
    def side(self) -> int | None:
        """Side in pixels to which pictures that are asked about are scaled down, as in training; None: not at all."""
        described = self.opened.described
        return None if self.source.foreign else described.chat_resolution or described.resolution

    @property
    def drawing(self) -> Drawing:
        """How to draw unless something else is asked for: as its publishers do; with ours without guidance."""
        from x2i.model import layouts

        module = layouts.of(self.source.architecture) if self.source.foreign else None
        return (module.DRAWING if module else None) or layouts.Drawing((1.0, 1.0), (1.0, 1.0))

    @property
    def painter(self) -> Painter:
        """To draw with. Raises X2IError for a model that only writes."""
        from x2i.model.sampling import Painter

        model, vae = self.opened.model, self.opened.vae
        if vae is None or not model.draws:
            raise X2IError(
                f"{self.source.place}: a model of {self.source.architecture} draws no pictures: ask it (`x2i ask`)"
            )
        return Painter(model, vae, self.processor)


def find(place: str) -> Source:
    """The model at a place, or of a hub id. Raises X2IError if there is none, or it cannot be had."""
    from x2i.base.weights import Weights
    from x2i.model import layouts
    from x2i.trainer import checkpoint

    folder = Weights(place).fetch()
    if layouts.is_checkpoint(folder) or checkpoint.all_of(folder):
        found = checkpoint.find(folder).path
        return Source(found, str(found), checkpoint.describe(found).architecture, foreign=False)
    architecture = layouts.published(folder)
    if architecture is None:
        raise layouts.unknown(folder)
    return Source(folder, place, architecture, foreign=True)


def load(source: Source, *, dtype: torch.dtype | None = None, with_vae: bool = True) -> Opened[Any]:
    """Open a model in host memory, its adapters folded in.

    Args:
        source: of `find`.
        dtype: of the weights of a foreign one; default: float32, as ours always.
        with_vae: whether a foreign one needs its autoencoder, where that lies elsewhere.

    Raises:
        X2IError: it is damaged, or its autoencoder cannot be had.
    """
    from x2i.model import layouts
    from x2i.trainer import checkpoint

    if source.foreign:
        module = layouts.of(source.architecture)
        assert module is not None
        return module.open_model(source.folder, dtype=dtype, with_vae=with_vae)
    loaded = checkpoint.load_model(source.folder)
    described = loaded.described.model_copy(update={"base": None})
    return layouts.Opened(loaded.model, loaded.processor.tokenizer, described, loaded.vae, layouts.X2I)


def ready(source: Source, device: str) -> Ready:
    """A model to be used, in host memory, to be moved to `device`: foreign ones in bfloat16, unless that is a CPU.

    Raises:
        X2IError: as `load`.
    """
    import torch

    from x2i.model import registry

    opened = load(source, dtype=torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    processor = registry.processor_class(source.architecture)
    made = processor(opened.model.config, opened.tokenizer, opened.vae, opened.described.max_text_tokens)
    return Ready(opened, made, source)
