"""Tar shards whose bytes depend on their samples alone: fixed headers, USTAR, no times, no owners.

Readable by `tar`, `tarfile` and `webdataset`. The writer knows every offset, so the manifest can
send a reader straight to a member without scanning the shard.
"""

import hashlib
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

BLOCK = tarfile.BLOCKSIZE


def padded(size: int) -> int:
    """Bytes that `size` bytes of content take up in a tar (rounded up to 512)."""
    return -(-size // BLOCK) * BLOCK


def entry_size(members: Iterable[int]) -> int:
    """Bytes that members of these content sizes take up in a tar, headers included."""
    return sum(BLOCK + padded(size) for size in members)


def header(name: str, size: int) -> bytes:
    """The 512-byte USTAR header: mode 0644, owner 0, time 0. Raises ValueError if `name` does not fit."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a sample: `offset` is where its content begins in the shard, `size` its length in bytes."""

    suffix: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one sample lies in its shard: the range [offset, offset + size), its SHA-256, its members."""

    offset: int
    size: int
    sha256: str
    members: tuple[Member, ...]


class ShardWriter:
    """Append samples to one tar file; `close` ends the archive. Not atomic by itself: wrap the path.

    After `close`, `size` is the file's length in bytes and `sha256` its digest (64 hex digits).
    """

    def __init__(self, path: Path) -> None:
        self.size = 0
        self.samples = 0
        self.sha256 = ""
        self._hash = hashlib.sha256()
        self._file: IO[bytes] = path.open("wb")

    def write(self, key: str, members: Iterable[tuple[str, bytes]]) -> Entry:
        """Write one sample's members as `key.suffix`, one after the other."""
        start, placed, parts = self.size, [], []
        position = start
        for suffix, data in members:
            parts += [header(f"{key}.{suffix}", len(data)), data, bytes(padded(len(data)) - len(data))]
            placed.append(Member(suffix, position + BLOCK, len(data)))
            position += BLOCK + padded(len(data))
        blob = b"".join(parts)
        self._emit(blob)
        self.samples += 1
        return Entry(start, len(blob), hashlib.sha256(blob).hexdigest(), tuple(placed))

    def close(self) -> None:
        """Write the end of the archive (two zero blocks, padded to a tar record) and close the file."""
        end = self.size + 2 * BLOCK
        self._emit(bytes(-(-end // tarfile.RECORDSIZE) * tarfile.RECORDSIZE - self.size))
        self._file.close()
        self.sha256 = self._hash.hexdigest()

    def _emit(self, blob: bytes) -> None:
        self._file.write(blob)
        self._hash.update(blob)
        self.size += len(blob)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
