"""What annotators over stored embeddings share: small heads read from files, and embeddings as matrices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from x2i.base.errors import X2IError
from x2i.base.files import atomic
from x2i.base.weights import Weights, cache_folder
from x2i.pipelines.annotators.base import Batch


@dataclass(frozen=True)
class Published(Weights):
    """Weights that lie in a repository on GitHub only: `github:OWNER/REPOSITORY:FILE`.

    They are kept in the cache folder. Files that are attached to a release, not part of the repository, must be
    put there by hand.
    """

    def local(self) -> Path | None:
        """The file in the cache, or None."""
        path = self.place()
        return path if path.is_file() else None

    @property
    def remedy(self) -> str:
        """How to get the file."""
        repository, file = self._where()
        return (
            f"{self.spec}: get the file {file} of the GitHub repository {repository}, and name it "
            f"(`weights: /path/to/{Path(file).name}`), or put it at {self.place()}"
        )

    def _fetched(self) -> Path:
        import urllib.error
        import urllib.parse
        import urllib.request

        repository, file = self._where()
        url = f"https://raw.githubusercontent.com/{repository}/HEAD/{urllib.parse.quote(file)}"
        try:
            with urllib.request.urlopen(url, timeout=20) as answer, atomic(self.place()) as temporary:
                temporary.write_bytes(answer.read())
        except (OSError, urllib.error.URLError) as error:
            raise X2IError(
                f"weights {self.spec} (licence {self.licence or 'unknown'}): not here, and not to be had from GitHub "
                f"({error}). {self.remedy}"
            ) from None
        return self.place()

    def place(self) -> Path:
        """Where the file is looked for."""
        repository, file = self._where()
        return cache_folder() / "weights" / "github" / repository / file

    def _where(self) -> tuple[str, str]:
        repository, mark, file = self.spec.removeprefix("github:").partition(":")
        if not mark or repository.count("/") != 1 or not file or ".." in self.spec:
            raise X2IError(f"weights {self.spec}: expected github:OWNER/REPOSITORY:FILE")
        return repository, file


def weights_of(spec: str, sha256: str | None, known: Iterable[Weights]) -> Weights:
    """The weights that a configuration names. `known` are published ones, which bring their hash, size and licence."""
    for weights in known:
        if weights.spec == spec:
            return replace(weights, sha256=sha256 or weights.sha256)
    return Published(spec, sha256) if spec.startswith("github:") else Weights(spec, sha256)


def read_tensors(path: Path, annotator: str) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors, .npz, or PyTorch file (a state dict, read without running code) by name.

    Raises:
        X2IError: it is none of these.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return dict(load_file(path))
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        import torch

        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - readers of files raise anything, OSError to UnpicklingError
        raise X2IError(f"{annotator}: {path} cannot be read as weights ({type(error).__name__}: {error})") from None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    tensors = {name: value.float().numpy() for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise X2IError(f"{annotator}: {path} holds no state dict")
    return tensors


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


def embeddings(batch: Batch, column: str, width: int, annotator: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of embeddings as float32 [rows that have one, width], and bool [rows] that says which have one.

    Raises:
        X2IError: their width is not what the head expects.
    """
    array = batch.columns[column]
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    there = np.asarray(array.is_valid(), bool)
    present = array.drop_null()
    flat = present.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    found = len(flat) // max(1, len(present))
    if len(present) and (found != width or len(flat) != width * len(present)):
        raise X2IError(f"{annotator}: {column} has width {found}, but these weights are for width {width}")
    return flat.reshape(-1, width), there


def unit(matrix: np.ndarray) -> np.ndarray:
    """Rows of float32 [rows, width] scaled to length 1; a row of zeros stays."""
    length = np.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix / np.where(length > 0, length, 1)


def spread(values: np.ndarray, there: np.ndarray) -> pa.Array:
    """Float32 values of the rows that have one, as an arrow array over all rows: null elsewhere."""
    out = np.zeros(len(there), np.float32)
    out[there] = values
    return pa.array(out, pa.float32(), mask=~there)
