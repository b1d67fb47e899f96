"""One group of selected rows into its shards: read, check, encode if needed, build the tasks, write tars.

A group is planned from the selection alone, so its shards do not depend on who builds it, or when. Its
folder appears whole (`atomic`), and is never built again.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from x2i.base.files import atomic
from x2i.base.seeds import digest
from x2i.corpus.manifest import MADE, originals
from x2i.corpus.sample import Sample
from x2i.corpus.shard import ShardWriter, entry_size
from x2i.corpus.text import rejected_tokens, sample_tokens
from x2i.pipelines.engine.chosen import Heavy, Others, read_rows, selected_row
from x2i.pipelines.images import BadImage
from x2i.pipelines.recipe import Plan
from x2i.pipelines.select.quotas import NOT_DRAWN, drawn
from x2i.pipelines.sources.base import Row, Unit
from x2i.pipelines.tasks.base import Skipped

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
        units: by id, those that the rows come from, and the others in their groups.
        rows: of the selection, in order; rows of one unit are neighbours.

    Raises:
        OSError: the folder cannot be written.
        X2IError: the lake lacks values that a task reads.
    """
    outcome = Outcome()
    heavy = Heavy(plan, units)
    with atomic(folder) as temporary:
        temporary.mkdir()
        with tempfile.TemporaryFile(dir=temporary) as spool, Others(plan, units, heavy, rows, temporary) as others:
            spooled = []
            for row, got in read_rows(plan, units, rows):
                for sample in _samples(plan, row, got, heavy, others, outcome):
                    spooled.append(_spool(sample, row, spool))
            # neighbours in the source are strangers among the shards: plain readers shuffle little
            spooled.sort(key=lambda s: digest("order/1", s.key))
            _write(plan, spooled, spool, temporary, outcome)
        text = json.dumps(
            {"shards": outcome.shards, "made": outcome.made, "skipped": outcome.skipped, "fallen": outcome.fallen}
        )
        (temporary / OUTCOME).write_text(text)


def _samples(plan: Plan, row: dict[str, Any], got: Row, heavy: Heavy, others: Others, outcome: Outcome) -> list[Sample]:
    """The samples of one row; if there are none, the row has fallen, and the outcome says why."""
    try:
        selected = selected_row(plan, row, got, heavy)
    except BadImage as bad:
        outcome.fallen.append({"row_id": row["row_id"], "reason": bad.reason, "detail": bad.detail})
        for task in plan.tasks:
            outcome.skipped.update(f"{t}/{bad.reason}" for t in task.task_types())
        return []
    samples: list[Sample] = []
    undrawn = _undrawn(plan, selected.image_id)
    left_out = 0
    for task in plan.tasks:
        if undrawn.issuperset(types := task.task_types()):
            outcome.skipped.update(f"{t}/{NOT_DRAWN}" for t in types)
            left_out += len(types)
            continue
        selected.groups = others.of(row, task.name)
        for made in task.build(selected):
            if isinstance(made, Skipped):
                outcome.skipped[f"{made.task_type}/{made.reason}"] += 1
            elif made.task_type in undrawn:
                outcome.skipped[f"{made.task_type}/{NOT_DRAWN}"] += 1
                left_out += 1
            else:
                outcome.made[made.task_type] += 1
                samples.append(made)
    if not samples:
        reason, detail = "no_task", "no task could be made of the row"
        if left_out:
            reason, detail = NOT_DRAWN, "the tasks that it might serve did not draw it (select.tasks)"
        outcome.fallen.append({"row_id": row["row_id"], "reason": reason, "detail": detail})
    return samples


def _undrawn(plan: Plan, image_id: str) -> set[str]:
    """The task types that do not get this image."""
    shares = plan.recipe.select.tasks.items()
    return {t for t, share in shares if not drawn(image_id, t, plan.recipe.seed, share)}


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
        "text_tokens": sample_tokens(sample.instruction, sample.messages, sample.objects),
        "rejected_tokens": rejected_tokens(sample.messages, sample.rejected_response, sample.objects),
        "input_sizes": [{"width": p.width, "height": p.height} for p in sample.input_images],
        "output_size": {"width": out.width, "height": out.height} if out else None,
        "image_id": row["image_id"],
        "images": originals(sample.provenance),
        "row_id": row["row_id"],
        "source": row["source"],
        "location": row["location"],
        "scores": row["scores"],
    }
    return _Spooled(sample.key, [(s, len(d)) for s, d in members], offset, manifest)


def _write(plan: Plan, spooled: list[_Spooled], spool: IO[bytes], folder: Path, outcome: Outcome) -> None:
    rows: list[dict[str, Any]] = []
    for samples in _shards(plan, spooled):
        # of each task all, one after the other: who reads some tasks, or each at its own pace, reads few large ranges
        samples.sort(key=lambda s: s.manifest["task_type"])
        name = f"{len(outcome.shards):02d}.tar"
        with ShardWriter(folder / name) as writer:
            for sample in samples:
                spool.seek(sample.offset)
                entry = writer.write(sample.key, [(suffix, spool.read(size)) for suffix, size in sample.members])
                place = {"shard": name, "offset": entry.offset, "size": entry.size, "sha256": entry.sha256}
                members = [{"suffix": m.suffix, "offset": m.offset, "size": m.size} for m in entry.members]
                rows.append({**sample.manifest, **place, "members": members})
        shard = {"name": name, "size": writer.size, "samples": writer.samples, "sha256": writer.sha256}
        outcome.shards.append(shard)
    pq.write_table(pa.Table.from_pylist(rows, schema=MADE), folder / PART, compression="zstd")


def _shards(plan: Plan, spooled: list[_Spooled]) -> Iterator[list[_Spooled]]:
    """The samples of each shard: as many as it may have, in number and bytes."""
    output = plan.recipe.output
    samples: list[_Spooled] = []
    held = 0
    for sample in spooled:
        size = entry_size(size for _, size in sample.members)
        if samples and (len(samples) == output.shard_samples or held + size > output.shard_bytes):
            yield samples
            samples, held = [], 0
        samples.append(sample)
        held += size
    if samples:
        yield samples
