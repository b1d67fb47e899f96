"""People first, then their keypoints: an object detector and ViTPose, both by transformers.

Xu, Zhang, Zhang and Tao 2022, "ViTPose: simple vision transformer baselines for human pose estimation", arXiv
2204.12484. Model card https://huggingface.co/usyd-community/vitpose-base-simple (Apache-2.0), of the detector
https://huggingface.co/PekingU/rtdetr_r50vd (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np

from x2i.base.errors import X2IError
from x2i.base.packages import need
from x2i.pipelines.annotators._torch import ModelConfig, Runtime, component, pretrained

_CROPS = 64  # people per pass: a crowd should not take the memory of a hundred crops
_FORMAT = {"input_data_format": "channels_last"}  # of a picture that is 1 or 3 pixels high, transformers cannot tell


class ViTPose:
    """A detector of people and a pose model, loaded from folders in transformers' format.

    Args:
        pose, detector: the folders.
        least_person: the detector's score from which a box is a person.
        expert: index of the training set whose keypoints are asked for, where the model has several (ViTPose+).

    Raises:
        X2IError: the detector knows no class `person`, a model is not whole, or transformers is missing.
    """

    def __init__(self, config: ModelConfig, pose: str, detector: str, least_person: float, expert: int) -> None:
        library = need("transformers", "transformers", "pose")
        self._runtime = Runtime(config)
        self._least, self._expert = least_person, expert
        self._see = component(library.AutoImageProcessor, detector, "pose")
        self._detector = self._runtime.place(pretrained(library.AutoModelForObjectDetection, detector, "pose"))
        self._crop = component(library.VitPoseImageProcessor, pose, "pose")
        self._model = self._runtime.place(pretrained(library.VitPoseForPoseEstimation, pose, "pose"))
        self._experts = self._model.config.backbone_config.num_experts > 1
        names = self._detector.config.id2label
        self._person = {int(i) for i, name in names.items() if name.lower() == "person"}
        if not self._person:
            raise X2IError(
                f"annotator pose: the detector {detector} knows no class `person`, but {list(names.values())[:8]}"
            )

    def __call__(self, images: Sequence[np.ndarray]) -> list[list[tuple[np.ndarray, float, list[float]]]]:
        """People of each picture, the surest first: keypoints [17, 3] (x, y, score), score, box; in pixels.

        Args:
            images: uint8 [height, width, 3] RGB each.
        """
        images = [np.require(i, requirements="W") for i in images]  # torch warns of arrays that it must not write to
        boxes = self._people(images)
        found: list[list[tuple[np.ndarray, float, list[float]]]] = [[] for _ in images]
        crops = iter([(i, box, score) for i, some in enumerate(boxes) for box, score in some])
        while some := list(islice(crops, _CROPS)):
            for (i, box, score), points in zip(some, self._keypoints(images, some), strict=True):
                found[i].append((points, score, box))
        return found

    def _people(self, images: Sequence[np.ndarray]) -> list[list[tuple[list[float], float]]]:
        """Boxes (x1, y1, x2, y2 in pixels, inside the picture) and scores."""
        inputs = self._see(images=list(images), return_tensors="pt", **_FORMAT).to(self._runtime.device)
        with self._runtime.running():
            outputs = self._detector(**inputs)
        sizes = [i.shape[:2] for i in images]
        outputs.logits, outputs.pred_boxes = outputs.logits.float(), outputs.pred_boxes.float()
        seen = self._see.post_process_object_detection(outputs, threshold=self._least, target_sizes=sizes)
        out = []
        for one, (height, width) in zip(seen, sizes, strict=True):
            boxes = self._runtime.numpy(one["boxes"]).clip(0, [width, height, width, height])
            out.append(
                [
                    ([float(v) for v in box], score)
                    for box, score, label in zip(boxes, one["scores"].tolist(), one["labels"].tolist(), strict=True)
                    if label in self._person and box[2] - box[0] > 0 and box[3] - box[1] > 0
                ]
            )
        return out

    def _keypoints(
        self, images: Sequence[np.ndarray], crops: Sequence[tuple[int, list[float], float]]
    ) -> list[np.ndarray]:
        import torch

        # one picture per box, in the boxes' order; boxes as x, y, width, height
        pictures = [images[i] for i, _, _ in crops]
        boxes = [[[x1, y1, x2 - x1, y2 - y1]] for _, (x1, y1, x2, y2), _ in crops]
        inputs = self._crop(pictures, boxes=boxes, return_tensors="pt", **_FORMAT).to(self._runtime.device)
        if self._experts:
            inputs["dataset_index"] = torch.full((len(crops),), self._expert, device=self._runtime.device)
        with self._runtime.running():
            outputs = self._model(**inputs)
        outputs.heatmaps = outputs.heatmaps.float()
        poses = self._crop.post_process_pose_estimation(outputs, boxes=boxes)
        return [np.column_stack([p["keypoints"].numpy(), p["scores"].numpy()]).astype(np.float32) for (p,) in poses]
