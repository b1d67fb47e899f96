"""Tars read to where they are sound, and what is wrong after that. Plain ones by seeking, packed ones as a stream."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

from x2i.pipelines.sources._files import Root, why
from x2i.pipelines.sources.base import Problem

#: What reading a broken tar may raise, compressed or not.
BROKEN = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)


class Damaged(Exception):
    """A member, or the archive from here on, cannot be read; `problem` says why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


@dataclass(frozen=True)
class Member:
    """A file in a tar. `load` reads it; it raises Damaged. In a stream, only before the next member is asked for."""

    name: str
    load: Callable[[], bytes]


class _Info(tarfile.TarInfo):
    """Notes with which header an archive ended: tarfile itself takes a damaged one for the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Info:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            archive.last_header = error  # type: ignore[attr-defined]
            raise


class TarReader:
    """The regular files of one tar (plain, gz, bz2 or xz), in order.

    Attributes:
        seekable: members can be loaded late, and those that are not loaded cost nothing.
        ended: after the iteration: None, or the problem that kept it from the archive's end.
    """

    def __init__(self, file: IO[bytes]) -> None:
        """Open. Raises Damaged: it is no tar."""
        self.ended: Problem | None = None
        self.seekable = True
        try:
            self._tar = tarfile.open(fileobj=file, mode="r:", tarinfo=_Info)  # noqa: SIM115 - open as long as the reader
            return
        except BROKEN:
            self.seekable = False  # compressed: seeking back would mean unpacking again
            file.seek(0)
        try:
            self._tar = tarfile.open(fileobj=file, mode="r|*", tarinfo=_Info)  # noqa: SIM115 - open as long as the reader
        except BROKEN as error:
            raise Damaged(Problem("not_a_tar", f"no tar, nor one in gzip, bzip2 or xz: {error}")) from None

    def __iter__(self) -> Iterator[Member]:
        while True:
            try:
                info = self._tar.next()
            except BROKEN as error:
                self.ended = _problem(error, self._tar.offset)
                return
            if info is None:
                self.ended = self._end()
                return
            if info.isreg() or info.islnk() or info.issym():
                yield Member(info.name.removeprefix("./"), lambda info=info: self._load(info))  # type: ignore[misc]

    def _load(self, info: tarfile.TarInfo) -> bytes:
        if not info.isreg():
            raise Damaged(Problem("unreadable", f"a link to {info.linkname}: store the file itself"))
        try:
            file = self._tar.extractfile(info)
            return file.read() if file else b""
        except BROKEN as error:
            raise Damaged(_problem(error, info.offset_data)) from None

    def _end(self) -> Problem | None:
        last = getattr(self._tar, "last_header", None)
        if last is None or isinstance(last, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
            return None
        at = f"at byte {self._tar.offset}"
        if isinstance(last, tarfile.InvalidHeaderError):  # type: ignore[attr-defined]
            return Problem("damaged_tar", f"no tar header {at}: what follows cannot be read")
        return Problem("truncated_tar", f"ends {at} without the mark that ends a tar: more may have followed")


def _problem(error: BaseException, offset: int) -> Problem:
    if isinstance(error, tarfile.ReadError | EOFError):
        return Problem("truncated_tar", f"ends within the member at byte {offset}")
    if isinstance(error, OSError) and error.errno is not None:
        return Problem("unreadable", why(error))
    return Problem("damaged_tar", f"cannot be unpacked beyond byte {offset}: {error}")


def open_tar(root: Root, path: str) -> tuple[IO[bytes], TarReader]:
    """Open a tar below a root. Raises Damaged: it cannot be read, or is no tar."""
    try:
        file = root.open(path)
    except OSError as error:
        raise Damaged(Problem("unreadable", why(error))) from None
    try:
        return file, TarReader(file)
    except Damaged:
        file.close()
        raise
