"""One safetensors file that all ranks write together, each its part: a storage of torch.distributed.checkpoint.

The layout of safetensors is known before a byte of a tensor is: eight bytes with the header's length, the header in JSON
(names, types, shapes, where each tensor's bytes begin and end), then the tensors one after the other, row by row. So
rank 0 writes the header, and every rank the rows that it holds at their place. Nothing is gathered, nothing is written
twice, and what comes out is the file that one rank alone would have written.

torch's own HuggingFaceStorageWriter (2.15) writes a file per rank and rank 0 puts them together: all bytes go to disk
twice, each rank makes one string of its part first, whole numbers are refused, and tensors without dimensions come out
as zeros.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from x2i.base.errors import X2IError

#: Types as safetensors calls them, in its order: a file has the last of them first, so that all are aligned.
TYPES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_ORDER = {dtype: place for place, dtype in enumerate(TYPES)}


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its type, its shape, the byte at which it begins (from the end of the header)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def end(self) -> int:
        """The byte after its last."""
        return self.begin + math.prod(self.shape) * self.dtype.itemsize


def entries(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Entry]:
    """Where each tensor lies, by its name, in the file's order.

    Raises:
        X2IError: safetensors has no such type.
    """
    if odd := [name for name, (dtype, _) in tensors.items() if dtype not in TYPES]:
        raise X2IError(f"{odd[0]}: safetensors has no type for {tensors[odd[0]][0]}")
    out, begin = {}, 0
    for name in sorted(tensors, key=lambda n: (-_ORDER[tensors[n][0]], n)):
        out[name] = Entry(*tensors[name], begin)
        begin = out[name].end
    return out


def header(laid: dict[str, Entry]) -> bytes:
    """The bytes before the tensors', as safetensors writes them: aligned to eight."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, entry in laid.items():
        content[name] = {
            "dtype": TYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def runs(shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where a box of a tensor lies in it, piece by piece: the first number of each, and how many follow each other.

    A box of whole rows, as FSDP divides tensors, is one piece.
    """
    if not math.prod(sizes):
        return
    last = len(shape)
    while last and sizes[last - 1] == shape[last - 1]:
        last -= 1
    strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    count = math.prod(sizes[max(last - 1, 0) :])
    first = sum(o * s for o, s in zip(offsets, strides, strict=True))
    for at in product(*(range(n) for n in sizes[: max(last - 1, 0)])):
        yield first + sum(i * s for i, s in zip(at, strides, strict=False)), count


class OneFile(StorageWriter):
    """Writes a flat state of tensors, divided or not, into one file, which every rank must be able to open."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one save to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is to be set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Each rank writes what it holds."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Of rank 0: lay the file out, write its header, and tell all where each tensor begins."""
        found = {item.index.fqn: _described(item) for plan in plans for item in plan.items}
        laid = entries(found)
        head = header(laid)
        with self._path.open("wb") as file:
            file.write(head)
            file.truncate(len(head) + max((entry.end for entry in laid.values()), default=0))
        begins = {name: len(head) + entry.begin for name, entry in laid.items()}
        return [replace(plan, storage_data=begins) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's parts at their places, and flush them to disk."""
        done = []
        with self._path.open("r+b") as file:
            for item in plan.items:
                data = planner.resolve_data(item)
                assert isinstance(data, Tensor) and item.tensor_data is not None
                chunk, flat = item.tensor_data.chunk, data.contiguous().reshape(-1)
                begin, at = plan.storage_data[item.index.fqn], 0
                for first, count in runs(item.tensor_data.size, chunk.offsets, chunk.sizes):
                    file.seek(begin + first * data.element_size())
                    file.write(memoryview(flat[at : at + count].view(torch.uint8).numpy()))
                    at += count
                done.append(WriteResult(item.index, data.numel() * data.element_size(), self._path.name))
            file.flush()
            os.fsync(file.fileno())
        out: Future[list[WriteResult]] = Future()
        out.set_result(done)
        return out

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The header has said all."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """A path."""
        return isinstance(checkpoint_id, Path)


def _described(item: WriteItem) -> tuple[torch.dtype, tuple[int, ...]]:
    assert item.tensor_data is not None, item.index.fqn  # of what is no tensor nothing is written here
    return item.tensor_data.properties.dtype, tuple(item.tensor_data.size)
