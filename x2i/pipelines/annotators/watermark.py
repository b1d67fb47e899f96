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

from x2i.base.errors import X2IError
from x2i.base.weights import Weights
from x2i.pipelines.annotators._heads import Published, weights_of
from x2i.pipelines.annotators._need import need
from x2i.pipelines.annotators._torch import SPEED, ModelConfig, Runtime, pixels
from x2i.pipelines.annotators.base import Annotator, Item

V1 = Published("github:LAION-AI/LAION-5B-WatermarkDetection:models/watermark_model_v1.pt", licence="MIT")

SIDE = 256

#: The package of the optimiser with which LAION trained; it is in their repository and nowhere else.
OPTIMISER = "scalable_shampoo."

#: ImageNet's channel means and standard deviations, RGB.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)


class WatermarkConfig(ModelConfig):
    """Where the model lies."""

    weights: str = Field(
        V1.spec,
        description="the checkpoint: /path/to/watermark_model_v1.pt, a hub's org/name:file, a .safetensors file with "
        "the same names, or github:OWNER/REPOSITORY:FILE",
    )


class Watermark(Annotator):
    """One column, `probability`: 0 (clear) to 1."""

    name = "watermark"
    Config = WatermarkConfig
    columns = pa.schema({"probability": pa.float32()})
    speed = SPEED
    gpus = 0.25

    @property
    def shorter_side(self) -> int:
        return SIDE

    def weights(self) -> list[Weights]:
        return [weights_of(self.config.weights, self.config.sha256, (V1,))]

    def setup(self) -> None:
        path = Path(self.weights()[0].fetch())
        self._runtime = Runtime(self.config)
        model = network()
        try:
            model.load_state_dict(read(path))
        except RuntimeError as error:
            raise X2IError(f"watermark: {path} is not the published checkpoint: {str(error)[:600]}") from None
        self._model = self._runtime.place(model)

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        import torch

        if not batch:
            return self.columns.empty_table()
        x_NCHW = torch.from_numpy(np.stack([prepare(p) for p in pixels(batch)])).to(self._runtime.device)
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


def prepare(pixels: np.ndarray) -> np.ndarray:
    """The published preparation: squashed to 256x256 by Pillow's bilinear filter, normalised as for ImageNet.

    Args:
        pixels: uint8 [height, width, 3] RGB. Returns float32 [3, 256, 256].
    """
    from PIL import Image

    small = np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    return np.ascontiguousarray(((small.astype(np.float32) / 255 - MEAN) / DEVIATION).transpose(2, 0, 1))


class _Blank:
    """What stands in for an optimiser's objects: takes anything, does nothing."""

    def __init__(self, *_: Any) -> None:
        pass


def read(path: Path) -> dict[str, Any]:
    """The checkpoint's state dict; of one that was saved with its optimiser's state, the weights.

    PyTorch is let read no code; classes of LAION's `scalable_shampoo`, whose state some copies hold, become blanks.

    Raises:
        X2IError: it cannot be read so.
    """
    try:
        loaded = _load(path)
    except Exception as error:  # noqa: BLE001 - readers of files raise anything, OSError to UnpicklingError
        raise X2IError(f"watermark: {path} cannot be read ({type(error).__name__}: {str(error)[:400]})") from None
    for key in ("weights", "state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    return {name.removeprefix("module."): value for name, value in loaded.items()}


def _load(path: Path) -> Any:
    import torch

    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if not zipfile.is_zipfile(path):
            raise
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        blanks: list[Any] = [(type("Blank", (_Blank,), {}), n) for n in wanted if n.startswith(OPTIMISER)]
        with torch.serialization.safe_globals(blanks):
            return torch.load(path, map_location="cpu", weights_only=True)
