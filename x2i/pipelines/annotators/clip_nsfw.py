"""`clip_nsfw`: the probability that a picture is not safe for work, by LAION's heads over a stored CLIP embedding.

Model: LAION-AI/CLIP-based-NSFW-Detector (MIT). Read as published:

- ViT-L/14 and B/32 (openai): `clip_autokeras_binary_nsfw.zip`, `clip_autokeras_nsfw_b32.zip`, Keras SavedModels
  (zipped, or the folder); or LAION's own PyTorch port of them (`norm.mean`, `norm.variance`, `linear_N.weight|bias`).
- ViT-H/14 (laion2b_s32b_b79k): `h14_nsfw.pth` (`layers.N.weight|bias`): a regression of 0 and 1, clipped to that here.

The same names in a .safetensors or .npz file are read too. LAION-5B's column `punsafe` is the L/14 head's output.

AutoKeras took five columns of L/14 for categories (180, 316, 413, 440 and 644; three of B/32): the value, printed
with six decimals, is looked up among those of the training set, and its rank (0 if it is not there) takes its place.
That is done here, from the SavedModel; the port leaves it out. The printed values are those of fp16 embeddings, so an
embedding is taken as it is stored, and not normalised again.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import Field

from x2i.base.errors import X2IError
from x2i.base.weights import Weights
from x2i.pipelines.annotators._heads import HeadConfig, embeddings, linear, read_tensors, spread
from x2i.pipelines.annotators._savedmodel import lookups, variables
from x2i.pipelines.annotators._weights import GitHub, weights_of
from x2i.pipelines.annotators.base import Annotator, Item

_REPOSITORY = "github:LAION-AI/CLIP-based-NSFW-Detector"
L14 = GitHub(
    f"{_REPOSITORY}:clip_autokeras_binary_nsfw.zip",
    "905520bb0336accc73ee282c605d926aef90cf14248889d44b9cee50eef71f8a",
    size=1_094_585,
    licence="MIT",
)
B32 = GitHub(
    f"{_REPOSITORY}:clip_autokeras_nsfw_b32.zip",
    "78715ab9d64485167e8c9ade3b8e6761a17a16c24d114bd47431ac1dab46462b",
    size=231_831,
    licence="MIT",
)
H14 = GitHub(f"{_REPOSITORY}:h14_nsfw.pth", licence="MIT")


class ClipNSFWConfig(HeadConfig):
    """Which head, and over which embedding."""

    weights: str = Field(
        L14.spec,
        description="a head's file or SavedModel folder, e.g. /path/to/clip_autokeras_binary_nsfw.zip, a hub's "
        "org/name:file, or github:OWNER/REPOSITORY:FILE",
    )


class ClipNSFW(Annotator):
    """`probability`: 0 (safe) to 1. Null where there is no embedding. No pixels, no GPU."""

    name = "clip_nsfw"
    needs = "row"
    Config = ClipNSFWConfig
    columns = pa.schema({"probability": pa.float32()})

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.config.embedding,)

    def weights(self) -> list[Weights]:
        return [weights_of(self.config.weights, self.config.sha256, (L14, B32, H14))]

    def setup(self) -> None:
        self._head = load_head(Path(self.weights()[0].fetch()))

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        x, there = embeddings(batch, self.config.embedding, self._head.width, "clip_nsfw")
        return pa.table({"probability": spread(self._head(x), there)})


@dataclass
class Head:
    """A multi-layer perceptron over embeddings, with what its authors put before and after it."""

    layers: list[tuple[np.ndarray, np.ndarray]]  # weight [out, in] and bias [out]
    linear: frozenset[int]  # the layers that no ReLU follows
    sigmoid: bool  # else the output is clipped to 0..1
    mean: np.ndarray | None = None
    deviation: np.ndarray | None = None
    ranks: dict[int, dict[str, int]] = field(default_factory=dict)  # of printed values, by column

    @property
    def width(self) -> int:
        """The embedding's width."""
        return int(self.layers[0][0].shape[1])

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Probabilities float32 [rows] of embeddings float32 [rows, width]."""
        x = x.astype(np.float32)
        for column, ranks in self.ranks.items():
            x[:, column] = [ranks.get(f"{float(v):f}", 0) for v in x[:, column]]
        if self.mean is not None and self.deviation is not None:
            x = (x - self.mean) / self.deviation
        for i, (weight, bias) in enumerate(self.layers):
            x = x @ weight.T + bias
            x = x if i in self.linear else np.maximum(x, 0)
        y = x[:, 0]
        return 1 / (1 + np.exp(-np.clip(y, -60, 60))) if self.sigmoid else np.clip(y, 0, 1)


def load_head(path: Path) -> Head:
    """A published head.

    Raises:
        X2IError: the file holds none.
    """
    try:
        head = _saved_model(path) if path.is_dir() or path.suffix == ".zip" else _state_dict(path)
        if len(head.layers[-1][1]) != 1:
            raise ValueError(f"{len(head.layers[-1][1])} outputs")
        return head
    except (KeyError, ValueError, IndexError, StopIteration, zipfile.BadZipFile) as error:
        raise X2IError(
            f"annotator clip_nsfw: {path} is no published head ({type(error).__name__}: {error}); expected a Keras SavedModel, "
            "norm.* with linear_N.*, or layers.N.*"
        ) from None


def _state_dict(path: Path) -> Head:
    tensors = read_tensors(path, "clip_nsfw")
    prefix = "linear_" if "norm.mean" in tensors else "layers."
    numbers = sorted({int(m[1]) for name in tensors if (m := re.fullmatch(rf"{re.escape(prefix)}(\d+)\.weight", name))})
    layers = linear(tensors, [f"{prefix}{n}" for n in numbers])
    last = len(layers) - 1
    if prefix == "linear_":
        return Head(layers, frozenset({last}), True, tensors["norm.mean"], _deviation(tensors["norm.variance"]))
    # between 128, 16 and 1 the H/14 head has neither activation nor dropout: their numbers follow each other
    plain = {i for i in range(last) if numbers[i + 1] == numbers[i] + 1} | {last}
    return Head(layers, frozenset(plain), False)


def _saved_model(path: Path) -> Head:
    files = _files(path, ("variables/variables.index", "variables/variables.data-00000-of-00001", "saved_model.pb"))
    named = {name.removesuffix("/.ATTRIBUTES/VARIABLE_VALUE"): v for name, v in variables(files[0], files[1]).items()}
    found = sorted(int(m[1]) for name in named if (m := re.fullmatch(r"layer_with_weights-(\d+)/kernel", name)))
    tensors = {}
    for n in found:  # Keras keeps kernels [in, out]
        tensors[f"{n}.weight"] = named[f"layer_with_weights-{n}/kernel"].T
        tensors[f"{n}.bias"] = named[f"layer_with_weights-{n}/bias"]
    layers = linear(tensors, [str(n) for n in found])
    norm = f"layer_with_weights-{found[0] - 1}"
    columns = sorted({int(m[1]) for name in named if (m := re.search(r"encoding_layers/(\d+)/", name))})
    ranks = dict(zip(columns, lookups(files[2]), strict=True))
    deviation = _deviation(named[f"{norm}/variance"])
    return Head(layers, frozenset({len(layers) - 1}), True, named[f"{norm}/mean"], deviation, ranks)


def _deviation(variance: np.ndarray) -> np.ndarray:
    return np.maximum(np.sqrt(variance), np.float32(1e-7))  # as Keras' Normalization does


def _files(path: Path, names: Sequence[str]) -> list[bytes]:
    """Files of a SavedModel's folder, or of a zip that has it at the top or in one folder."""
    if path.is_dir():
        if not (path / names[0]).is_file():
            raise ValueError(f"no {names[0]}")
        return [(path / name).read_bytes() for name in names]
    with zipfile.ZipFile(path) as archive:
        inside = archive.namelist()
        return [archive.read(next(n for n in inside if n == name or n.endswith(f"/{name}"))) for name in names]
