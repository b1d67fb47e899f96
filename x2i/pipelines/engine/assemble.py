"""One group of selected rows into its shards: read, check, encode if needed, build the tasks, write tars.

A group is planned from the selection alone, so its shards do not depend on who builds it, or when. Its
folder appears whole (`atomic`), and is never built again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from x2i.base.files import atomic
from x2i.base.seeds import digest
from x2i.corpus.manifest import SCHEMA
from x2i.corpus.sample import Picture, Sample
from x2i.corpus.shard import ShardWriter, entry_size
from x2i.pipelines.images import BadImage, Header, decode, encode, fit, read_header, resize
from x2i.pipelines.recipe import Plan
from x2i.pipelines.sources.base import Row, Source, Unit
from x2i.pipelines.tasks.base import Selected, Skipped

PART, OUTCOME = "part.parquet", "outcome.json"


@dataclass
class Outcome:
    """What came of a group: samples made and skipped per task, rows that fell, with the reason."""

    shards: list[dict[str, Any]] = field(default_factory=list)
    made: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)  # "task_type/reason"
    fallen: list[dict[str, str]] = field(default_factory=list)  # row_id, reason, detail


def assemble_group(plan: Plan, units: dict[str, Unit], rows: list[dict[str, Any]], folder: Path) -> None:
    """Build the samples of these rows into `folder`: shards 00.tar, 01.tar …, their manifest, the outcome.

    Args:
        units: by id, those that the rows come from.
        rows: of the selection, in order; rows of one unit are neighbours.

    Raises:
        OSError: the folder cannot be written.
    """
    sources = {s.name: s for s in plan.sources}
    outcome = Outcome()
    with atomic(folder) as temporary:
        temporary.mkdir()
        with tempfile.TemporaryFile(dir=temporary) as spool:
            spooled = []
            for row, got in _read(rows, sources, units):
                for sample in _samples(plan, row, got, outcome):
                    spooled.append(_spool(sample, row, spool))
            # neighbours in the source are strangers in the shard: plain readers shuffle little
            spooled.sort(key=lambda s: digest("order/1", s.key))
            _write(plan, spooled, spool, temporary, outcome)
        text = json.dumps(
            {"shards": outcome.shards, "made": outcome.made, "skipped": outcome.skipped, "fallen": outcome.fallen}
        )
        (temporary / OUTCOME).write_text(text)


def _read(
    rows: list[dict[str, Any]], sources: dict[str, Source], units: dict[str, Unit]
) -> Iterator[tuple[dict[str, Any], Row]]:
    for unit, members in itertools.groupby(rows, key=lambda r: r["unit"]):
        wanted = {r["index"]: r for r in members}
        for got in sources[units[unit].source].read(units[unit], wanted.keys()):
            yield wanted[got.index], got


def _samples(plan: Plan, row: dict[str, Any], got: Row, outcome: Outcome) -> list[Sample]:
    """The samples of one row; if there are none, the row has fallen, and the outcome says why."""
    try:
        selected = _select(plan, row, got)
    except BadImage as bad:
        outcome.fallen.append({"row_id": row["row_id"], "reason": bad.reason, "detail": bad.detail})
        for task in plan.tasks:
            outcome.skipped.update(f"{t}/{bad.reason}" for t in task.task_types())
        return []
    samples = []
    for task in plan.tasks:
        for made in task.build(selected):
            if isinstance(made, Skipped):
                outcome.skipped[f"{made.task_type}/{made.reason}"] += 1
            else:
                outcome.made[made.task_type] += 1
                samples.append(made)
    if not samples:
        fallen = {"row_id": row["row_id"], "reason": "no_task", "detail": "no task could be made of the row"}
        outcome.fallen.append(fallen)
    return samples


def _select(plan: Plan, row: dict[str, Any], got: Row) -> Selected:
    if got.problem is not None or got.data is None:
        reason, detail = (got.problem.reason, got.problem.detail) if got.problem else ("missing_image", "no bytes")
        raise BadImage(reason, detail)
    found = hashlib.sha256(got.data).hexdigest()
    if found != row["image_id"]:
        raise BadImage("source_changed", f"annotated as {row['image_id'][:16]}, now {found[:16]}: build again")
    known = {f.name: row["image"][f.name] for f in fields(Header)}  # the same bytes have the same header
    picture, pixels = _picture(plan, got.data, Header(**known))
    selected = Selected(
        row_id=row["row_id"],
        image_id=row["image_id"],
        source=row["source"],
        location=row["location"],
        text=row["text"],
        meta=json.loads(row["meta"]),
        values={a.name: row[a.name] for a in plan.annotators},
        picture=picture,
        inputs=tuple(
            _picture(plan, data, read_header(data, plan.recipe.decode.max_pixels))[0] for _, data in got.inputs
        ),
        seed=plan.recipe.seed,
        untouched=pixels is not None,
    )
    if pixels is not None:
        selected.__dict__["pixels"] = pixels  # fills the cached property: no second decode
    return selected


def _picture(plan: Plan, data: bytes, header: Header) -> tuple[Picture, np.ndarray | None]:
    """The picture as it is stored: the file's own bytes, and its pixels, if nothing has to change; else encoded anew."""
    output = plan.recipe.output
    width, height = fit(header.width, header.height, output.shorter_side, output.max_pixels)
    pixels = decode(data, header)  # a file that is passed on must be whole, too
    if header.plain and (width, height) == (header.width, header.height):
        return Picture(data, header.extension, width, height), pixels
    small = resize(pixels, width, height)
    return Picture(encode(small, "jpg", output.jpeg_quality, output.jpeg_subsampling), "jpg", width, height), None


