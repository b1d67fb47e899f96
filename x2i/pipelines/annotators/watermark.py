"""`watermark`: the probability that a picture bears a watermark, by LAION's detector.

Model: LAION-AI/LAION-5B-WatermarkDetection (MIT), `models/watermark_model_v1.pt`: timm's EfficientNet-B3 ("b3a") with
a classifier 1536-625-256-2, on 256x256 pixels. The softmax's index 0 is the watermark; LAION-5B's column `pwatermark`
is this. Usual cuts are 0.5 and 0.8: it now and then takes lettering that belongs to a picture for a watermark.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from x2i.base.packages import need
from x2i.base.weights import Weights
from x2i.pipelines.annotators._pictures import bilinear, normalised, pixels
from x2i.pipelines.annotators._torch import SHARE, SPEED, ModelConfig, Runtime, checkpoint, filled, folder
from x2i.pipelines.annotators._weights import GitHub, weights_of
from x2i.pipelines.annotators.base import Annotator, Item

#: Its size is not known: a copy may hold the state of the optimiser, too.
V1 = GitHub("github:LAION-AI/LAION-5B-WatermarkDetection:models/watermark_model_v1.pt", licence="MIT")

SIDE = 256

#: The package of the optimiser with which LAION trained; it is in their repository and nowhere else.
OPTIMISER = "scalable_shampoo."


class WatermarkConfig(ModelConfig):
    """Where the model lies."""

    weights: str = Field(
        V1.spec,
        description="the checkpoint, e.g. /path/to/watermark_model_v1.pt, a hub's org/name:file, a .safetensors file with "
        "the same names, or github:OWNER/REPOSITORY:FILE",
    )


class Watermark(Annotator):
    """`probability` of a watermark: 0 (clear) to 1. Pictures are squashed to 256x256, as published."""

    name = "watermark"
    Config = WatermarkConfig
    columns = pa.schema({"probability": pa.float32()})
    speed = SPEED
    gpus = SHARE

    @property
    def shorter_side(self) -> int:
        return SIDE

    def weights(self) -> list[Weights]:
        return [weights_of(self.config.weights, self.config.sha256, (V1,))]

    def setup(self) -> None:
        path = folder(self.weights()[0])
        self._runtime = Runtime(self.config)
        self._model = self._runtime.place(filled(network(), read(path), path, "watermark"))

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        import torch

        if not batch:
            return self.columns.empty_table()
        inputs = [normalised(bilinear(p, SIDE, SIDE)) for p in pixels(batch)]
        x_NCHW = torch.from_numpy(np.stack(inputs)).to(self._runtime.device)
        with self._runtime.running():
            logits_NK = self._model(x_NCHW)
        probability = torch.softmax(logits_NK.float(), dim=1)[:, 0]
        return pa.table({"probability": pa.array(self._runtime.numpy(probability), pa.float32())})


def network() -> Any:
    """The detector without weights: a torch module, [n, 3, 256, 256] to [n, 2]."""
    from torch import nn

    model = need("timm", "timm", "watermark").create_model("efficientnet_b3", pretrained=False, num_classes=2)
    model.classifier = nn.Sequential(
        nn.Linear(1536, 625), nn.ReLU(), nn.Dropout(0.3), nn.Linear(625, 256), nn.ReLU(), nn.Linear(256, 2)
    )
    return model


def read(path: str | Path) -> dict[str, Any]:
    """The checkpoint's state dict; of one that was saved with its optimiser's state, the weights.

    PyTorch is let read no code; classes of LAION's `scalable_shampoo`, whose state some copies hold, become blanks.

    Raises:
        X2IError: it cannot be read so.
    """
    return checkpoint(path, "watermark", _without_optimiser)


class _Blank:
    """What stands in for an optimiser's objects: takes anything, does nothing."""

    def __init__(self, *_: Any) -> None:
        pass


def _without_optimiser(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if not zipfile.is_zipfile(path):
            raise
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        blanks: list[Any] = [(type("Blank", (_Blank,), {}), n) for n in wanted if n.startswith(OPTIMISER)]
        with torch.serialization.safe_globals(blanks):
            return torch.load(path, map_location="cpu", weights_only=True)
