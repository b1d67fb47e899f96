"""`nudenet`: body parts, covered and exposed, by NudeNet 3.4.2.

Model: a YOLOv8n detector of 18 classes at 320 pixels (https://github.com/notAI-tech/NudeNet), as ONNX in the
registry package nudenet 3.4.2. Licence: the package's metadata says MIT, the licence file that it carries is
AGPL-3.0 (as of YOLOv8, from which the network comes): take the stricter. Preparation and selection are the
package's own, down to the order of the channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from x2i.base.weights import Weights
from x2i.pipelines.annotators._boxes import BOXES, shares
from x2i.pipelines.annotators._onnx import OnnxAnnotator, OnnxConfig
from x2i.pipelines.annotators._pictures import margined, pixels, scaled
from x2i.pipelines.annotators.base import Item

DEFAULT = Weights(
    "pypi:nudenet==3.4.2!/nudenet/320n.onnx",
    "c15d8273adad2d0a92f014cc69ab2d6c311a06777a55545f2c4eb46f51911f0f",
    12_150_158,
    "AGPL-3.0 (or MIT)",
)

SIZE = 320
#: Classes in the network's order.
LABELS = (
    "FEMALE_GENITALIA_COVERED",
    "FACE_FEMALE",
    "BUTTOCKS_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_BREAST_EXPOSED",
    "ANUS_EXPOSED",
    "FEET_EXPOSED",
    "BELLY_COVERED",
    "FEET_COVERED",
    "ARMPITS_COVERED",
    "ARMPITS_EXPOSED",
    "FACE_MALE",
    "BELLY_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
    "ANUS_COVERED",
    "FEMALE_BREAST_COVERED",
    "BUTTOCKS_COVERED",
)
NUDE = [
    "BUTTOCKS_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "ANUS_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
]
#: Longest side that is padded to a square as it is; longer pictures are shrunk to it first, for memory.
_LONGEST = 4096


class NudeNetConfig(OnnxConfig):
    """Where the model lies, and what counts."""

    weights: str = Field(
        DEFAULT.spec, description="NudeNet's detector for 320 pixels as an ONNX file, e.g. ./320n.onnx"
    )
    least_score: float = Field(
        0.25, ge=0.2, le=1, description="score from which a box is kept, e.g. 0.25, as in the package"
    )
    overlap: float = Field(
        0.45,
        gt=0,
        le=1,
        description="of two boxes with a larger IoU, of whatever class, only the surer is kept, e.g. 0.5",
    )
    nude: list[str] = Field(
        default_factory=lambda: list(NUDE),
        description="classes whose highest score is the column `exposed`, e.g. add BELLY_EXPOSED, MALE_BREAST_EXPOSED",
    )

    @field_validator("nude")
    @classmethod
    def _known(cls, nude: list[str]) -> list[str]:
        unknown = sorted(set(nude) - set(LABELS))
        if unknown:
            raise ValueError(f"no such class: {', '.join(unknown)}; the classes are {', '.join(LABELS)}")
        return nude


class NudeNet(OnnxAnnotator):
    """Boxes of body parts and faces, the surest first, and `exposed`: 0 where none of `nude` was found."""

    name = "nudenet"
    Config = NudeNetConfig
    default = DEFAULT
    columns = pa.schema(
        {
            "boxes": BOXES,  # shares
            "labels": pa.list_(pa.string()),
            "scores": pa.list_(pa.float32()),
            "exposed": pa.float32(),
        }
    )

    @property
    def shorter_side(self) -> int:
        return SIZE

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        if not batch:
            return self.columns.empty_table()
        images = pixels(batch)
        found_BCN = self._network(np.stack([_prepare(i) for i in images]))
        rows = [self._select(found_CN.T, *i.shape[:2]) for found_CN, i in zip(found_BCN, images, strict=True)]
        return pa.Table.from_pylist(rows, schema=self.columns)

    def _select(self, found_NC: np.ndarray, height: int, width: int) -> dict[str, Any]:
        """Boxes that are sure enough and not the same thing twice.

        Args:
            found_NC: centre x, y, width, height in pixels of the padded input, then a score per class.
        """
        scores_N = found_NC[:, 4:].max(axis=1)
        sure_N = scores_N >= self.config.least_score
        found_NC, scores_N = found_NC[sure_N], scores_N[sure_N]
        scale = max(height, width) / SIZE
        centre, extent = found_NC[:, :2] * scale, found_NC[:, 2:4] * scale
        corner = np.clip(centre - extent / 2, 0, (width, height))
        extent = np.minimum(
            extent, (width, height) - corner
        )  # what was cut off at the left stays in the width, as there
        corner_extent = np.hstack([corner, extent]).tolist()
        kept = cv2.dnn.NMSBoxes(corner_extent, scores_N.tolist(), self.config.least_score, self.config.overlap)
        boxes = shares(np.hstack([corner, corner + extent]), width, height)
        labels = [LABELS[i] for i in found_NC[:, 4:].argmax(axis=1)]
        return {
            "boxes": [boxes[i] for i in kept],
            "labels": [labels[i] for i in kept],
            "scores": [float(scores_N[i]) for i in kept],
            "exposed": max((float(scores_N[i]) for i in kept if labels[i] in self.config.nude), default=0.0),
        }


def _prepare(image: np.ndarray) -> np.ndarray:
    """Padded with black to a square, right and below, and shrunk: float32 [3, 320, 320], BGR, 0 to 1.

    Args:
        image: uint8 [height, width, 3] RGB.
    """
    image = scaled(image, min(1.0, _LONGEST / max(image.shape[:2])))
    longest = max(image.shape[:2])
    return cv2.dnn.blobFromImage(margined(image, longest, longest), 1 / 255, (SIZE, SIZE), swapRB=True)[0]
