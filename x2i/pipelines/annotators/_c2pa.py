"""Content credentials (C2PA 2.1) as far as rights go: what was made by a model, and what training may not use.

A store of manifests is a tree of JUMBF boxes (ISO 19566-5) whose assertions are CBOR (RFC 8949) or JSON. Signatures
are not checked: a mark that says no is heeded whoever wrote it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

#: Boxes in boxes, and values in values, that are entered; values of one assertion that are read.
_DEPTH, _VALUES = 16, 20_000

#: Boxes beside each other that are looked at.
_BOXES = 1000


def assertions(store: bytes) -> Iterator[tuple[str, Any]]:
    """The assertions of all manifests in a store: label and content. What is damaged is passed over."""
    yield from _assertions(store, "", 0)


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The boxes of an ISO file (ISO 14496-12) beside each other: kind and content, as far as they are sound."""
    at = 0
    for _ in range(_BOXES):
        if len(data) < at + 8:
            return
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        head = 8
        if size == 1 and len(data) >= at + 16:
            (size,), head = struct.unpack(">Q", data[at + 8 : at + 16]), 16
        size = size or len(data) - at
        if size < head:
            return
        yield kind, data[at + head : at + size]
        at += size


def _assertions(data: bytes, label: str, depth: int) -> Iterator[tuple[str, Any]]:
    for kind, body in boxes(data):
        if kind == b"jumb" and depth < _DEPTH:
            yield from _assertions(body, _label(body), depth + 1)
        elif kind in (b"cbor", b"json") and label:
            try:
                content = _Cbor(body).value() if kind == b"cbor" else json.loads(body)
            except (ValueError, RecursionError, struct.error, IndexError, TypeError):
                content = None
            yield label, content


def _label(body: bytes) -> str:
    """The label that a superbox's description gives it: after a size, a kind, a type of 16 bytes and toggles."""
    if body[4:8] != b"jumd" or len(body) < 26 or not body[24] & 2:
        return ""
    return body[25 : body.find(b"\0", 25)].decode("utf-8", "replace")


class _Cbor:
    """A decoder of one value: what C2PA uses of CBOR, definite and indefinite lengths, tags passed over."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at, self._left = data, 0, _VALUES

    def value(self, depth: int = 0) -> Any:
        """The next value. Raises ValueError, IndexError or struct.error if it is damaged, or too deep or too large."""
        self._left -= 1
        if depth > _DEPTH * 2 or self._left < 0:
            raise ValueError("too many values")
        first = self._data[self._at]
        self._at += 1
        major, minor = first >> 5, first & 31
        if major == 7:
            return self._simple(minor)
        length = self._length(minor)
        if major in (0, 1):
            return length if major == 0 else -1 - (length or 0)
        if major in (2, 3):
            parts = [self._take(length)] if length is not None else list(self._items(None, depth))
            return parts[0] if len(parts) == 1 and major == 2 else self._text(parts)
        if major == 4:
            return list(self._items(length, depth))
        if major == 5:
            flat = list(self._items(None if length is None else 2 * length, depth))
            return {k: v for k, v in zip(flat[::2], flat[1::2], strict=False) if isinstance(k, str | int)}
        return self.value(depth + 1)  # a tag

    def _text(self, parts: list[Any]) -> str:
        return "".join(p.decode("utf-8", "replace") if isinstance(p, bytes) else str(p) for p in parts)

    def _items(self, count: int | None, depth: int) -> Iterator[Any]:
        if count is not None and count > self._left:
            raise ValueError("too many values")
        done = 0
        while count is None or done < count:
            if count is None and self._data[self._at] == 0xFF:
                self._at += 1
                return
            yield self.value(depth + 1)
            done += 1

    def _length(self, minor: int) -> int | None:
        if minor < 24:
            return minor
        if minor == 31:
            return None
        return int.from_bytes(self._take(1 << (minor - 24)), "big") if minor < 28 else 0

    def _take(self, count: int) -> bytes:
        out = self._data[self._at : self._at + count]
        if len(out) < count:
            raise ValueError("it ends within a value")
        self._at += count
        return out

    def _simple(self, minor: int) -> Any:
        if minor in (24, 25, 26, 27):
            data = self._take(1 << (minor - 24))
            return None if minor == 24 else struct.unpack(">" + "xefd"[minor - 24], data)[0]
        return {20: False, 21: True}.get(minor)
