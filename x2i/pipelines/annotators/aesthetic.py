"""`aesthetic`: how beautiful people would find a picture, by LAION's heads over a stored CLIP ViT-L/14 embedding.

Models (both over OpenAI's ViT-L/14, L2-normalised):

- v1: a linear layer (LAION-AI/aesthetic-predictor, MIT).
- v2: the "improved" predictor (christophschuhmann/improved-aesthetic-predictor, Apache-2.0), trained on SAC, Logos
  and AVA: 768-1024-128-64-16-1 with dropout and *no activations*, hence one affine map, to which it is folded here.

Scores are on a scale of about 1 to 10. LAION-Aesthetics v2 takes subsets at 4.5, 5, 6, 6.25 and 6.5; "aes6" is
`aesthetic.score > 6`. The heads belong to that one CLIP: on another model's embedding a score means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from x2i.base.errors import X2IError
from x2i.base.weights import Weights
from x2i.pipelines.annotators._heads import HeadConfig, embeddings, linear, read_tensors, spread, unit
from x2i.pipelines.annotators._weights import GitHub, weights_of
from x2i.pipelines.annotators.base import Annotator, Item

V1 = GitHub(
    "github:LAION-AI/aesthetic-predictor:sa_0_4_vit_l_14_linear.pth",
    "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
    size=4071,
    licence="MIT",
)
#: A copy on the model hub; the hash is that of the file in christophschuhmann/improved-aesthetic-predictor.
V2 = Weights(
    "camenduru/improved-aesthetic-predictor:sac+logos+ava1-l14-linearMSE.pth",
    "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    size=3_714_759,
    licence="Apache-2.0",
)

#: The linear layers among v2's modules; the others are dropout.
LAYERS = (0, 2, 4, 6, 7)


class AestheticConfig(HeadConfig):
    """Which head, and over which embedding: of OpenAI's ViT-L/14."""

    head: Literal["auto", "v1", "v2"] = Field(
        "auto", description="e.g. v1 (linear) or v2 (MLP, folded); auto: what the file holds, v2 where none is named"
    )
    weights: str = Field(
        "",
        description="a head's file, e.g. /path/to/sac+logos+ava1-l14-linearMSE.pth, a hub's org/name:file, or "
        "github:OWNER/REPOSITORY:FILE; default: the published file of `head`",
    )


class Aesthetic(Annotator):
    """`score`: about 1 (ugly) to 10. Null where there is no embedding. No pixels, no GPU."""

    name = "aesthetic"
    needs = "row"
    Config = AestheticConfig
    columns = pa.schema({"score": pa.float32()})

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.config.embedding,)

    def weights(self) -> list[Weights]:
        spec = self.config.weights or (V1 if self.config.head == "v1" else V2).spec
        return [weights_of(spec, self.config.sha256, (V1, V2))]

    def setup(self) -> None:
        self._weight, self._bias = load_head(Path(self.weights()[0].fetch()), self.config.head)

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        x, there = embeddings(batch, self.config.embedding, len(self._weight), "aesthetic")
        score = unit(x) @ self._weight + self._bias  # stored in fp16: again of length 1
        return pa.table({"score": spread(score, there)})


def load_head(path: Path, head: str = "auto") -> tuple[np.ndarray, np.float32]:
    """A published head as one affine map: weight float32 [width], and bias.

    Raises:
        X2IError: the file holds no such head.
    """
    tensors = read_tensors(path, "aesthetic")
    found = "v1" if tensors.keys() == {"weight", "bias"} else "v2" if "layers.0.weight" in tensors else None
    if found is None:
        raise X2IError(
            f"annotator aesthetic: {path} is neither v1 (weight, bias) nor v2 (layers.N): it has {_some(tensors)}"
        )
    if head not in ("auto", found):
        raise X2IError(f"annotator aesthetic: head: {head}, but {path} holds {found}")
    if found == "v1":
        tensors = {f"layers.0.{name}": value for name, value in tensors.items()}
    names = ["layers.0"] if found == "v1" else [f"layers.{i}" for i in LAYERS]
    if tensors.keys() != {f"{n}.{kind}" for n in names for kind in ("weight", "bias")}:
        raise X2IError(f"annotator aesthetic: {path} is not the published {found}: it has {_some(tensors)}")
    try:
        return fold(linear(tensors, names))
    except ValueError as error:
        raise X2IError(f"annotator aesthetic: {path} is not the published {found}: {error}") from None


def fold(layers: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.float32]:
    """Linear layers without activations, the last with one output, as one: weight float32 [width], and bias.

    Args:
        layers: (weight [out, in], bias [out]) each, first to last. Multiplied in float64.
    """
    weight, bias = np.eye(layers[0][0].shape[1]), np.zeros(layers[0][0].shape[1])
    for w, b in layers:
        weight, bias = w.astype(np.float64) @ weight, w.astype(np.float64) @ bias + b
    if weight.shape[0] != 1:
        raise ValueError(f"{weight.shape[0]} outputs")
    return weight[0].astype(np.float32), np.float32(bias[0])


def _some(tensors: dict[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {list(value.shape)}" for name, value in sorted(tensors.items())[:12])
