"""`edges`: a soft edge map, by HED or PiDiNet.

| model | paper | weights | licence |
|---|---|---|---|
| hed | Xie and Tu 2015, arXiv 1504.06375 | `ControlNetHED.pth` of lllyasviel/Annotators, 29 MB | Apache-2.0 |
| pidinet | Su et al. 2021, arXiv 2108.07009 | `table5_pidinet.pth` of the same, 2.9 MB | research only |

HED is what MultiGen-20M and ControlNet draw from, and takes RGB of 0 to 255. PiDiNet takes RGB less ImageNet's
mean, over its deviation, as its authors have it (controlnet_aux gives it BGR of 0 to 1).
PiDiNet's difference convolutions run as the plain ones that equal them (`x2i.pipelines.networks.pidinet.plain`).
`benchmarks/edges.py` gives the F-measure against human contours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from x2i.base.errors import X2IError
from x2i.base.weights import Weights
from x2i.pipelines.annotators._maps import at_least, by_shape, map_size, shrunk
from x2i.pipelines.annotators._torch import SPEED, ModelConfig, Runtime, folder, pixels
from x2i.pipelines.annotators.base import Annotator, Item
from x2i.pipelines.images import encode

HED = "lllyasviel/Annotators:ControlNetHED.pth"
PIDINET = "lllyasviel/Annotators:table5_pidinet.pth"
KNOWN = {
    HED: Weights(HED, size=29_400_000, licence="Apache-2.0"),
    PIDINET: Weights(
        PIDINET,
        "80860ac267258b5f27486e0ef152a211d0b08120f62aeb185a050acc30da486c",
        size=2_871_148,
        licence="research only (hellozhuo/pidinet)",
    ),
}
DEFAULT = {"hed": HED, "pidinet": PIDINET}

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB 0 to 1


class EdgesConfig(ModelConfig):
    """Which network, and at what size."""

    model: Literal["hed", "pidinet"] = Field("hed", description="the network, e.g. pidinet")
    weights: str = Field(
        HED,
        description="its weights: a hub's org/name:file, or a local .pth with the published names; the default goes "
        "with `model`",
    )
    side: int = Field(512, gt=15, le=2048, description="the map's shorter side in pixels at most, e.g. 512")

    @model_validator(mode="before")
    @classmethod
    def _weights(cls, data: Any) -> Any:
        if isinstance(data, dict) and "weights" not in data and data.get("model", "hed") in DEFAULT:
            return {**data, "weights": DEFAULT[data.get("model", "hed")]}
        return data


class Edges(Annotator):
    """An edge map: 8-bit grey PNG, 255 where the network is sure of an edge; not thinned.

    Its shorter side is `side` or the picture's own, whichever is less; it has no more than 4 x side x side pixels.
    """

    name = "edges"
    Config = EdgesConfig
    speed = SPEED
    heavy = frozenset({"map"})
    columns = pa.schema({"map": pa.binary(), "density": pa.float32()})  # mean of the map, 0 to 1

    @property
    def shorter_side(self) -> int:
        return self.config.side

    def weights(self) -> list[Weights]:
        known = KNOWN.get(self.config.weights, Weights(self.config.weights))
        return [Weights(known.spec, self.config.sha256 or known.sha256, known.size, known.licence)]

    def setup(self) -> None:
        import torch

        from x2i.pipelines.networks import hed, pidinet

        self._runtime = Runtime(self.config)
        path = folder(self.weights()[0])
        network: Any
        if self.config.model == "hed":
            network, self._least = hed.HED(), hed.LEAST
        else:
            network, self._least = pidinet.PiDiNet(converted=True), pidinet.LEAST
        try:
            state = read_state(path)
            network.load_state_dict(pidinet.converted_weights(state) if self.config.model == "pidinet" else state)
        except (RuntimeError, KeyError, IndexError, AttributeError, ValueError) as error:
            raise X2IError(f"annotator edges: {path} does not hold {self.config.model}: {str(error)[:400]}") from None
        self._network = self._runtime.place(network)
        self._mean = torch.tensor(MEAN, device=self._runtime.device)[:, None, None] * 255
        self._deviation = torch.tensor(DEVIATION, device=self._runtime.device)[:, None, None] * 255

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        maps = self._maps(pixels(batch))
        density = [float(m.mean()) / 255 for m in maps]
        columns = {"map": pa.array([encode(m, "png") for m in maps], pa.binary()), "density": density}
        return pa.table(columns, schema=self.columns)

    def _maps(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Edge maps, uint8 [height, width] each."""
        import torch

        sizes = [map_size(p, self.config.side) for p in pictures]
        images = [at_least(shrunk(p, self.config.side), self._least) for p in pictures]
        maps: list[np.ndarray] = [np.empty(0, np.uint8)] * len(images)
        # `at_least` and `shrunk` may hand through the picture itself, which is read-only: a copy keeps torch quiet
        for places, images_BHWC in by_shape([torch.from_numpy(i.copy()) for i in images]):
            images_BCHW = images_BHWC.to(self._runtime.device).permute(0, 3, 1, 2).float()
            if self.config.model == "pidinet":
                images_BCHW = (images_BCHW - self._mean) / self._deviation
            with self._runtime.running():
                edges_BHW = self._network(images_BCHW)
            found = self._runtime.numpy((edges_BHW.float() * 255).round())
            if not np.isfinite(found).all():
                raise ValueError("the network's answer is not finite; precision: bf16 or fp32 has a wider range")
            for i, edges_HW in zip(places, found, strict=True):
                width, height = sizes[i]
                maps[i] = edges_HW[:height, :width].astype(np.uint8)
        return maps


def read_state(path: str) -> dict[str, Any]:
    """A state dict from .pth or .safetensors; one that lies under the key `state_dict` is taken from there."""
    import torch

    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch raises anything for a file that is no checkpoint
        raise ValueError(f"no checkpoint ({type(error).__name__}: {error})") from None
    state = held.get("state_dict", held) if isinstance(held, dict) else {}
    return {name: tensor.float() for name, tensor in state.items()}
