"""`masks`: segmentation masks for the boxes of `grounding` (or of everything), by SAM or SAM 2.

Papers: Kirillov et al. 2023, "Segment Anything", https://arxiv.org/abs/2304.02643; Ravi et al. 2024, "SAM 2",
https://arxiv.org/abs/2408.00714; all weights Apache-2.0. Default: SAM 2.1 through transformers,
facebook/sam2.1-hiera-large (about 0.9 GB; …-tiny 0.16 GB). facebook/sam-vit-huge (2.6 GB), …-large (1.2 GB) and
…-base (0.38 GB) are SAM. `backend: segment_anything` runs the authors' own checkpoints, sam_vit_h_4b8939.pth,
sam_vit_l_0b3195.pth and sam_vit_b_01ec64.pth. Given the same weights both libraries agree; this is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from x2i.base.packages import need
from x2i.base.weights import Weights
from x2i.pipelines.annotators._boxes import BOXES, shares
from x2i.pipelines.annotators._columns import column
from x2i.pipelines.annotators._pictures import pixels
from x2i.pipelines.annotators._segment_anything import Published, Transformers, inner, prepare
from x2i.pipelines.annotators._torch import SHARE, SPEED, ModelConfig, Runtime, folder
from x2i.pipelines.annotators._weights import weights_of
from x2i.pipelines.annotators.base import Annotator, Item
from x2i.pipelines.images import resize

#: Sizes in bytes are about right, for people.
HIERA_L = Weights("facebook/sam2.1-hiera-large", size=898_000_000, licence="Apache-2.0")
VIT_H = Weights("ybelkada/segment-anything:checkpoints/sam_vit_h_4b8939.pth", size=2_565_000_000, licence="Apache-2.0")
KNOWN = (
    HIERA_L,
    VIT_H,
    Weights("facebook/sam2.1-hiera-tiny", size=156_000_000, licence="Apache-2.0"),
    Weights("facebook/sam-vit-huge", size=2_565_000_000, licence="Apache-2.0"),
    Weights("facebook/sam-vit-large", size=1_250_000_000, licence="Apache-2.0"),
    Weights("facebook/sam-vit-base", size=375_000_000, licence="Apache-2.0"),
)
#: Masks that are brought to the picture's size at once: a bound on memory.
TOGETHER = 16


class MasksConfig(ModelConfig):
    """Which model, for which boxes. Thresholds and the grid are SAM's published ones, and count only in `automatic`."""

    defaults = ("backend", {"transformers": HIERA_L.spec, "segment_anything": VIT_H.spec})

    backend: Literal["transformers", "segment_anything"] = Field(
        "transformers", description="library that runs the model, e.g. segment_anything for the authors' .pth files"
    )
    weights: str = Field(
        HIERA_L.spec,
        description="for transformers a SAM or SAM 2 by hub id or folder, e.g. facebook/sam-vit-huge; for "
        "segment_anything a .pth, e.g. ./sam_vit_b_01ec64.pth",
    )
    mode: Literal["boxes", "automatic"] = Field(
        "boxes",
        description="a mask per box, or e.g. automatic: of everything, from a grid of points (segment_anything only)",
    )
    boxes: str = Field("grounding.boxes", description="the column of boxes that are asked for, e.g. grounding.boxes")
    multimask: bool = Field(
        False, description="e.g. true: three masks a box, of which the one of best predicted IoU is kept; false: one"
    )
    side: int | None = Field(
        1024,
        gt=15,
        description="masks have the decoded picture's size, or this longest side if it is larger, e.g. 1024",
    )
    boxes_per_call: int = Field(64, gt=0, description="boxes (or points) that are decoded at once, e.g. 64")
    points_per_side: int = Field(32, gt=0, description="automatic: points along a side of the grid, e.g. 32")
    min_predicted_iou: float = Field(0.88, description="automatic: masks of less predicted IoU are dropped, e.g. 0.88")
    min_stability: float = Field(0.95, description="automatic: masks of less stability are dropped, e.g. 0.95")
    nms: float = Field(0.7, gt=0, le=1, description="automatic: IoU from which a mask is a duplicate, e.g. 0.7")
    min_area: int = Field(0, ge=0, description="automatic: holes and islands of fewer pixels are mended, e.g. 100")

    @model_validator(mode="after")
    def _can_be_automatic(self) -> MasksConfig:
        if self.mode == "automatic" and self.backend != "segment_anything":
            raise ValueError("mode: automatic needs backend: segment_anything")
        return self


