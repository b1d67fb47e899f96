"""Weights in and out: safetensors by their published names, in one file or in shards with an index."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from x2i.base.errors import X2IError

FILE = "model.safetensors"


def save(state: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by their names. Of tied ones the first name is written. Not atomic: wrap the path."""
    unique = {name: state[name] for name in state if name not in aliases(state)}
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in unique.items()}, path, {"format": "pt"})
    path.chmod(0o644)  # safetensors lets nobody else read it


def load(model: nn.Module, path: Path) -> None:
    """Read all of a model's weights, tensor by tensor; those of another dtype are cast.

    Args:
        model: its `state_dict` says what must be there; of tied tensors one name is enough.
        path: the file, or a folder with model.safetensors or its index of shards.

    Raises:
        X2IError: not a safetensors file, or tensors are missing, unknown or of another shape (the first few named).
            The model is untouched.
    """
    load_state(model.state_dict(), path)


def load_state(wanted: Mapping[str, Tensor], path: Path) -> None:
    """As `load`, all of a model's state, or of what it is without its adapters. Raises X2IError."""
    found = shapes(path)
    tied = aliases(wanted)
    missing = wanted.keys() - found.keys()
    missing = {n for n in missing if n not in tied or tied[n] not in found}
    missing -= {first for second, first in tied.items() if second in found}
    faults = [f"missing {n}" for n in sorted(missing)]
    faults += [f"unknown {n}" for n in sorted(found.keys() - wanted.keys())]
    faults += _misfits(wanted, found)
    if faults:
        raise X2IError(f"{path}: not weights of this model: {'; '.join(faults[:5])} ({len(faults)} in all)")
    copy_into(wanted, path)


def fill(state: Mapping[str, Tensor], path: Path) -> None:
    """Read tensors over those of the same names, in place; others of the file are left out.

    Raises:
        X2IError: not a safetensors file, or tensors are missing or of another shape. Nothing is changed then.
    """
    found = shapes(path)
    faults = [f"missing {n}" for n in sorted(state.keys() - found.keys())] + _misfits(state, found)
    if faults:
        raise X2IError(f"{path}: does not hold these weights: {'; '.join(faults[:5])} ({len(faults)} in all)")
    copy_into(state, path)


def load_part(model: nn.Module, path: Path, names: Mapping[str, str]) -> None:
    """Read some of a model's weights from a checkpoint with other names or other parts besides.

    Args:
        model: into which to read.
        path: as `load`.
        names: name in the model -> name in the file.

    Raises:
        X2IError: as `load`; tensors of the file that are not asked for are left out.
    """
    wanted = model.state_dict()
    fill({theirs: wanted[ours] for ours, theirs in names.items()}, path)


def prefixed(model: nn.Module, path: Path, prefixes: Mapping[str, str]) -> dict[str, str]:
    """Names of a model's tensors below some prefixes -> their names in a file that has other prefixes.

    Of tied tensors one is enough: which, the file says. To be given to `load_part`.
    """
    state, found = model.state_dict(), shapes(path)
    tied = aliases(state)
    out = {}
    for name in state:
        for ours, theirs in prefixes.items():
            if name.startswith(ours):
                out[name] = theirs + name.removeprefix(ours)
    either = [{second, first} for second, first in tied.items() if second in out and first in out]
    absent = {n for pair in either for n in pair if out[n] not in found and any(out[m] in found for m in pair - {n})}
    return {n: t for n, t in out.items() if n not in absent}


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors, from the headers alone. Raises X2IError."""
    out: dict[str, tuple[int, ...]] = {}
    for file in files_of(path):
        with _opened(file) as tensors:
            out |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return out


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file or of shards. Raises X2IError."""
    return dict(tensors_of(path))


def tensors_of(path: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors one by one. Raises X2IError."""
    for file in files_of(path):
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                yield name, tensors.get_tensor(name)


@torch.no_grad()
def copy_into(state: Mapping[str, Tensor], path: Path) -> None:
    """Copy the tensors of a file over those of the same names, in place; other names are passed over.

    Of a tensor that is divided among ranks each reads its part alone.
    """
    for file in files_of(path):
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                if name in state:
                    _read_into(state[name], tensors, name)


def _read_into(target: Tensor, tensors: safe_open, name: str) -> None:
    if not isinstance(target, DTensor) or not target.ndim:
        assign(target, tensors.get_tensor(name))
        return
    sizes, offsets = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    if all(sizes):
        box = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        target.to_local().copy_(tensors.get_slice(name)[box])


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copy all of a tensor into one that may be divided among ranks: each takes its part, and nobody sends anything."""
    if isinstance(target, DTensor):
        value = value.to(target.device, target.dtype)
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


def files_of(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises X2IError if there are none, or the index names one that is not there."""
    if not path.is_dir():
        return [path]
    index = path / f"{FILE}.index.json"
    if (path / FILE).is_file() or not index.is_file():
        return [path / FILE]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise X2IError(f"{index}: not an index of shards ({error})") from None
    if absent := [n for n in names if not (path / n).is_file()]:
        raise X2IError(f"{index}: names {absent[0]}, which is not there")
    return [path / n for n in names]


def aliases(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Tied tensors: the later name -> the first one with the same memory."""
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    out = {}
    for name, tensor in state.items():
        if tensor.is_meta or not tensor.numel():
            continue
        memory = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).data_ptr()
        place = (memory, tuple(tensor.shape))
        if not memory:  # divided, and nothing of it is here
            continue
        if place in first:
            out[name] = first[place]
        first.setdefault(place, name)
    return out


def tied_names(model: nn.Module) -> dict[str, str]:
    """Parameters with two names: the later name -> the first. On the meta device, too, where `aliases` sees none."""
    first: dict[int, str] = {}
    out = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            out[name] = first[id(parameter)]
        first.setdefault(id(parameter), name)
    return out


def _misfits(wanted: Mapping[str, Tensor], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    both = sorted(wanted.keys() & found.keys())
    return [
        f"{n} is {list(found[n])}, expected {list(wanted[n].shape)}" for n in both if found[n] != tuple(wanted[n].shape)
    ]


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(str(file), framework="pt")
    except (OSError, SafetensorError) as error:
        raise X2IError(f"{file}: cannot be read as safetensors ({error})") from None
