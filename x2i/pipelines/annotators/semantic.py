"""`semantic`: a map of classes, by a transformers segmentation model trained on ADE20K.

| weights | paper | licence | size |
|---|---|---|---|
| openmmlab/upernet-convnext-large (the default) | UperNet, Xiao et al. 2018, arXiv 1807.10221 | MIT | 940 MB |
| facebook/mask2former-swin-large-ade-semantic | Mask2Former, Cheng et al. 2022, arXiv 2112.01527 | CC-BY-NC-4.0 | 866 MB |
| shi-labs/oneformer_ade20k_swin_large | OneFormer, Jain et al. 2022, arXiv 2211.06220 | MIT | 0.9 GB |
| nvidia/segformer-b5-finetuned-ade-640-640 | SegFormer, Xie et al. 2021, arXiv 2105.15203 | NVIDIA, research only | 340 MB |

MultiGen-20M has UperNet on UniFormer-S; the default has the same head on a larger trunk. Mask2Former is stronger
(56.1 mIoU by its authors), but Meta's model zoo allows no commercial use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from x2i.base.packages import need
from x2i.base.weights import Weights
from x2i.pipelines.annotators._maps import MapAnnotator, MapConfig, answers, map_size, prepared
from x2i.pipelines.annotators._pictures import pixels
from x2i.pipelines.annotators._torch import Runtime, component, described, folder, pretrained
from x2i.pipelines.annotators.base import Item
from x2i.pipelines.images import encode

UPERNET = Weights("openmmlab/upernet-convnext-large", size=940_000_000, licence="MIT")
MASK2FORMER = Weights("facebook/mask2former-swin-large-ade-semantic", size=866_000_000, licence="CC-BY-NC-4.0")
#: transformers' model types, and whether they answer with masks and their classes or with a score per pixel.
TYPES = {"mask2former": "masks", "oneformer": "masks", "upernet": "pixels", "segformer": "pixels"}
#: Parameters that they have for training, or never use; published models on Swin do not hold the last of these.
UNUSED = r"(^auxiliary_head|^criterion|\bswin\.layernorm)\."


class SemanticConfig(MapConfig):
    """Which model, at what size, and which labels are named."""

    weights: str = Field(
        UPERNET.spec,
        description="Mask2Former, OneFormer, UperNet or SegFormer as transformers saves them: a hub's "
        "org/name[@revision] or a folder, e.g. facebook/mask2former-swin-large-ade-semantic",
    )
    least: float = Field(
        0.001, ge=0, lt=1, description="classes with a smaller share of the picture are not in `labels`, e.g. 0.01"
    )
    palette: Literal["auto", "ade20k", "hues"] = Field(
        "auto", description="palette that a map is painted with, e.g. hues; auto: ade20k where there are 150 classes"
    )


class Semantic(MapAnnotator):
    """A class for every pixel.

    `map` is a grey PNG of class ids, 8-bit up to 256 classes and 16-bit beyond; `_palette.paint(map, palette)` gives
    its colours. `labels` names what is there, largest first; `area` is the share of the map. The map's shorter side
    is `side` or the picture's own, whichever is less, with no more than 4 x side x side pixels. A picture longer
    than 4:1 is squashed to that for the model.
    """

    name = "semantic"
    Config = SemanticConfig
    known = (UPERNET, MASK2FORMER)
    columns = pa.schema(
        {
            "map": pa.binary(),
            "labels": pa.list_(pa.struct({"id": pa.int16(), "name": pa.string(), "area": pa.float32()})),
            "palette": pa.string(),
        }
    )

    def setup(self) -> None:
        library = need("transformers", "transformers", "semantic")
        path = folder(self.weights()[0])
        kind = described(path, "semantic", TYPES)
        self._runtime = Runtime(self.config)
        by_masks = TYPES[kind.model_type] == "masks"
        family = "AutoModelForUniversalSegmentation" if by_masks else "AutoModelForSemanticSegmentation"
        self._model = self._runtime.place(pretrained(getattr(library, family), path, "semantic", UNUSED))
        self._given: dict[str, Any] = {}  # what the model and the processor take beside pictures
        self._asked: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        if kind.model_type == "oneformer":
            self._given["task_inputs"] = _task(component(library.AutoTokenizer, path, "semantic"), kind.task_seq_len)
            self._asked["task_inputs"] = ["semantic"]
            # names for training's texts; the processor would fetch them from a data set on the hub
            extra = {"class_info_file": None}
        self._processor = component(library.AutoImageProcessor, path, "semantic", **extra)
        names = kind.id2label
        self._names = [str(names.get(i, i)) for i in range(len(names))]
        self._palette = self.config.palette
        if self._palette == "auto":
            self._palette = "ade20k" if len(self._names) == 150 else "hues"

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        rows = [self._row(labels) for labels in self._predict(pixels(batch))]
        return pa.Table.from_pylist(rows, schema=self.columns)

    def _predict(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Class ids, integers [height, width] each, at their map's size."""
        shapes = [map_size(p, self.config.side)[::-1] for p in pictures]

        def answer(places: list[int], images_BCHW: Any) -> list[np.ndarray]:
            given = {name: v.expand(len(places), -1).to(self._runtime.device) for name, v in self._given.items()}
            with self._runtime.running():
                outputs = self._model(pixel_values=images_BCHW.to(self._runtime.device), **given)
            for scores in ("logits", "class_queries_logits", "masks_queries_logits"):
                if getattr(outputs, scores, None) is not None:  # half precision would make ties of near scores
                    outputs[scores] = outputs[scores].float()
            targets = [shapes[i] for i in places]
            found = self._processor.post_process_semantic_segmentation(outputs, target_sizes=targets)
            return [labels_HW.cpu().numpy() for labels_HW in found]

        return answers([prepared(self._processor, p, **self._asked) for p in pictures], answer)

    def _row(self, labels: np.ndarray) -> dict[str, Any]:
        ids, counts = np.unique(labels, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        there = [
            {"id": int(ids[i]), "name": self._names[ids[i]], "area": counts[i] / labels.size}
            for i in order
            if counts[i] >= self.config.least * labels.size
        ]
        small = len(self._names) <= 256
        return {
            "map": encode(labels.astype(np.uint8 if small else np.uint16), "png"),
            "labels": there,
            "palette": self._palette,
        }


def _task(tokenizer: Any, length: int) -> Any:
    """OneFormer's task as tokens, int64 [1, length]; the padding is zeros, as its processor has it."""
    import torch

    tokens = tokenizer("the task is semantic", padding="max_length", max_length=length, truncation=True)
    return torch.tensor([tokens["input_ids"]]) * torch.tensor([tokens["attention_mask"]])
