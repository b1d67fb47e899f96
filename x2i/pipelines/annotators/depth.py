"""`depth`: a 16-bit depth map, by a transformers depth estimator.

| weights | paper | licence | size | near is |
|---|---|---|---|---|
| Intel/dpt-large (MiDaS 3; the default, as in MultiGen-20M) | Ranftl et al. 2021, arXiv 2103.13413 | Apache-2.0 | 1.37 GB | white |
| depth-anything/Depth-Anything-V2-Small-hf | Yang et al. 2024, arXiv 2406.09414 | Apache-2.0 | 99 MB | white |
| depth-anything/Depth-Anything-V2-Large-hf | the same | CC-BY-NC-4.0 | 1.34 GB | white |
| depth-anything/Depth-Anything-V2-Metric-…-hf | the same | as its base | | black |

Relative models predict inverse depth up to scale and shift, so the nearest is the largest value and white; metric
ones predict metres, so the nearest is black. Under fp16 (the default on a GPU) a prediction has 11 significant
bits; `precision: fp32` fills all 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from x2i.base.packages import need
from x2i.base.weights import Weights
from x2i.pipelines.annotators._maps import MapAnnotator, MapConfig, answers, finite, map_size, prepared
from x2i.pipelines.annotators._pictures import pixels
from x2i.pipelines.annotators._torch import Runtime, component, described, folder, pretrained
from x2i.pipelines.annotators.base import Item
from x2i.pipelines.images import encode

DPT = Weights("Intel/dpt-large", size=1_370_000_000, licence="Apache-2.0")
SMALL = Weights("depth-anything/Depth-Anything-V2-Small-hf", size=99_200_000, licence="Apache-2.0")
#: transformers' model types whose preparation and output this annotator knows.
TYPES = ("dpt", "depth_anything")
#: Parameters that they have and never use; Intel/dpt-large does not hold the last of these.
UNUSED = r"^(dpt\.layernorm|backbone\.embeddings\.mask_token|neck\.fusion_stage\.layers\.0\.residual_layer1)\b"


class DepthConfig(MapConfig):
    """Which model, and at what size."""

    weights: str = Field(
        DPT.spec,
        description="DPT or Depth Anything (V1, V2) as transformers saves them: a hub's org/name[@revision] or a "
        "folder, e.g. depth-anything/Depth-Anything-V2-Small-hf",
    )


class Depth(MapAnnotator):
    """A map of what is near and far, and the range of the prediction from which it was made.

    `map` is a 16-bit grey PNG, stretched for each picture: raw = minimum + map / 65535 x (maximum - minimum). A flat
    prediction gives an all-black map with minimum = maximum. Its shorter side is `side` or the picture's own,
    whichever is less; it has no more than 4 x side x side pixels. The picture is prepared as the model's own
    processor says; one longer than 4:1 is squashed to that before, and its map stretched after.
    """

    name = "depth"
    Config = DepthConfig
    known = (DPT, SMALL)
    columns = pa.schema(
        {
            "map": pa.binary(),
            "minimum": pa.float32(),  # raw prediction at black, in the model's unit
            "maximum": pa.float32(),  # and at white
            "near_is": pa.string(),  # "white" or "black"
            "width": pa.int32(),  # of the map, pixels
            "height": pa.int32(),
        }
    )

    def setup(self) -> None:
        library = need("transformers", "transformers", "depth")
        path = folder(self.weights()[0])
        kind = described(path, "depth", TYPES)
        self._runtime = Runtime(self.config)
        self._near_is = "black" if getattr(kind, "depth_estimation_type", "relative") == "metric" else "white"
        self._processor = component(library.AutoImageProcessor, path, "depth")
        self._model = self._runtime.place(pretrained(library.AutoModelForDepthEstimation, path, "depth", UNUSED))

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        rows = [self._row(raw) for raw in self._predict(pixels(batch))]
        return pa.Table.from_pylist(rows, schema=self.columns)

    def _predict(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Raw predictions at their map's size, float32 [height, width] each."""
        shapes = [map_size(p, self.config.side)[::-1] for p in pictures]

        def answer(places: list[int], images_BCHW: Any) -> list[np.ndarray]:
            targets = [shapes[i] for i in places]
            with self._runtime.running():
                outputs = self._model(pixel_values=images_BCHW.to(self._runtime.device))
                outputs.predicted_depth = outputs.predicted_depth.float()
                found = self._processor.post_process_depth_estimation(outputs, target_sizes=targets)
            # the processor squeezes away sides of one pixel
            return [
                self._runtime.numpy(one["predicted_depth"]).reshape(shape)
                for one, shape in zip(found, targets, strict=True)
            ]

        return answers([prepared(self._processor, p) for p in pictures], answer)

    def _row(self, raw: np.ndarray) -> dict[str, Any]:
        low, high = float(finite(raw).min()), float(raw.max())
        grey = (raw - low) / (high - low) * 65535 if high > low else np.zeros_like(raw)
        return {
            "map": encode(grey.round().astype(np.uint16), "png"),
            "minimum": low,
            "maximum": high,
            "near_is": self._near_is,
            "width": raw.shape[1],
            "height": raw.shape[0],
        }
