"""From the members of a tar to rows: which members are one sample, and what its image, text and inputs are.

The rules stand at the top of `webdataset.py`.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from x2i.pipelines.sources import _x2i
from x2i.pipelines.sources._files import Root
from x2i.pipelines.sources._tar import Damaged, Member, TarReader, open_tar
from x2i.pipelines.sources._text import Malformed, describe, jsonable, parse_object
from x2i.pipelines.sources.base import IMAGE_EXTENSIONS, Problem, Row

#: A member's key (no dot in its last part) and its suffix (everything behind the first dot).
KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")
NUMBERED = re.compile(r"input_(\d+)\.\w+")
TEXTS = ("txt", "json")


@dataclass(frozen=True)
class Group:
    """Members of one key by suffix (in lower case), in the order of the tar."""

    key: str
    members: dict[str, Member]

    def image(self, name: str) -> Member | None:
        """The member of this file name, or of this name within the key, if there is one."""
        found = [m for s, m in self.members.items() if name in (posixpath.basename(m.name), m.name, s)]
        return found[0] if found else None


def _kind(suffix: str) -> str:
    """The last part of a suffix, in lower case."""
    return suffix.rpartition(".")[2].lower()


def groups(tar: TarReader) -> Iterator[Group]:
    """Runs of members with the same key. A suffix that comes again begins a new group."""
    group: Group | None = None
    for member in tar:
        match = KEY.fullmatch(member.name)
        if match is None:
            continue
        key, suffix = match[1], match[2].lower()
        if group is None or group.key != key or suffix in group.members:
            if group is not None:
                yield group
            group = Group(key, {})
        if not tar.seekable and _kind(suffix) in IMAGE_EXTENSIONS.union(TEXTS):
            member = _held(member)
        group.members[suffix] = member
    if group is not None:
        yield group


def _held(member: Member) -> Member:
    """A member of a stream, loaded now, since there is no way back to it."""
    try:
        data: bytes | Damaged = member.load()
    except Damaged as damaged:
        data = damaged

    def load() -> bytes:
        if isinstance(data, Damaged):
            raise data
        return data

    return Member(member.name, load)


class Rows:
    """Makes the rows of one tar: counts them, keeps their locations apart, loads those that are wanted.

    Attributes:
        keys: the last parts of the keys seen.
        cut: whether a row has said already that the tar is cut within it.
    """

    def __init__(self, path: str, text_key: str | None, only: Collection[int] | None) -> None:
        self.path = path
        self.keys: set[str] = set()
        self.cut = False
        self._text_key = text_key
        self._only = only
        self._next = 0
        self._locations: Counter[str] = Counter()

    def lost(self, location: str, problem: Problem, meta: dict[str, Any]) -> Iterator[Row]:
        """A row of which there is nothing but a problem."""
        row = self._row(location)
        row.problem, row.meta = problem, meta
        if self._wanted(row):
            yield row

    def read(self, root: Root) -> Iterator[tuple[str | None, Row]]:
        """All rows of the tar, below `root`, each with its key's last part; then what is wrong with the tar, with None."""
        try:
            file, tar = open_tar(root, self.path)
        except Damaged as damaged:
            yield from ((None, row) for row in self.lost(self.path, damaged.problem, {}))
            return
        with file:
            for group in groups(tar):
                key = posixpath.basename(group.key)
                yield from ((key, row) for row in self.of(group, broken=tar.ended is not None))
        if tar.ended and not self.cut:
            yield from ((None, row) for row in self.lost(f"{self.path}#(end)", tar.ended, {}))

    def of(self, group: Group, broken: bool) -> Iterator[Row]:
        """The wanted rows of one group. `broken`: the tar ended badly after it, perhaps within it: load it anyway."""
        self.keys.add(posixpath.basename(group.key))
        images = [s for s in group.members if _kind(s) in IMAGE_EXTENSIONS]
        texts = [s for s in group.members if _kind(s) in TEXTS]
        plain = [s for s in images if "." not in s]
        outputs = [s for s in images if s.startswith("output.")]
        if "json" in texts and not plain and (outputs or any(NUMBERED.fullmatch(s) for s in images)):
            yield from self._made(group, (outputs or ["json"])[0], self._x2i, broken)
            return
        if not images and texts:
            missing = Problem("missing_image", "a text with no image of that key")
            yield from self.lost(f"{self.path}#{group.members[texts[0]].name}", missing, {})
        for suffix in plain[:1] or images:
            yield from self._made(group, suffix, self._pair, broken)

    def _made(self, group: Group, suffix: str, fill: Callable[[Group, str, Row], None], broken: bool) -> Iterator[Row]:
        row = self._row(f"{self.path}#{group.members[suffix].name}")
        if not (broken or self._wanted(row)):
            return
        try:
            fill(group, suffix, row)
        except Malformed as error:
            row.problem = error.problem
        except Damaged as error:
            row.problem = error.problem
            self.cut |= broken
        if self._wanted(row):
            yield row

    def _row(self, location: str) -> Row:
        location = location.encode("utf-8", "backslashreplace").decode()
        self._locations[location] += 1
        times = self._locations[location]
        row = Row(self._next, f"{location}@{times}" if times > 1 else location, None)
        self._next += 1
        return row

    def _wanted(self, row: Row) -> bool:
        return self._only is None or row.index in self._only

    def _pair(self, group: Group, suffix: str, row: Row) -> None:
        """Fill in an image and its text. Raises Malformed, Damaged."""
        row.data = _image(group.members[suffix])
        part = suffix.rpartition(".")[0]
        found = {k: group.members.get(f"{part}.{k}") or group.members.get(k) for k in TEXTS}
        txt, described = (m.load() if m else None for m in found.values())
        others = [m.name for s, m in group.members.items() if s != suffix and _kind(s) in IMAGE_EXTENSIONS]
        if others and not part:
            row.meta["other_images"] = jsonable(others)
        row.text = describe(row.meta, self._text_key, txt, described)

    def _x2i(self, group: Group, suffix: str, row: Row) -> None:
        """Fill in an X2I sample. Raises Malformed, Damaged."""
        record = parse_object(group.members["json"].load())
        if "task_type" not in record or "instruction" not in record:  # only named like one
            images = [s for s in group.members if _kind(s) in IMAGE_EXTENSIONS]
            self._pair(group, suffix if suffix in images else images[0], row)
            return
        row.meta = record
        row.text = str(record["instruction"]).strip() or None
        numbered = sorted((int(n[1]), s) for s in group.members if (n := NUMBERED.fullmatch(s)))
        named = record.get("input_images")
        names = [str(n) for n in named] if isinstance(named, list) else [s for _, s in numbered]
        absent = [n for n in names if group.image(n) is None]
        inputs = [m for n in names if (m := group.image(n))]
        output = group.image(str(record["output_image"])) if "output_image" in record else group.members.get(suffix)
        if output is not None and _kind(output.name) in IMAGE_EXTENSIONS:
            row.data = _image(output)
        row.inputs = [(f"{self.path}#{m.name}", _image(m)) for m in inputs]
        row.problem = _x2i.check(record["task_type"], record["instruction"], len(names))
        if absent:
            row.problem = Problem("missing_image", f"input image {absent[0]} is not in the tar")
        elif row.data is None and not record.get("output_image"):
            row.problem = Problem("no_output_image", "a sample with no output image (an understanding task)")
        elif row.data is None:
            row.problem = Problem("missing_image", f"the output image {record['output_image']} is not in the tar")


def _image(member: Member) -> bytes:
    data = member.load()
    if not data:
        raise Damaged(Problem("empty_file", f"{member.name} has no bytes"))
    return data