class Masks(Annotator):
    """A list per row, in the order of the boxes; rows without boxes have empty lists.

    `masks` are COCO run-length codes (`pycocotools.mask.decode` reads them) at the size of `side`; `boxes` their
    own tight boxes as shares (zeros where a mask is empty), `area` their share of the picture, `box_index` the
    box that was asked (null in automatic mode). `predicted_iou` is the model's own estimate. `stability` is
    SAM's: the IoU of the masks at logits above 1 and above -1.
    """

    name = "masks"
    Config = MasksConfig
    heavy = frozenset({"masks"})
    speed = SPEED | {"boxes_per_call"}
    gpus = SHARE
    columns = pa.schema(
        {
            "masks": pa.list_(pa.struct({"size": pa.list_(pa.int32(), 2), "counts": pa.string()})),
            "boxes": BOXES,
            "predicted_iou": pa.list_(pa.float32()),
            "stability": pa.list_(pa.float32()),
            "area": pa.list_(pa.float32()),
            "box_index": pa.list_(pa.int32()),
        }
    )

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.config.boxes,) if self.config.mode == "boxes" else ()

    @property
    def shorter_side(self) -> int:
        return 1024

    def weights(self) -> list[Weights]:
        return [weights_of(self.config.weights, self.config.sha256, KNOWN)]

    def setup(self) -> None:
        self._coco = need("pycocotools.mask", "pycocotools", "masks")
        path = folder(self.weights()[0])
        published = self.config.backend == "segment_anything"
        self._runtime = Runtime(self.config)
        self._backend: Transformers | Published = Published(path) if published else Transformers(path)
        self._runtime.place(self._backend.model)

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        rows = [self._everything(p) for p in pixels(batch)] if self.config.mode == "automatic" else self._boxes(batch)
        return pa.Table.from_pylist(rows, schema=self.columns)

    def _boxes(self, batch: Sequence[Item]) -> list[dict[str, Any]]:
        import torch

        given = column(batch, self.config.boxes, "masks").to_pylist()
        asked = [np.array(c or [], np.float32).reshape(-1, 4) for c in given]
        shown = [(picture, boxes) for picture, boxes in zip(pixels(batch), asked, strict=True) if len(boxes)]
        if not shown:
            return [self._row([], [], [], None) for _ in asked]
        side, square = self._backend.side, self._backend.square
        images = np.stack([prepare(picture, side, square) for picture, _ in shown])
        with self._runtime.running():
            embeddings = self._backend.embed(torch.from_numpy(images).to(self._runtime.device))
            rows = iter([self._of(e, p, b) for e, (p, b) in zip(embeddings, shown, strict=True)])
        return [next(rows) if len(boxes) else self._row([], [], [], None) for boxes in asked]

    def _of(self, embedding: Any, pixels: np.ndarray, boxes: np.ndarray) -> dict[str, Any]:
        """The row of one picture, from its embedding and its boxes (shares)."""
        import torch

        seen = inner(pixels.shape[0], pixels.shape[1], self._backend.side, self._backend.square)
        size = _limited(pixels, self.config.side)
        boxes_N4 = torch.from_numpy(boxes * np.array([seen[1], seen[0]] * 2, np.float32)).to(self._runtime.device)
        codes: list[dict[str, Any]] = []
        qualities: list[float] = []
        stabilities: list[float] = []
        for part_N4 in boxes_N4.split(self.config.boxes_per_call):
            logits_NCHW, quality_NC = self._backend.decode(embedding, part_N4, self.config.multimask)
            best_N = quality_NC.argmax(dim=1)
            each = torch.arange(len(best_N), device=best_N.device)
            qualities += self._runtime.numpy(quality_NC[each, best_N]).tolist()
            for part_NHW in logits_NCHW[each, best_N].float().split(TOGETHER):
                full_NHW = _full(part_NHW, None if self._backend.square else self._backend.side, seen, size)
                stabilities += stability(full_NHW).tolist()
                masks = (full_NHW > 0).to(torch.uint8).cpu().numpy()
                codes += self._coco.encode(np.asfortranarray(masks.transpose(1, 2, 0)))
        return self._row(codes, qualities, stabilities, list(range(len(boxes))))

    def _everything(self, pixels: np.ndarray) -> dict[str, Any]:
        """The row of one picture in automatic mode; a strip too thin for the model has no masks."""
        from segment_anything import SamAutomaticMaskGenerator

        height, width = _limited(pixels, self.config.side)
        if min(height, width) * self._backend.side < max(height, width):
            return self._row([], [], [], None)
        generator = SamAutomaticMaskGenerator(
            self._backend.model,
            points_per_side=self.config.points_per_side,
            points_per_batch=self.config.boxes_per_call,
            pred_iou_thresh=self.config.min_predicted_iou,
            stability_score_thresh=self.config.min_stability,
            box_nms_thresh=self.config.nms,
            min_mask_region_area=self.config.min_area,
            output_mode="uncompressed_rle",
        )
        with self._runtime.running():
            found = generator.generate(np.ascontiguousarray(resize(pixels, width, height)))
        codes = [self._coco.frPyObjects(f["segmentation"], height, width) for f in found]
        return self._row(codes, [f["predicted_iou"] for f in found], [f["stability_score"] for f in found], None)

    def _row(
        self, codes: list[dict[str, Any]], quality: list[float], steady: list[float], indices: list[int] | None
    ) -> dict[str, Any]:
        boxes: list[np.ndarray] = []
        areas: list[float] = []
        for code in codes:
            height, width = code["size"]
            x, y, w, h = self._coco.toBbox(code)
            boxes.append(shares([x, y, x + w, y + h], width, height))
            areas.append(float(self._coco.area(code)) / (height * width))
        return {
            "masks": [{"size": list(c["size"]), "counts": c["counts"].decode("ascii")} for c in codes],
            "boxes": boxes,
            "predicted_iou": quality,
            "stability": steady,
            "area": areas,
            "box_index": indices if indices is not None else [None] * len(codes),
        }


