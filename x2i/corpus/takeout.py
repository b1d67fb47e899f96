"""A corpus's shards and manifest without the samples that hold certain images.

Only the shards with such samples are written again; the bytes of the other samples in them are copied as they are,
and every other shard is hard-linked. Shards keep their order, and are numbered through.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from x2i.base.errors import X2IError
from x2i.base.sql import connect, literal
from x2i.corpus.corpus import MANIFEST, SELECTION
from x2i.corpus.manifest import STORED, ManifestWriter, refuse_older, stored
from x2i.corpus.shard import ShardWriter
from x2i.corpus.tombstones import find_hits


@dataclass(frozen=True)
class Effect:
    """What goes with certain images.

    Attributes:
        keys: of the samples, by shard.
        by_task: samples by task type.
        lost: ids of rows that keep no sample.
        dropped: shards of which nothing is left.
    """

    keys: dict[str, frozenset[str]]
    by_task: dict[str, int]
    lost: frozenset[str]
    dropped: tuple[str, ...]

    @property
    def samples(self) -> int:
        """How many samples go."""
        return sum(self.by_task.values())


@dataclass(frozen=True)
class Taken:
    """What is left, as `corpus.json` has it, and what went."""

    shards: list[dict[str, Any]]
    tasks: dict[str, dict[str, Any]]
    effect: Effect


def effect_on(corpus: Path, info: dict[str, Any], image_ids: Collection[str]) -> Effect:
    """What would go with these images: every sample one of whose originals is among them, or a row with such an input.

    A ready sample's row goes with its inputs, and takes along the pairs that it is part of.

    Raises:
        X2IError: the manifest does not say which images a sample holds.
    """
    manifest = corpus / MANIFEST
    refuse_older(pq.read_schema(manifest).names, manifest)
    with connect() as connection:
        connection.execute(
            f"""create view m as select * from read_parquet({literal(manifest)});
            create view s as select * from read_parquet({literal(corpus / SELECTION)})"""
        )
        find_hits(connection, "s", image_ids)
        # by the manifest a partner is an image that is neither the row's own nor among its inputs
        connection.execute(
            """create temp table held as select key, row_id, unnest(images) as image_id, images[1] as own from m;
            create temp table gone as select key, shard, row_id, task_type from m
            where row_id in (select row_id from hits)
            or key in (select key from held where image_id in (select image_id from tombs))
            or key in (
                select key from held join s using (row_id)
                where held.image_id <> held.own and not list_contains(s.inputs, held.image_id)
                and held.image_id in (select image_id from s where row_id in (select row_id from hits where not own)))"""
        )
        gone = connection.sql("select key, shard, task_type from gone").fetchall()
        left = "select row_id from m where key not in (select key from gone)"
        lost = connection.sql(f"select distinct row_id from gone where row_id not in ({left})").fetchall()
    keys: dict[str, set[str]] = {}
    for key, shard, _ in gone:
        keys.setdefault(shard, set()).add(key)
    return Effect(
        {shard: frozenset(found) for shard, found in keys.items()},
        dict(sorted(Counter(task for _, _, task in gone).items())),
        frozenset(row_id for (row_id,) in lost),
        tuple(s["name"] for s in info["shards"] if len(keys.get(s["name"], ())) == s["samples"]),
    )


def take_out(corpus: Path, info: dict[str, Any], image_ids: Collection[str], target: Path) -> Taken:
    """Make `target/shards` and the manifest: those of `corpus` without the samples that hold any of these images.

    Args:
        info: the content of `corpus.json`.
        target: a folder on the same file system, with an empty folder `shards`.

    Raises:
        X2IError: a shard is damaged; the corpus is not touched.
    """
    effect = effect_on(corpus, info, image_ids)
    left = [s for s in info["shards"] if s["name"] not in effect.dropped]
    width = max(5, len(str(len(left))))
    names = {s["name"]: f"shards/{number:0{width}d}.tar" for number, s in enumerate(left)}
    for shard in left:
        if shard["name"] not in effect.keys:
            link(corpus / shard["name"], target / names[shard["name"]])
    with ExitStack() as stack:
        copies = _Copies(corpus, target, names, effect.keys, stack)
        _manifest(corpus / MANIFEST, target / MANIFEST, copies)
    shards = [copies.shards.get(s["name"], {**s, "name": names[s["name"]]}) for s in left]
    return Taken(shards, _tasks(info["tasks"], effect.by_task), effect)


def _tasks(old: dict[str, dict[str, Any]], gone: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Counts by task; what went counts among what was not made, so that no figure changes without its reason."""
    out = {}
    for name, task in old.items():
        skipped = Counter(task["skipped"])
        skipped["forgotten"] += gone.get(name, 0)
        kept = {reason: count for reason, count in sorted(skipped.items()) if count}
        out[name] = {**task, "made": task["made"] - gone.get(name, 0), "skipped": kept}
    return out


