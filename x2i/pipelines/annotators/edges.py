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
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from x2i.base.weights import Weights
from x2i.pipelines.annotators._maps import MapAnnotator, MapConfig, answers, at_least, finite, map_size, shrunk
from x2i.pipelines.annotators._pictures import DEVIATION, MEAN, pixels
from x2i.pipelines.annotators._torch import Runtime, checkpoint, filled, folder
from x2i.pipelines.annotators.base import Item
from x2i.pipelines.images import encode

HED = Weights("lllyasviel/Annotators:ControlNetHED.pth", size=29_400_000, licence="Apache-2.0")
PIDINET = Weights(
    "lllyasviel/Annotators:table5_pidinet.pth",
    "80860ac267258b5f27486e0ef152a211d0b08120f62aeb185a050acc30da486c",
    size=2_871_148,
    licence="research only (hellozhuo/pidinet)",
)


class EdgesConfig(MapConfig):
    """Which network, and at what size."""

    defaults = ("model", {"hed": HED.spec, "pidinet": PIDINET.spec})

    model: Literal["hed", "pidinet"] = Field("hed", description="the network, e.g. pidinet")
    weights: str = Field(
        HED.spec,
        description="its weights: a hub's org/name:file, or a local .pth with the published names, e.g. "
        "./table5_pidinet.pth; the default goes with `model`",
    )


class Edges(MapAnnotator):
    """How sure the network is that there is an edge.

    `map` is an 8-bit grey PNG, 255 where it is sure; not thinned. Its shorter side is `side` or the picture's own,
    whichever is less; it has no more than 4 x side x side pixels. `density` is its mean, 0 to 1.
    """

    name = "edges"
    Config = EdgesConfig
    known = (HED, PIDINET)
    columns = pa.schema({"map": pa.binary(), "density": pa.float32()})

    def setup(self) -> None:
        import torch

        from x2i.pipelines.networks import hed, pidinet

        self._runtime = Runtime(self.config)
        path = folder(self.weights()[0])
        state = checkpoint(path, "edges")
        if self.config.model == "hed":
            network, self._least = filled(hed.HED(), state, path, "edges"), hed.LEAST
        else:
            plain = pidinet.PiDiNet(converted=True)
            network, self._least = filled(plain, state, path, "edges", pidinet.converted_weights), pidinet.LEAST
        self._network = self._runtime.place(network)
        self._mean, self._deviation = (
            torch.from_numpy(v)[:, None, None].to(self._runtime.device) * 255 for v in (MEAN, DEVIATION)
        )

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        maps = self._maps(pixels(batch))
        density = [float(m.mean()) / 255 for m in maps]
        columns = {"map": pa.array([encode(m, "png") for m in maps], pa.binary()), "density": density}
        return pa.table(columns, schema=self.columns)

    def _maps(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Edge maps, uint8 [height, width] each."""
        import torch

        sizes = [map_size(p, self.config.side) for p in pictures]

        def answer(places: list[int], images_BHWC: Any) -> list[np.ndarray]:
            images_BCHW = images_BHWC.to(self._runtime.device).permute(0, 3, 1, 2).float()
            if self.config.model == "pidinet":
                images_BCHW = (images_BCHW - self._mean) / self._deviation
            with self._runtime.running():
                edges_BHW = self._network(images_BCHW)
            found = finite(self._runtime.numpy((edges_BHW.float() * 255).round()))
            cut = zip(found, (sizes[i] for i in places), strict=True)
            return [edges_HW[:height, :width].astype(np.uint8) for edges_HW, (width, height) in cut]

        # `at_least` and `shrunk` may hand through the picture itself, which is read-only: a copy keeps torch quiet
        images = [at_least(shrunk(p, self.config.side), self._least).copy() for p in pictures]
        return answers([torch.from_numpy(i) for i in images], answer)
