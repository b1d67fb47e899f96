"""What a recipe's `path` stands for, where it means files: one, a list, `{000..099}`, `*`, a folder, a URL."""

from __future__ import annotations

import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from braceexpand import braceexpand

from x2i.base.errors import RecipeError
from x2i.pipelines.sources._files import File, Root, extension, why
from x2i.pipelines.sources._text import jsonable


@dataclass(frozen=True)
class Found:
    """Files below their common root, sorted by path; `others` lay beside them in folders that were searched.

    The root is told by the recipe (up to the first pattern character), not by what is there today, so
    that locations stay what they are when files come and go.
    """

    root: Root
    files: list[File]
    others: list[File]

    def ignored(self) -> Counter[str]:
        """How many others there are, by extension."""
        return Counter(extension(f.path) or "(none)" for f in self.others)


@dataclass(frozen=True)
class _Place:
    """A path in parts: `s3://` + `bucket/a` + ``, or `zip://` + `inner` + `::a.zip`; a local one has no protocol."""

    protocol: str
    path: str
    tail: str

    @classmethod
    def parse(cls, text: str) -> _Place:
        match = re.fullmatch(r"(?s)((?:\w+::)*(?:\w[\w+.-]*://)?)(.*?)((?:::.*)?)", text)
        protocol, path, tail = match.groups()  # type: ignore[union-attr]
        if protocol in ("", "file://", "local://"):
            return cls("", os.path.abspath(os.path.expanduser(path)), tail)
        return cls(protocol, path.rstrip("/"), tail)

    def __str__(self) -> str:
        return self.protocol + self.path + self.tail

    def pattern(self) -> re.Match[str] | None:
        """The first pattern character, if there is one. In a web address `?` begins the query."""
        return re.search(r"[*\[{]" if self.protocol.startswith("http") else r"[*?\[{]", self.path)

    def folder(self, endings: tuple[str, ...]) -> str:
        """The path of the folder that everything meant lies in."""
        if match := self.pattern():
            return posixpath.dirname(self.path[: match.start()])
        return self.path if self.is_folder(endings) else posixpath.dirname(self.path)

    def is_folder(self, endings: tuple[str, ...]) -> bool:
        """Whether a folder is meant: it is no pattern, has no file's ending, and is one."""
        return not self.pattern() and not self.path.lower().endswith(endings) and Root(str(self)).is_folder("")

    def expand(self) -> Iterator[_Place]:
        """One place for each of the alternatives in braces."""
        try:
            paths = list(braceexpand(self.path))
        except ValueError as error:
            raise RecipeError(f"{self}: {error}") from None
        for path in paths:
            yield _Place(self.protocol, path, self.tail)


def root_of(paths: str | list[str], endings: tuple[str, ...]) -> Root:
    """The root below which `find` finds: the folder that all the paths have in common. Raises RecipeError."""
    return _common(_parse(paths), endings)


def _parse(paths: str | list[str]) -> list[_Place]:
    given = [paths] if isinstance(paths, str) else paths
    if not given:
        raise RecipeError("path: an empty list; name at least one file, folder or pattern")
    places = [_Place.parse(p) for p in given]
    if len({(p.protocol, p.tail) for p in places}) > 1:
        raise RecipeError(f"path: {given[0]} and the others lie on different file systems; make a source of each")
    return places


def _common(places: list[_Place], endings: tuple[str, ...]) -> Root:
    base = posixpath.commonpath([p.folder(endings) for p in places])
    return Root(str(_Place(places[0].protocol, base, places[0].tail)))


def find(paths: str | list[str], endings: tuple[str, ...], what: str) -> Found:
    """Find the files; of folders and patterns, those whose names end in one of `endings`.

    Raises:
        RecipeError: one is not there, or nothing is found; `what` says in the message what was sought.
    """
    places = _parse(paths)
    root = _common(places, endings)
    chosen: dict[str, File] = {}
    others: dict[str, File] = {}
    for place in places:
        for one in place.expand():
            named, listed = _list(root, one, endings)
            others |= {f.path: f for f in listed}
            chosen |= {f.path: f for f in listed if f.path.lower().endswith(endings)}
            chosen |= {named.path: named} if named else {}
    if not chosen:
        raise RecipeError(f"{places[0]}: no {what} here; their names end in {', '.join(endings)}")
    for path in chosen:
        if path != jsonable(path):
            raise RecipeError(f"{path!a}: the file's name is not UTF-8; rename it")
    return Found(root, sorted(chosen.values()), sorted(f for p, f in others.items() if p not in chosen))


def _list(root: Root, place: _Place, endings: tuple[str, ...]) -> tuple[File | None, list[File]]:
    """The file that a place names outright, or the files that it matches or holds."""
    relative = posixpath.relpath(Root(str(place)).path or ".", root.path or ".")
    try:
        if place.pattern():
            return None, root.glob(relative)
        if place.is_folder(endings):
            files, faults = Root(str(place)).walk()
            for path, fault in faults.items():
                raise RecipeError(f"{place}: the folder {path} cannot be listed: {fault}")
            return None, [f._replace(path=posixpath.normpath(posixpath.join(relative, f.path))) for f in files]
        return root.stat(root.relative(root.path + "/" + relative)), []
    except FileNotFoundError:
        raise RecipeError(f"{place}: no such file or folder") from None
    except OSError as error:
        raise RecipeError(f"{place}: cannot be read: {why(error)}") from None