def _limited(pixels: np.ndarray, side: int | None) -> tuple[int, int]:
    """Height and width of the masks."""
    height, width = pixels.shape[:2]
    scale = min(1.0, side / max(height, width)) if side else 1.0
    return max(1, round(height * scale)), max(1, round(width * scale))


def _full(logits_NHW: Any, padded: int | None, seen: tuple[int, int], size: tuple[int, int]) -> Any:
    """Logits at the masks' size, as published: through the model's square, whose padding is cut, where it has one."""
    from torch.nn.functional import interpolate

    logits_N1HW = logits_NHW[:, None]
    if padded is not None:
        logits_N1HW = interpolate(logits_N1HW, (padded, padded), mode="bilinear", align_corners=False)
        logits_N1HW = logits_N1HW[..., : seen[0], : seen[1]]
    return interpolate(logits_N1HW, size, mode="bilinear", align_corners=False)[:, 0]


def stability(logits_NHW: Any) -> np.ndarray:
    """SAM's stability score, float32 [N]: how little a mask changes as its threshold moves by 1; 0 if it is empty."""
    certain_N = (logits_NHW > 1).sum(dim=(1, 2))
    possible_N = (logits_NHW > -1).sum(dim=(1, 2))
    return (certain_N / possible_N.clamp(min=1)).float().cpu().numpy()
