"""The search of MTCNN (see `x2i.pipelines.networks.mtcnn`): a pyramid of proposals, refined twice.

Boxes are float32 x1, y1, x2, y2 in pixels, half open.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np

from x2i.pipelines.annotators._pictures import alike
from x2i.pipelines.annotators._torch import Runtime
from x2i.pipelines.images import resize

_CELL, _STRIDE = 12, 2  # pixels that a proposal sees, and between two of them
_STEP = 0.709  # from one level of the pyramid to the next
_PROPOSED, _REFINED = 0.6, 0.7  # probabilities that pass the first two networks, as published
_CROPS = 1024

Faces = tuple[np.ndarray, np.ndarray, np.ndarray]  # boxes [N, 4], scores [N], points [N, 5, 2]


class Search:
    """MTCNN's three networks at work, on pictures of any size.

    Args:
        proposals, refinement, output: the networks, placed by `runtime`.
        smallest: side of the smallest face that is looked for, pixels.
        least: probability that passes the last network.
    """

    def __init__(
        self, runtime: Runtime, proposals: Any, refinement: Any, output: Any, smallest: int, least: float
    ) -> None:
        self._runtime, self._smallest, self._least = runtime, smallest, least
        self._proposals, self._refinement, self._output = proposals, refinement, output

    def __call__(self, images: Sequence[np.ndarray]) -> list[Faces]:
        """Faces of each picture (uint8 [height, width, 3] RGB), the surest first."""
        boxes: list[np.ndarray] = [np.zeros((0, 4), np.float32) for _ in images]
        for some in alike(i.shape for i in images):  # pictures of one size go through the pyramid together
            for i, found in zip(some, self._propose([images[i] for i in some]), strict=True):
                boxes[i] = found
        owners, flat = _joined(boxes)
        scores, moves, _ = self._look(self._refinement, images, owners, flat, 24)
        good = scores > _REFINED
        owners, flat, scores, moves = owners[good], flat[good], scores[good], moves[good]
        kept = _distinct(owners, flat, scores, 0.7)
        owners, flat = owners[kept], _square(_moved(flat[kept], moves[kept]))
        scores, moves, points = self._look(self._output, images, owners, flat, 48)
        good = scores > self._least
        owners, flat, scores, moves = owners[good], flat[good], scores[good], moves[good]
        points = flat[:, None, :2] + points[good] * (flat[:, None, 2:] - flat[:, None, :2])
        flat = _moved(flat, moves)
        kept = _distinct(owners, flat, scores, 0.7, smaller=True)
        return [(flat[k], scores[k], points[k]) for k in (kept[owners[kept] == i] for i in range(len(images)))]

    def _propose(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Squares [N, 4] per picture, all pictures of one size."""
        height, width = images[0].shape[:2]
        owners, boxes, scores, moves = [], [], [], []
        scale = _CELL / self._smallest
        while min(height, width) * scale >= _CELL:
            size = int(width * scale + 1), int(height * scale + 1)
            scores_BHW, moves_B4HW = self._run(self._proposals, np.stack([resize(i, *size) for i in images]))
            picture, y, x = np.nonzero(scores_BHW >= _PROPOSED)
            corner = np.stack([x, y], axis=1) * _STRIDE
            box = np.hstack([corner, corner + _CELL]) * (np.array([width, height, width, height]) / (*size, *size))
            score = scores_BHW[picture, y, x]
            kept = _distinct(picture, box, score, 0.5)
            owners.append(picture[kept])
            boxes.append(box[kept].astype(np.float32))
            scores.append(score[kept])
            moves.append(moves_B4HW[picture, :, y, x][kept])
            scale *= _STEP
        if not owners:  # smaller than the smallest face
            return [np.zeros((0, 4), np.float32) for _ in images]
        owner, box, score, move = (np.concatenate(v) for v in (owners, boxes, scores, moves))
        kept = _distinct(owner, box, score, 0.7)
        squares = _square(_moved(box[kept], move[kept]))
        return [squares[owner[kept] == i] for i in range(len(images))]

    def _look(
        self, network: Any, images: Sequence[np.ndarray], owners: np.ndarray, boxes: np.ndarray, side: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores [N], moves [N, 4] and points [N, 5, 2] (none, from the second network) of boxes, cut out at `side`."""
        parts = []
        for start in range(0, len(boxes), _CROPS):
            some = zip(owners[start : start + _CROPS], boxes[start : start + _CROPS], strict=True)
            parts.append(self._run(network, np.stack([_cut(images[i], box, side) for i, box in some])))
        if not parts:
            return np.zeros(0, np.float32), np.zeros((0, 4), np.float32), np.zeros((0, 5, 2), np.float32)
        scores, moves, *points = (np.concatenate(v) for v in zip(*parts, strict=True))
        return scores, moves, points[0] if points else np.zeros((len(scores), 5, 2), np.float32)

    def _run(self, network: Any, images_BHWC: np.ndarray) -> list[np.ndarray]:
        import torch

        x_BCHW = torch.from_numpy(images_BHWC).to(self._runtime.device).permute(0, 3, 1, 2).float()
        with self._runtime.running():
            return [self._runtime.numpy(out) for out in network((x_BCHW - 127.5) / 128)]


def _joined(boxes: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Which picture each box is of, and all boxes."""
    owners = np.repeat(np.arange(len(boxes)), [len(b) for b in boxes])
    return owners, np.concatenate([*boxes, np.zeros((0, 4), np.float32)])


def _distinct(
    owners: np.ndarray, boxes: np.ndarray, scores: np.ndarray, overlap: float, smaller: bool = False
) -> np.ndarray:
    """Indices of boxes of which no surer one of the same picture covers more than `overlap`, the surest first.

    The cover is the intersection over the union, or over the smaller of both.
    """
    kept: list[int] = []
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    for part in _parts(owners, scores):
        while len(part):
            best, rest = part[0], part[1:]
            kept.append(int(best))
            low, high = np.maximum(boxes[rest, :2], boxes[best, :2]), np.minimum(boxes[rest, 2:], boxes[best, 2:])
            shared = (high - low).clip(0).prod(axis=1)
            whole = np.minimum(areas[rest], areas[best]) if smaller else areas[rest] + areas[best] - shared
            part = rest[shared <= overlap * whole]
    return np.array(kept, int)


def _parts(owners: np.ndarray, scores: np.ndarray) -> Iterator[np.ndarray]:
    order = np.argsort(-scores, kind="stable")
    for owner in np.unique(owners):
        yield order[owners[order] == owner]


def _moved(boxes: np.ndarray, moves: np.ndarray) -> np.ndarray:
    """Boxes whose sides are moved by shares of their width and height."""
    return boxes + moves * np.tile(boxes[:, 2:] - boxes[:, :2], 2)


def _square(boxes: np.ndarray) -> np.ndarray:
    """Boxes made square about their middle, as wide as they are long."""
    middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).max(axis=1, keepdims=True) / 2
    return np.hstack([middle - half, middle + half])


def _cut(image: np.ndarray, box: np.ndarray, side: int) -> np.ndarray:
    """A square of the picture at `side` pixels; black where it reaches beyond it."""
    x1, y1, x2, y2 = (round(float(v)) for v in box)
    length = max(x2 - x1, y2 - y1, 1)
    inside = image[max(0, y1) : max(0, y1 + length), max(0, x1) : max(0, x1 + length)]
    if inside.shape[:2] != (length, length):
        above, left = min(length, max(0, -y1)), min(length, max(0, -x1))
        below, right = length - above - inside.shape[0], length - left - inside.shape[1]
        if not inside.size:
            return np.zeros((side, side, 3), np.uint8)
        inside = cv2.copyMakeBorder(inside, above, below, left, right, cv2.BORDER_CONSTANT)
    return cv2.resize(inside, (side, side), interpolation=cv2.INTER_AREA)
