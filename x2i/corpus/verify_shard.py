"""One shard against its manifest rows, read with plain `tarfile`.

Nothing here uses the code that writes shards: an error there must not hide itself. Damage is a fault with
a place, never an exception; and each sample is looked at by its own byte range, so that one broken header
does not hide the samples behind it.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from dataclasses import dataclass, field
from typing import IO, Any

from x2i.corpus.faults import Faults
from x2i.corpus.verify_sample import STRANGE, SampleCheck

#: webdataset's rule: a sample's key ends at the first dot of the file's name.
NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")

#: A header as it must be: a plain file that anyone may read, of nobody, from no time.
HEADER = {"mtime": 0, "uid": 0, "gid": 0, "mode": 0o644, "uname": "", "gname": "", "type": tarfile.REGTYPE}

CHUNK = 1 << 20


@dataclass
class Shard:
    """What was found of one shard; `size` in bytes, `sha256` of the whole file."""

    name: str
    size: int
    sha256: str
    faults: Faults
    samples: int = 0
    images: int = 0


@dataclass
class _Group:
    """The neighbouring members of one key: they take up the range [start, end) of the shard."""

    key: str
    start: int
    end: int


@dataclass
class _Walk:
    """What a plain reader sees. `end`: where the last member ends; `broken`: there should have been more."""

    groups: list[_Group] = field(default_factory=list)
    end: int = 0
    broken: bool = False


def check_shard(
    file: IO[bytes],
    name: str,
    listed: dict[str, Any] | None,
    rows: list[dict[str, Any]] | None,
    decode: bool,
    limit: int,
) -> Shard:
    """Check one shard, and every sample in it.

    Args:
        file: the shard, seekable.
        listed: its entry in `corpus.json` (`size`, `samples`, `sha256`), if there is one.
        rows: its manifest rows in order; None if there is no readable manifest.
        decode: decode every image to the last pixel.
        limit: most faults to keep.

    Raises:
        OSError: the file cannot be read.
    """
    shard = Shard(name, *_hash(file), faults=Faults(limit))
    walk = _walk(file, shard)
    shard.samples = len(walk.groups)
    for what in ("size", "sha256", "samples") if listed is not None else ():
        found, told = getattr(shard, what), listed[what] if listed else None
        if found != told:
            shard.faults.add(f"shard_{what}", name, f"{what} is {found}, corpus.json says {told}")
    _compare(walk, rows, shard)
    inside = [r for r in rows or () if r["offset"] >= 0 and r["size"] >= 0 and r["offset"] + r["size"] <= shard.size]
    known = {row["key"] for row in rows or ()}
    ranges: list[tuple[str, int, int, dict[str, Any] | None]] = [(r["key"], r["offset"], r["size"], r) for r in inside]
    ranges += [(g.key, g.start, min(g.end, shard.size) - g.start, None) for g in walk.groups if g.key not in known]
    for key, offset, size, row in ranges:
        file.seek(offset)
        sample = SampleCheck(shard.faults, name, key, offset, file.read(size), row)
        sample.run(decode)
        shard.images += sample.images
    return shard


def _hash(file: IO[bytes]) -> tuple[int, str]:
    whole, size = hashlib.sha256(), 0
    while block := file.read(CHUNK):
        whole.update(block)
        size += len(block)
    return size, whole.hexdigest()


def _walk(file: IO[bytes], shard: Shard) -> _Walk:
    """Go through the tar as any reader does; note what stops it, and what its headers should not say."""
    walk = _Walk()
    odd: list[tuple[tarfile.TarInfo, str]] = []
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                walk.end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                _group(walk, info, shard)
                if wrong := _odd(info):
                    odd.append((info, wrong))
    except (tarfile.TarError, ValueError, OverflowError) as error:
        walk.broken = True
        shard.faults.add("tar_unreadable", shard.name, f"tarfile gives up: {error}", offset=min(walk.end, shard.size))
    if odd:
        first, wrong = odd[0]
        problem = f"{len(odd)} tar headers are not the fixed ones, the first of {first.name}: {wrong}"
        shard.faults.add("tar_header", shard.name, problem, offset=first.offset)
    if not walk.broken:
        _check_end(file, walk, shard)
    return walk


def _odd(info: tarfile.TarInfo) -> str:
    """What of a header is not as it must be, or nothing."""
    wrong = [f"{k} {getattr(info, k)!r} (not {v!r})" for k, v in HEADER.items() if getattr(info, k) != v]
    if info.offset_data - info.offset != tarfile.BLOCKSIZE:
        wrong.append("an extended header")
    return ", ".join(wrong)


def _group(walk: _Walk, info: tarfile.TarInfo, shard: Shard) -> None:
    match = NAME.match(info.name)
    if match is None:
        shard.faults.add("member_name", shard.name, f"{info.name!r} is not KEY.suffix", offset=info.offset)
        return
    if not walk.groups or walk.groups[-1].key != match[1]:
        walk.groups.append(_Group(match[1], info.offset, walk.end))
    walk.groups[-1].end = walk.end


def _check_end(file: IO[bytes], walk: _Walk, shard: Shard) -> None:
    """A tar ends in zeros, two blocks at least. Other bytes there mean that a header is damaged."""
    file.seek(walk.end)
    zeros = 0
    while block := file.read(CHUNK):
        if len(bare := block.lstrip(b"\0")):
            at = walk.end + zeros + len(block) - len(bare)
            problem = f"a reader takes this for the end, but there are bytes at {at:,}: the header here is damaged"
            shard.faults.add("tar_unreadable", shard.name, problem, offset=walk.end)
            walk.broken = True
            return
        zeros += len(block)
    if zeros < 2 * tarfile.BLOCKSIZE:
        problem = "the tar is cut off: it does not end in two blocks of zeros"
        shard.faults.add("tar_cut", shard.name, problem, offset=shard.size)
        walk.broken = True


def _compare(walk: _Walk, rows: list[dict[str, Any]] | None, shard: Shard) -> None:
    """The tar's samples must be the manifest's, in its order, each in one piece."""
    told = None if rows is None else {r["key"] for r in rows}
    seen: set[str] = set()
    for group in walk.groups:
        if group.key in seen:
            problem = "its members are not neighbours: readers take them for two samples"
            shard.faults.add("sample_split", shard.name, problem, group.key, group.start)
        elif told is not None and group.key not in told:
            problem = "the tar has this sample, the manifest has no row of it"
            shard.faults.add("sample_unlisted", shard.name, problem, group.key, group.start)
        seen.add(group.key)
    beyond = [r for r in rows or () if r["offset"] + r["size"] > shard.size]
    if beyond:
        problem = f"the file ends at {shard.size:,}; {len(beyond)} samples of the manifest lie beyond, this the first"
        shard.faults.add("sample_cut", shard.name, problem, beyond[0]["key"], beyond[0]["offset"])
    for row in rows or ():
        # behind a broken header a walk sees nothing; there a sample's own range tells
        if row["key"] not in seen and not (walk.broken and row["offset"] + row["size"] > walk.end):
            problem = "the manifest has a row of this sample, the tar has no member of that key"
            shard.faults.add("sample_missing", shard.name, problem, row["key"], row["offset"])
    order = [r["key"] for r in rows or () if r["key"] in seen]
    there = [g.key for g in walk.groups if told is not None and g.key in told]
    if order != there and sorted(order) == sorted(there):
        place = next(i for i, (a, b) in enumerate(zip(order, there, strict=True)) if a != b)
        problem = f"the order of the manifest is not the tar's, which has {there[place]} here"
        shard.faults.add("sample_order", shard.name, problem, order[place], remedy=STRANGE)
