"""Helpers for tests of tasks: what tasks make, and annotators' values of real photographs in the annotators' format."""

from __future__ import annotations

from functools import cache
from typing import Any

import cv2
import numpy as np

from tests.pipelines.tasks.rows import PHOTOS
from x2i.corpus.sample import Sample
from x2i.pipelines.images import decode, encode, read_header
from x2i.pipelines.tasks.base import Selected, Skipped, Task


def make(task: Task, on: Selected) -> dict[str, Sample]:
    """A task's samples by task type; nothing is made that was not promised, and every promise is kept or skipped."""
    made = list(task.build(on))
    assert sorted(m.task_type for m in made) == sorted(task.task_types())
    return {m.task_type: m for m in made if isinstance(m, Sample)}


def skipped(task: Task, on: Selected) -> dict[str, str]:
    """The reasons for what a task does not make."""
    return {m.task_type: m.reason for m in task.build(on) if isinstance(m, Skipped)}


@cache
def annotated(name: str = "chelsea.png") -> dict[str, dict[str, Any]]:
    """Values for every map: of half the picture's size, as annotators that look at smaller pictures store them.

    Edges and depth are stand-ins (gradients, a blur), since their models need a hub; formats are the annotators'.
    """
    data = PHOTOS[name]
    image = decode(data, read_header(data))
    height, width = (n // 2 for n in image.shape[:2])
    grey = cv2.cvtColor(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
    smooth = cv2.GaussianBlur(grey.astype(np.float32), (0, 0), 1.5)
    edges = (4 * np.hypot(cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1))).clip(0, 255)
    depth = cv2.GaussianBlur(grey.astype(np.float32), (0, 0), 6)
    depth = (depth - depth.min()) / np.ptp(depth) * 65535
    classes = (grey // 64).astype(np.uint8)
    return {
        "hed": {"map": encode(edges.astype(np.uint8), "png")},
        "edges": {"map": encode((edges / 2).astype(np.uint8), "png")},
        "depth": {"map": encode(depth.astype(np.uint16), "png"), "minimum": 1.0, "maximum": 21.0, "near_is": "white"},
        "semantic": {
            "map": encode(classes, "png"),
            "palette": "ade20k",
            "labels": [{"id": i, "name": n, "area": 0.2} for i, n in enumerate(("wall", "building", "sky", "floor"))],
        },
        "pose": {"people": [person()], "layout": "coco18", "count": 1},
        "grounding": {
            "boxes": [[0.4, 0.4, 0.6, 0.6], [0.1, 0.1, 0.9, 0.9], [0.0, 0.0, 0.2, 0.3], [0.0, 0.0, 1.0, 1.0]],
            "phrases": ["an eye", "a cat", "an eye", "a photo"],
        },
    }


#: A person who stands: OpenPose's 18 parts as shares.
STANDING = (
    (0.50, 0.15), (0.50, 0.25), (0.40, 0.26), (0.34, 0.40), (0.30, 0.52), (0.60, 0.26), (0.66, 0.40), (0.70, 0.52),
    (0.44, 0.55), (0.43, 0.72), (0.42, 0.90), (0.56, 0.55), (0.57, 0.72), (0.58, 0.90), (0.47, 0.12), (0.53, 0.12),
    (0.44, 0.14), (0.56, 0.14),
)  # fmt: skip


def person(places: Any = STANDING, missing: tuple[int, ...] = ()) -> dict[str, Any]:
    """A person as the annotator `pose` gives one."""
    found = [
        {"x": None, "y": None, "score": 0.0} if i in missing else {"x": x, "y": y, "score": 0.9}
        for i, (x, y) in enumerate(places)
    ]
    return {"keypoints": found, "score": 0.9, "box": [0.3, 0.1, 0.7, 0.9]}
