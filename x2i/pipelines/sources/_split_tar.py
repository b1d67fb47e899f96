"""Archives as datasets are published in: `images.tar.gz`, or cut by `split` into `images.tar.gz.aa`, `.ab` …

Parts are read one after another as one file. Where one is missing, what comes before it is used.
"""

from __future__ import annotations

import bisect
import functools
import glob
import io
import itertools
import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from x2i.base.seeds import digest
from x2i.pipelines.sources._files import File, Root, why
from x2i.pipelines.sources._tar import Damaged, Member, TarReader
from x2i.pipelines.sources.base import Problem

#: Where archives are looked for below the folder that the records' paths start from.
PLACES = ("*.t*", "*/*.t*", "*/*/*.t*")

_NAME = re.compile(
    r"(?i)(?P<whole>.+?(\.tar\.gz|\.tgz|\.tar\.bz2|\.tar\.xz|\.tar))"
    r"(\.(part-?)?(?P<part>(?!gz|xz|bz2|zst|lz4|br|idx|txt|md5)([a-z]{2,3}|\d{2,4})))?"
)


@dataclass
class Archive:
    """A tar, whole or in parts. `folder` and `stem` are those of its name: `pix2pix`, `images`."""

    name: str
    parts: dict[str, File] = field(default_factory=dict)  # by suffix; a whole one has the suffix ""

    @property
    def folder(self) -> str:
        """The folder in which it lies, and in which its publishers unpack it."""
        return posixpath.dirname(self.name)

    @property
    def stem(self) -> str:
        """Its name without endings."""
        return posixpath.basename(self.name).split(".")[0]

    @property
    def size(self) -> int:
        """Bytes, as far as they are known."""
        return sum(f.size or 0 for f in self.parts.values())

    def gap(self) -> tuple[int, Problem] | None:
        """After how many parts one is missing, and which. A last part that is missing shows only in the content."""
        suffixes = sorted(self.parts)
        if suffixes == [""]:
            return None
        expected = _first(suffixes[0])
        for number, suffix in enumerate(suffixes):
            if suffix != expected:
                return number, Problem("missing_part", f"{self.name}: the part '{expected}' is not there")
            expected = _next(suffix)
        return None

    def identity(self) -> str:
        """Digest of what changes with the content."""
        return digest("archive/1", self.name, [list(self.parts[s]) for s in sorted(self.parts)])


def _first(suffix: str) -> str:
    """The suffix with which parts begin: aa, 00, or 01 where that is the first that is there."""
    return "a" * len(suffix) if suffix.isalpha() else suffix if int(suffix) <= 1 else "0" * len(suffix)


def _next(suffix: str) -> str:
    if suffix.isdigit():
        return str(int(suffix) + 1).zfill(len(suffix))
    stem, last = suffix[:-1], suffix[-1]
    return (_next(stem) + "a" if stem else "") if last == "z" else stem + chr(ord(last) + 1)


def archives(root: Root, places: Iterable[str]) -> list[Archive]:
    """The archives that patterns below a root match, in order of their names. Raises OSError."""
    found: dict[str, Archive] = {}
    for file in itertools.chain.from_iterable(_glob(root, p) for p in places):
        if match := _NAME.fullmatch(file.path):
            archive = found.setdefault(match["whole"], Archive(match["whole"]))
            archive.parts[(match["part"] or "").lower()] = file
    for archive in found.values():
        if len(archive.parts) > 1:
            archive.parts.pop("", None)  # the parts, put together by hand, lie beside them: the parts are as good
    return [found[name] for name in sorted(found)]


def _glob(root: Root, pattern: str) -> list[File]:
    if not root.local:
        return root.glob(pattern)
    # Unpacked pictures may lie there by the million: only what may be an archive is looked at closer than its name.
    names = glob.glob(pattern, root_dir=root.path, recursive=True)
    return [root.stat(n) for n in names if _NAME.fullmatch(n)]


class _Joined(io.RawIOBase):
    """Parts of known sizes, one after another, as one file."""

    def __init__(self, root: Root, parts: list[File]) -> None:
        self._root, self._parts = root, [p.path for p in parts]
        self._ends = list(itertools.accumulate(p.size if p.size is not None else _size(root, p.path) for p in parts))
        self._at, self._number = 0, -1
        self._file: IO[bytes] | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._ends[-1])[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        number = bisect.bisect_right(self._ends, self._at)
        if number >= len(self._parts):
            return 0
        if number != self._number or self._file is None:
            self._drop()
            self._file, self._number = self._root.open(self._parts[number]), number
        begin = self._ends[number - 1] if number else 0
        self._file.seek(self._at - begin)
        data = self._file.read(min(len(buffer), self._ends[number] - self._at))
        if not data:
            raise OSError(f"{self._parts[number]} has become shorter")
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()

    def _drop(self) -> None:
        if self._file:
            self._file.close()
        self._file = None


def _size(root: Root, path: str) -> int:
    size = root.stat(path).size
    if size is None:
        raise OSError(f"{path}: its size is not known")
    return size


class Walk:
    """The members of an archive in order, as far as it is sound; `fault` says after the walk what is wrong with it.

    `first` is the first member, and where it is.
    """

    def __init__(self, root: Root, archive: Archive) -> None:
        self._root, self._archive = root, archive
        self._gap = archive.gap()
        self.fault = self._gap[1] if self._gap else None
        self.first: str | None = None

    def __iter__(self) -> Iterator[Member]:
        suffixes = sorted(self._archive.parts)[: self._gap[0] if self._gap else None]
        ended: Problem | None = None
        if suffixes:
            try:
                joined = _Joined(self._root, [self._archive.parts[s] for s in suffixes])
                with io.BufferedReader(joined, 2**20) as file:
                    tar = TarReader(file)
                    for member in tar:
                        name = posixpath.normpath(member.name)
                        self.first = self.first or f"{name} in {self._archive.name}"
                        yield Member(name, functools.partial(self._load, member))
                    ended = tar.ended
            except Damaged as damaged:
                ended = damaged.problem
            except OSError as error:
                ended = Problem("unreadable", why(error))
        if ended:
            self.fault = self._told(ended)

    def _load(self, member: Member) -> bytes:
        try:
            return member.load()
        except Damaged as damaged:
            raise Damaged(self._told(damaged.problem)) from None

    def _told(self, problem: Problem) -> Problem:
        """A problem of the archive, with its name; that it is cut means, of a split one, that a part is missing."""
        last = max(self._archive.parts)
        if problem.reason == "truncated_tar" and self._gap:
            return self._gap[1]
        if problem.reason == "truncated_tar" and last:
            return Problem("missing_part", f"{self._archive.name}: what follows the part '{last}' is not there")
        return Problem(problem.reason, f"{self._archive.name}: {problem.detail}")
