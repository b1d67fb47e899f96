"""Is a corpus whole, and does it say the truth about itself? `verify` looks at every byte of it.

It is independent of the code that writes corpora: it reads tars with plain `tarfile`, tables with plain
pyarrow and DuckDB, and states layout and digest in its own words. It collects all faults instead of
stopping at the first; damage of any file is a fault, never an exception.

    from x2i.corpus.verify import verify
    report = verify("runs/quickstart/corpus")
    assert report.ok, report.faults
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from x2i.base.errors import RecipeError
from x2i.corpus.faults import Fault, Faults
from x2i.corpus.verify_files import INFO, MANIFEST, SELECTION, Folder, Info, Manifest, check_hash, read_info
from x2i.corpus.verify_rows import check_rows
from x2i.corpus.verify_shard import Shard, check_shard


@dataclass
class Report:
    """What was looked at, and what is wrong with it.

    Attributes:
        digest: as computed from what lies there; None if a shard or the manifest cannot be read.
        samples: that a plain reader finds in the shards.
        images: decoded to the last pixel.
        bytes: of the shards.
        seconds: that it took.
        more: faults beyond those in `faults`.
    """

    corpus: str
    digest: str | None = None
    rows_in: int = 0
    rows_out: int = 0
    samples: int = 0
    shards: int = 0
    images: int = 0
    bytes: int = 0
    seconds: float = 0.0
    faults: list[Fault] = field(default_factory=list)
    more: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults and not self.more


def verify(
    path: str | Path,
    *,
    workers: int | None = None,
    images: bool = True,
    webdataset: bool = False,
    limit: int = 100,
    on_shard: Callable[[int, int], None] | None = None,
) -> Report:
    """Check a corpus: every hash, size, count, offset, name and image, the equation of rows, the digest.

    Args:
        path: a folder or an fsspec URL.
        workers: threads, each on a shard of its own; None takes one per CPU.
        images: decode every image (most of the time goes there).
        webdataset: read the shards with that library too, and compare its keys with the manifest's.
        limit: most faults that are described; the rest is counted.
        on_shard: called after each shard with (done, total).

    Raises:
        RecipeError: there is no corpus at `path`; or `webdataset` for one that is not in a local folder.
    """
    began = time.perf_counter()
    folder = Folder(str(path))
    if webdataset and not folder.is_local:
        raise RecipeError(f"{path}: the comparison with webdataset needs a local folder")
    faults = Faults(limit)
    info = read_info(folder, faults)
    for name in (MANIFEST, SELECTION):
        check_hash(folder, name, info, faults)
    manifest = Manifest(folder, faults)
    checked: dict[str, Shard | None] = {}
    limits, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # the manifest says how large a picture may be
    try:
        for name, shard in _shards(folder, manifest, info, workers or os.cpu_count() or 1, images, faults):
            checked[name] = shard
            if on_shard is not None:
                on_shard(len(checked), max(len(checked), len(info.shards) if info else 0))
    finally:
        Image.MAX_IMAGE_PIXELS = limits
    there = [s for s in checked.values() if s is not None]
    report = Report(str(path), _digest(manifest, checked, info))
    report.shards, report.bytes = len(there), sum(s.size for s in there)
    report.samples, report.images = sum(s.samples for s in there), sum(s.images for s in there)
    if webdataset:
        _compare_webdataset(folder, [s.name for s in there], faults)
    with folder.local(MANIFEST, SELECTION) as paths:
        if paths is not None:
            counted = check_rows(paths[0], paths[1], info.model_dump() if info else None, faults)
            report.rows_in, report.rows_out = counted.get("rows_in", 0), counted.get("rows_out", 0)
    _compare_info(info, report, faults)
    report.faults, report.more = faults.found, faults.more
    report.seconds = round(time.perf_counter() - began, 3)
    return report


def _shards(
    folder: Folder, manifest: Manifest, info: Info | None, workers: int, images: bool, faults: Faults
) -> Iterator[tuple[str, Shard | None]]:
    """Check all shards on threads, and yield them in order; None for one that cannot be read."""
    listed = {s.name: s.model_dump() for s in info.shards} if info else {}

    def check(name: str, rows: list[dict[str, Any]] | None) -> tuple[Shard | None, Faults]:
        try:
            with folder.open(name) as file:
                shard = check_shard(file, name, listed.get(name), rows, images, faults.limit)
            return shard, shard.faults
        except OSError as error:
            found = Faults(faults.limit)
            missing = isinstance(error, FileNotFoundError)
            samples = f" ({len(rows)} samples lie in it)" if rows else ""
            problem = f"is not there{samples}" if missing else f"cannot be read: {error}"
            found.add("shard_missing" if missing else "shard_unreadable", name, problem)
            return None, found

    def settle(waiting: tuple[str, Future[tuple[Shard | None, Faults]]]) -> tuple[str, Shard | None]:
        shard, found = waiting[1].result()
        faults.extend(found)
        return waiting[0], shard

    with ThreadPoolExecutor(workers) as pool:
        # a shard's rows are held in memory from here on, so only a few shards wait
        window: deque[tuple[str, Future[tuple[Shard | None, Faults]]]] = deque()
        for name, rows in _work(folder, manifest, listed, faults):
            window.append((name, pool.submit(check, name, rows)))
            if len(window) > 2 * workers:
                yield settle(window.popleft())
        while window:
            yield settle(window.popleft())


def _work(
    folder: Folder, manifest: Manifest, listed: dict[str, Any], faults: Faults
) -> Iterator[tuple[str, list[dict[str, Any]] | None]]:
    """Every shard once, with the manifest's rows of it: those of the manifest, then what else is listed or there."""
    seen = set()
    for name, rows in manifest.by_shard():
        seen.add(name)
        if listed and name not in listed:
            faults.add("shard_unlisted", name, "the manifest names this shard, corpus.json does not list it")
        yield name, rows
    rest: list[dict[str, Any]] | None = [] if manifest.whole else None
    for name in listed:
        if name not in seen:
            seen.add(name)
            yield name, rest
    for name in folder.shards():
        if name not in seen and listed:
            remedy = "Remove the file: readers that take every tar of the folder would read it."
            faults.add("file_unlisted", name, "lies among the shards, but is none of them", remedy=remedy)
        elif name not in seen and name.endswith(".tar"):
            yield name, rest


