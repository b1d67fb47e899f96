"""Pictures that records name, from plain files and from archives.

Nothing in a packed archive can be had without unpacking what comes before it. So there are two ways: each unit
unpacks what it needs, up to the last of it (right for archives of a few gigabytes); or every archive is unpacked
once, into a folder that stays (right for more, and as fast as plain files from then on).
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from x2i.base.files import write_text
from x2i.base.seeds import digest
from x2i.pipelines.sources._cells import checked
from x2i.pipelines.sources._files import Root
from x2i.pipelines.sources._pairs import Get
from x2i.pipelines.sources._split_tar import Archive, Walk
from x2i.pipelines.sources._tar import Damaged
from x2i.pipelines.sources.base import Problem

log = logging.getLogger(__name__)


def places(archive: Archive, path: str) -> Iterator[str]:
    """The members that a record's path may mean in an archive, the likeliest first.

    Archives are unpacked in their own folder, or in one of their own name; records' paths begin there, or above.
    """
    for inside in (path.removeprefix(archive.folder + "/"), path) if archive.folder else (path,):
        yield from (inside, inside.removeprefix(archive.stem + "/"), f"{archive.stem}/{inside}")


class Store:
    """Reads pictures below a root: plain files where there are any, members of archives for the rest.

    Args:
        found: the archives.
        unpack: the folder for unpacked archives; without it what is needed is unpacked for each call.
    """

    def __init__(self, root: Root, found: list[Archive], unpack: str | None = None) -> None:
        self.root, self.archives, self.unpack = root, found, unpack

    @contextmanager
    def reading(self, paths: Iterable[str]) -> Iterator[Get]:
        """Give a function that reads any of these paths (relative to the root), or says why it cannot be had."""
        with tempfile.TemporaryDirectory(prefix="x2i-") as folder:
            rest = [p for p in dict.fromkeys(paths) if not self._there(p)] if self.archives else []
            found = self._kept(rest) if self.unpack else self._members(rest, Path(folder))

            def get(path: str) -> bytes | Problem:
                file = found.get(path)
                if isinstance(file, Path):
                    return file.read_bytes() or Problem("empty_file", f"{path} has no bytes")
                if file is None or (file.reason == "missing_image" and not self.root.local):
                    return self._plain(path)
                return file

            yield get

    def _there(self, path: str) -> bool:
        """Whether a path is a plain file's for sure. (A remote store is not asked before the archives are.)"""
        return "://" in path or (self.root.local and os.path.isfile(self.root.at(path)))

    def _plain(self, path: str) -> bytes | Problem:
        return next(map(checked, self.root.read_many([path])))

    def _likely(self, path: str) -> tuple[list[Archive], list[Archive]]:
        """The archives that may hold a path: those with a name among its folders, and the others.

        These are the archives in its folders, and at the top; if it lies in no archive's folder, they are all.
        """
        near = [a for a in self.archives if not a.folder or path.startswith(a.folder + "/")]
        near = near if any(a.folder for a in near) else self.archives
        named = [a for a in near if f"/{a.stem}/" in f"/{path}"]
        return named, [a for a in near if a not in named]

    def _members(self, wanted: list[str], folder: Path) -> dict[str, Path | Problem]:
        """Put what archives hold into a folder. Returns each path's file, or its problem.

        Where a path is found does not depend on the other paths: first in the archives with its folders' names, then
        in the others, in order of their names.
        """
        found: dict[str, Path | Problem] = {}
        first: dict[str, str] = {}
        faults: dict[str, Problem] = {}
        likely = {p: self._likely(p) for p in wanted}
        for turn, archive in itertools.product((0, 1), self.archives):
            meant: dict[str, list[str]] = {}
            for path in (p for p, a in likely.items() if archive in a[turn]):
                for name in dict.fromkeys(places(archive, path)):
                    meant.setdefault(name, []).append(path)
            if not meant:
                continue
            walk = Walk(self.root, archive)
            for path, data in _taken(walk, meant):
                del likely[path]
                if isinstance(data, Problem):
                    found[path] = data
                else:
                    file = found[path] = folder / digest(path)
                    file.write_bytes(data)
            first |= {archive.name: walk.first} if walk.first else {}
            faults |= {archive.name: walk.fault} if walk.fault else {}
        for path, (named, others) in likely.items():
            names = [a.name for a in (*named, *others)]
            held = next((f"; {first[n]} is" for n in names if n in first), "")
            missing = Problem("missing_image", f"{path} is in no archive{held}")
            found[path] = next((faults[n] for n in names if n in faults), missing)
        return found

    def _kept(self, wanted: list[str]) -> dict[str, Path | Problem]:
        """See `_members`: the same from unpacked archives. Those that are needed and not yet unpacked are unpacked."""
        kept = Path(str(self.unpack)).expanduser()
        unpacked: dict[str, tuple[Path, Problem | None]] = {}
        found: dict[str, Path | Problem] = {}
        for path in wanted:
            faults: list[Problem] = []
            for archive in itertools.chain(*self._likely(path)):
                if archive.name not in unpacked:
                    unpacked[archive.name] = _unpacked(self.root, archive, kept)
                folder, fault = unpacked[archive.name]
                there = (folder / n for n in places(archive, path) if not _outside(n))
                if file := next((f for f in there if f.is_file()), None):
                    found[path] = file
                    break
                faults += [fault] if fault else []
            else:
                found[path] = next(iter(faults), Problem("missing_image", f"{path} is in no archive"))
        return found


def _taken(walk: Walk, meant: dict[str, list[str]]) -> Iterator[tuple[str, bytes | Problem]]:
    """Each path with its content, or why that cannot be read, up to the last that is there. `meant` is by member."""
    left = {p for paths in meant.values() for p in paths}
    for member in walk:
        paths = [p for p in meant.get(member.name, ()) if p in left]
        if not paths:
            continue
        try:
            data: bytes | Problem = member.load()
        except Damaged as damaged:
            data = Problem(damaged.problem.reason, f"{member.name}: {damaged.problem.detail}")
        yield from ((path, data) for path in paths)
        left.difference_update(paths)
        if not left:
            return


def _outside(name: str) -> bool:
    return name.startswith(("/", "../")) or name == ".."


def _unpacked(root: Root, archive: Archive, kept: Path) -> tuple[Path, Problem | None]:
    """Unpack an archive in a folder of its own unless that is done: the folder, and what is wrong with the archive.

    Workers wait for each other.
    """
    from filelock import FileLock

    folder = kept / f"{archive.name}-{archive.identity()[:12]}"  # another version does not mix with it
    done = folder.with_name(f"{folder.name}.json")
    if not done.exists():
        done.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(done.with_suffix(".lock")):
            if not done.exists():
                log.info("%s: unpacking", archive.name)
                fault = _unpack(root, archive, folder)
                if fault and fault.reason == "unreadable":
                    return folder, fault  # it may pass: the next unit tries again
                write_text(done, json.dumps(fault and [fault.reason, fault.detail]))
    said = json.loads(done.read_text())
    return folder, Problem(*said) if said else None


def _unpack(root: Root, archive: Archive, folder: Path) -> Problem | None:
    walk = Walk(root, archive)
    for member in walk:
        if _outside(member.name):
            continue
        try:
            data = member.load()
        except Damaged:
            continue  # it is then not there, and the archive's fault says so
        path = folder / member.name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")  # the archive's lock is held: nobody else writes it
        temporary.write_bytes(data)
        os.replace(temporary, path)
    return walk.fault