@dataclass(frozen=True)
class _Spooled:
    key: str
    members: list[tuple[str, int]]  # suffix, size
    offset: int
    manifest: dict[str, Any]


def _spool(sample: Sample, row: dict[str, Any], spool: IO[bytes]) -> _Spooled:
    """Put a sample's bytes aside on disk, so that a group of any size takes little memory."""
    members = sample.members()
    offset = spool.tell()
    for _, data in members:
        spool.write(data)
    out = sample.output_image
    manifest = {
        "key": sample.key,
        "task_type": sample.task_type,
        "instruction_chars": len(sample.instruction),
        "input_sizes": [{"width": p.width, "height": p.height} for p in sample.input_images],
        "output_size": {"width": out.width, "height": out.height} if out else None,
        "image_id": row["image_id"],
        "row_id": row["row_id"],
        "source": row["source"],
        "location": row["location"],
        "scores": row["scores"],
    }
    return _Spooled(sample.key, [(s, len(d)) for s, d in members], offset, manifest)


def _write(plan: Plan, spooled: list[_Spooled], spool: IO[bytes], folder: Path, outcome: Outcome) -> None:
    rows: list[dict[str, Any]] = []
    waiting = iter(spooled)
    sample = next(waiting, None)
    while sample is not None:
        name = f"{len(outcome.shards):02d}.tar"
        with ShardWriter(folder / name) as writer:
            while sample is not None and _fits(plan, writer, sample):
                spool.seek(sample.offset)
                entry = writer.write(sample.key, [(suffix, spool.read(size)) for suffix, size in sample.members])
                place = {"shard": name, "offset": entry.offset, "size": entry.size, "sha256": entry.sha256}
                members = [{"suffix": m.suffix, "offset": m.offset, "size": m.size} for m in entry.members]
                rows.append({**sample.manifest, **place, "members": members})
                sample = next(waiting, None)
        shard = {"name": name, "size": writer.size, "samples": writer.samples, "sha256": writer.sha256}
        outcome.shards.append(shard)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / PART, compression="zstd")


def _fits(plan: Plan, writer: ShardWriter, sample: _Spooled) -> bool:
    output = plan.recipe.output
    if writer.samples == 0:
        return True
    grown = writer.size + entry_size(size for _, size in sample.members)
    return writer.samples < output.shard_samples and grown <= output.shard_bytes