def _digest(manifest: Manifest, checked: dict[str, Shard | None], info: Info | None) -> str | None:
    """SHA-256 of the JSON list ["x2i-corpus/1", [[name, size, samples, sha256] of each shard], SHA-256 of the rows].

    Taken from what was found, not from what is recorded; of the recorded shards in their order, if there is a record.
    """
    names = [s.name for s in info.shards] if info else list(checked)
    shards = [s for s in (checked.get(n) for n in names) if s is not None]
    if not manifest.whole or len(shards) < len(names):
        return None
    parts = ["x2i-corpus/1", [[s.name, s.size, s.samples, s.sha256] for s in shards], manifest.sha256]
    return hashlib.sha256(json.dumps(parts, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def _compare_info(info: Info | None, report: Report, faults: Faults) -> None:
    """The totals of `corpus.json` against what was found, and the digest."""
    if info is None:
        return
    totals = {"shards": len(info.shards), "bytes": sum(s.size for s in info.shards)}
    for name, found in totals.items():
        told = getattr(info.counts, name)
        if told != found:
            faults.add("count", INFO, f"counts.{name} says {told}, its list of shards makes {found}")
    if report.digest is None:
        faults.add("digest", INFO, f"the digest {info.digest} cannot be checked: not everything can be read")
    elif report.digest != info.digest:
        faults.add("digest", INFO, f"the digest of what lies here is {report.digest}, recorded is {info.digest}")


def _compare_webdataset(folder: Folder, shards: list[str], faults: Faults) -> None:
    """What `webdataset` reads, with no help from us, must be the manifest's samples in its order."""
    from webdataset import WebDataset

    told = (row["key"] for _, rows in Manifest(folder, Faults(0)).by_shard() for row in rows)
    urls = [str(Path(folder.root, name)) for name in shards]
    number = 0
    try:
        found = (sample["__key__"] for sample in WebDataset(urls, shardshuffle=False, empty_check=False))
        for number, (there, key) in enumerate(itertools.zip_longest(found, told)):
            if there != key:
                problem = (
                    f"sample {number} is {there or 'not there'} for webdataset, {key or 'not there'} in the manifest"
                )
                faults.add("webdataset", MANIFEST, problem, key)
                return
    except Exception as error:  # noqa: BLE001 - what the library makes of a damaged tar is not ours to foresee
        faults.add("webdataset", MANIFEST, f"webdataset stops at sample {number}: {type(error).__name__}: {error}")
