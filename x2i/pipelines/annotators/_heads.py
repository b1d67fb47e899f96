"""What annotators over stored embeddings share: small heads read from files, and embeddings as matrices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import Field

from x2i.base.errors import X2IError
from x2i.pipelines.annotators._columns import column
from x2i.pipelines.annotators.base import AnnotatorConfig, Item


class HeadConfig(AnnotatorConfig):
    """Which head, and over which embedding. A subclass has `weights`, too."""

    sha256: str | None = Field(
        None, description="SHA-256 that the head must have, e.g. 21dd590f…; known for the published ones"
    )
    embedding: str = Field(
        "clip.embedding", description="column of embeddings of the CLIP that the head is for, e.g. clip_l14.embedding"
    )


def read_tensors(path: Path, annotator: str) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors, .npz, or PyTorch file (a state dict, read without running code) by name.

    Raises:
        X2IError: it is none of these.
    """
    if path.suffix not in (".safetensors", ".npz"):
        from x2i.pipelines.annotators._torch import checkpoint

        return {name: tensor.float().numpy() for name, tensor in checkpoint(path, annotator).items()}
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        from safetensors.numpy import load_file  # no torch where a head needs none

        return dict(load_file(path))
    except Exception as error:  # noqa: BLE001 - readers of files raise anything
        why = f"{type(error).__name__}: {error}"
        raise X2IError(f"annotator {annotator}: {path} cannot be read as weights ({why})") from None


def linear(tensors: dict[str, np.ndarray], names: Iterable[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Layers as (weight float32 [out, in], bias float32 [out]), by the names of their modules, in order.

    Raises:
        KeyError: a tensor is missing.
        ValueError: the layers do not fit each other.
    """
    layers = [(tensors[f"{n}.weight"].astype(np.float32), tensors[f"{n}.bias"].astype(np.float32)) for n in names]
    for i, (weight, bias) in enumerate(layers):
        if weight.ndim != 2 or bias.shape != weight.shape[:1] or (i and weight.shape[1] != layers[i - 1][0].shape[0]):
            raise ValueError(f"layer {i} has weight {weight.shape} and bias {bias.shape}")
    return layers


def embeddings(batch: Sequence[Item], name: str, width: int, annotator: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of embeddings as float32 [rows that have one, width], and bool [rows] that says which have one.

    Raises:
        X2IError: there is no such column, or its width is not what the head expects.
    """
    array = column(batch, name, annotator).combine_chunks()
    there = np.asarray(array.is_valid(), bool)
    present = array.drop_null()
    flat = present.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    found = len(flat) // max(1, len(present))
    if len(present) and (found != width or len(flat) != width * len(present)):
        raise X2IError(f"annotator {annotator}: {name} has width {found}, but these weights are for width {width}")
    return flat.reshape(-1, width), there


def stored(matrix: np.ndarray) -> pa.Array:
    """Embeddings [rows, width] as a column: fp16 lists of fixed size."""
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.astype(np.float16).ravel(), pa.float16()), matrix.shape[1])


def unit(matrix: np.ndarray) -> np.ndarray:
    """Rows of float32 [rows, width] scaled to length 1; a row of zeros stays."""
    length = np.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix / np.where(length > 0, length, 1)


def spread(values: np.ndarray, there: np.ndarray) -> pa.Array:
    """Float32 values of the rows that have one, as an arrow array over all rows: null elsewhere."""
    out = np.zeros(len(there), np.float32)
    out[there] = values
    return pa.array(out, pa.float32(), mask=~there)
