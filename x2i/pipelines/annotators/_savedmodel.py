"""TensorFlow's SavedModel, as far as small published heads need it, without TensorFlow.

A SavedModel keeps its variables in a "tensor bundle": an index, which is a sorted-string table as LevelDB has them
(https://github.com/google/leveldb/blob/main/doc/table_format.md), and one file of raw little-endian arrays.
The graph, with the constants from which lookup tables are filled, is in `saved_model.pb`, a protocol buffer.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

#: TensorFlow's numbers for types (tensorflow/core/framework/types.proto).
DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8"}

MAGIC = 0xDB4775248B80FB57


def variables(index: bytes, data: bytes) -> dict[str, np.ndarray]:
    """The numeric variables of a tensor bundle by name.

    Args:
        index: the file `variables.index`. data: `variables.data-00000-of-00001`.

    Raises:
        ValueError: not a bundle, or compressed, or its data file is cut off.
    """
    if len(index) < 48 or struct.unpack("<Q", index[-8:])[0] != MAGIC:
        raise ValueError("not a tensor bundle's index")
    at = 0
    handle = []
    for _ in range(4):  # offset and size of the meta index, then of the index of blocks
        value, at = _varint(index[-48:], at)
        handle.append(value)
    out = {}
    for _, block in _entries(index, handle[2], handle[3]):
        offset, after = _varint(block, 0)
        for key, message in _entries(index, offset, _varint(block, after)[0]):
            entry = dict(fields(message))
            dtype = DTYPES.get(int(entry.get(1, 0)))
            if not key or dtype is None:
                continue  # the bundle's own header; strings
            shape = [int(dict(_messages(d)).get(1, 0)) for n, d in _messages(entry.get(2, b"")) if n == 2]
            start, size = int(entry.get(4, 0)), int(entry.get(5, 0))
            raw = data[start : start + size]
            if len(raw) != size:
                raise ValueError(f"the bundle's data file ends before {key.decode()}")
            out[key.decode()] = np.frombuffer(raw, dtype).reshape(shape)
    return out


def lookups(saved_model: bytes) -> list[dict[str, int]]:
    """The string lookup tables of the serving function, in the order in which it takes them."""
    meta = next(v for n, v in fields(saved_model) if n == 2)
    graph = next(v for n, v in fields(bytes(meta)) if n == 2)
    nodes = [_node(bytes(v)) for n, v in fields(bytes(graph)) if n == 1]
    constants = {name: value for name, _, _, value in nodes if value is not None}
    tables = {}
    for _, _, inputs, _ in nodes:  # a table is filled by a call of (table, keys, values)
        if len(inputs) == 3 and inputs[1] in constants and inputs[2] in constants:
            words, ranks = _strings(constants[inputs[1]]), _integers(constants[inputs[2]])
            tables[inputs[0]] = dict(zip(words, ranks, strict=True))
    serving = next((i for _, _, i, _ in nodes if i and i[0].startswith("serving_default")), [])
    return [tables[name] for name in serving if name in tables]


def fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The fields of a protocol buffer message as (number, value): an int, or bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"protocol buffer with wire type {kind}")
        yield tag >> 3, message[at : at + size]
        at += size


def _messages(value: bytes | int) -> Iterator[tuple[int, bytes | int]]:
    return fields(bytes(value))


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _entries(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of one block. A key is stored as what differs from the one before it."""
    if table[offset + size]:
        raise ValueError("a compressed block in the tensor bundle's index")
    block = table[offset : offset + size]
    restarts = struct.unpack("<I", block[-4:])[0]
    at, key = 0, b""
    while at < size - 4 - 4 * restarts:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + own]
        at += own
        yield key, block[at : at + length]
        at += length


def _node(message: bytes) -> tuple[str, str, list[str], bytes | None]:
    """A graph node: name, operation, inputs, and the tensor of a constant."""
    name, operation, inputs, value = "", "", [], None
    for number, field in fields(message):
        if number == 1:
            name = bytes(field).decode()
        elif number == 2:
            operation = bytes(field).decode()
        elif number == 3:
            inputs.append(bytes(field).decode())
        elif number == 5 and operation == "Const":
            attribute = dict(fields(bytes(field)))
            if attribute.get(1) == b"value":
                value = bytes(dict(fields(bytes(attribute[2]))).get(8, b""))
    return name, operation, inputs, value


def _strings(tensor: bytes) -> list[str]:
    return [bytes(v).decode() for n, v in fields(tensor) if n == 8]


def _integers(tensor: bytes) -> list[int]:
    """A constant of 64-bit integers."""
    content = b"".join(bytes(v) for n, v in fields(tensor) if n == 4)
    return [int(v) for v in np.frombuffer(content, "<i8")]
