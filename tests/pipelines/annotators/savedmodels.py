"""A writer of Keras SavedModels as far as `clip_nsfw` reads them, after TensorFlow's formats; for tests."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

_NUMBERS = {np.dtype("<f4"): 1, np.dtype("<i8"): 9}


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | bytes | str) -> bytes:
    """One field of a protocol buffer message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def table(blocks: list[list[tuple[bytes, bytes]]]) -> bytes:
    """A sorted-string table with its keys' shared beginnings left out, uncompressed."""
    out, index = b"", []
    for entries in blocks:
        block = _block(entries)
        index.append((entries[-1][0], varint(len(out)) + varint(len(block))))
        out += block + b"\0" * 5  # no compression, and a checksum that nobody reads
    offset, block = len(out), _block(index)
    out += block + b"\0" * 5
    handles = varint(0) + varint(0) + varint(offset) + varint(len(block))
    return out + handles.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def _block(entries: list[tuple[bytes, bytes]]) -> bytes:
    out, last = b"", b""
    for key, value in entries:
        shared = next((i for i, (a, b) in enumerate(zip(key, last, strict=False)) if a != b), min(len(key), len(last)))
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    return out + struct.pack("<II", 0, 1)


def bundle(arrays: dict[str, np.ndarray]) -> tuple[bytes, bytes]:
    """A tensor bundle's index and data, in two blocks."""
    data, entries = b"", [(b"", field(1, 1))]
    for name in sorted(arrays):
        array = arrays[name]
        shape = b"".join(field(2, field(1, n)) for n in array.shape)
        entry = field(1, _NUMBERS[array.dtype]) + field(2, shape) + field(4, len(data)) + field(5, array.nbytes)
        entries.append((name.encode(), entry))
        data += np.ascontiguousarray(array).tobytes()
    return table([entries[:3], entries[3:]]), data


def graph(vocabularies: list[list[str]]) -> bytes:
    """A saved_model.pb whose serving function takes lookup tables in this order; their nodes are in another."""
    nodes, calls = [], []
    for i, words in reversed(list(enumerate(vocabularies))):
        ranks = np.arange(1, len(words) + 1, dtype="<i8").tobytes()
        nodes.append(_constant(f"keys_{i}", field(1, 7) + b"".join(field(8, w) for w in words)))
        nodes.append(_constant(f"ranks_{i}", field(1, 9) + field(4, ranks)))
        calls.append(_node(f"fill_{i}", [f"table_{i}", f"keys_{i}", f"ranks_{i}"]))
    serving = ["serving_default_input_1"]
    for i in range(len(vocabularies)):
        serving += [f"table_{i}", f"missing_{i}"]
    nodes += [*calls, _node("serve", [*serving, "weights"])]
    return field(1, 1) + field(2, field(2, b"".join(field(1, n) for n in nodes)))


def _node(name: str, inputs: list[str]) -> bytes:
    return field(1, name) + field(2, "StatefulPartitionedCall") + b"".join(field(3, i) for i in inputs)


def _constant(name: str, tensor: bytes) -> bytes:
    value = field(1, "value") + field(2, field(8, tensor))
    return field(1, name) + field(2, "Const") + field(5, field(1, "dtype") + field(2, field(6, 1))) + field(5, value)


def save(folder: Path, arrays: dict[str, np.ndarray], vocabularies: dict[int, list[str]]) -> Path:
    """A SavedModel's folder: variables by Keras' names, and the words of each column's lookup table by rank."""
    variables = {f"{name}/.ATTRIBUTES/VARIABLE_VALUE": array for name, array in arrays.items()}
    for column in vocabularies:
        name = f"layer_with_weights-0/encoding_layers/{column}/token_counts/.ATTRIBUTES/table-values"
        variables[name] = np.zeros(0, "<i8")
    index, data = bundle(variables)
    (folder / "variables").mkdir(parents=True)
    (folder / "variables/variables.index").write_bytes(index)
    (folder / "variables/variables.data-00000-of-00001").write_bytes(data)
    (folder / "saved_model.pb").write_bytes(graph([vocabularies[c] for c in sorted(vocabularies)]))
    return folder