def _manifest(source: Path, target: Path, copies: _Copies) -> None:
    """The manifest with the new places; shards are written on the way, in its order."""
    with pq.ParquetFile(source) as file, ManifestWriter(target) as writer:
        for number in range(file.num_row_groups):
            table = stored(file.read_row_group(number))
            if copies.touches(table):
                table = pa.Table.from_pylist(list(copies.rows(table)), schema=STORED)
            writer.write(table)
    copies.close()


class _Copies:
    """Writes the shards that lose samples, one after the other. `shards`: those that are done, by their old names."""

    def __init__(
        self, corpus: Path, target: Path, names: dict[str, str], gone: dict[str, frozenset[str]], stack: ExitStack
    ) -> None:
        self._corpus, self._target, self._stack = corpus, target, stack
        self._names, self._gone = names, gone
        self._at: str | None = None
        self._source: IO[bytes] | None = None
        self._writer: _Copier | None = None
        self.shards: dict[str, dict[str, Any]] = {}

    def touches(self, table: pa.Table) -> bool:
        """Whether any of these rows goes, or gets another place."""
        return any(n in self._gone or self._names.get(n) != n for n in table["shard"].unique().to_pylist())

    def rows(self, table: pa.Table) -> Iterator[dict[str, Any]]:
        """The rows that stay, with their new places."""
        for row in table.to_pylist():
            shard = row["shard"]
            if row["key"] in self._gone.get(shard, ()):
                continue
            row["shard"] = self._names[shard]
            if shard in self._gone:
                shift = self._copy(shard, row) - row["offset"]
                row["offset"] += shift
                row["members"] = [{**m, "offset": m["offset"] + shift} for m in row["members"]]
            yield row

    def _copy(self, shard: str, row: dict[str, Any]) -> int:
        """Copy a sample's bytes; returns the offset that they have now."""
        if shard != self._at:
            self.close()
            if shard in self.shards:
                raise X2IError(f"{self._corpus}: the manifest is not in the order of the shards: run `x2i verify`")
            self._at = shard
            self._source = self._stack.enter_context((self._corpus / shard).open("rb"))
            self._writer = _Copier(self._target / self._names[shard])
            self._stack.callback(self._writer.abandon)
        assert self._source is not None and self._writer is not None
        self._source.seek(row["offset"])
        offset = self._writer.size
        if self._writer.copy(self._source.read(row["size"])) != row["sha256"]:
            raise X2IError(
                f"{self._corpus / shard} at byte {row['offset']:,}: the sample {row['key']} is damaged, and cannot be "
                "copied; nothing was changed. `x2i verify` says what is wrong and what helps."
            )
        return offset

    def close(self) -> None:
        """End the shard at hand."""
        if self._at is None or self._writer is None or self._source is None:
            return
        self._writer.close()
        self._source.close()
        path = self._target / self._names[self._at]
        with path.open("rb") as file:
            os.fsync(file.fileno())
        writer = self._writer
        entry = {"name": self._names[self._at], "size": writer.size, "samples": writer.samples}
        self.shards[self._at] = {**entry, "sha256": writer.sha256}
        self._at, self._source, self._writer = None, None, None


class _Copier(ShardWriter):
    """A shard of samples that lie in a tar already."""

    def copy(self, blob: bytes) -> str:
        """Append the bytes of one sample, headers and all; returns their SHA-256."""
        self._emit(blob)
        self.samples += 1
        return hashlib.sha256(blob).hexdigest()

    def abandon(self) -> None:
        """Close the file as it is; harmless if it is closed."""
        self._file.close()


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
