"""Which checkpoints saw an image: a run's record is replayed against the corpus as it was when the run began.

The order of a run's samples is a pure function of its record (run.json) and of the corpora's manifests, so nothing
else is needed: run.json says stages, mixture and seed, and the digests of the corpora; the checkpoints say how far it
came, and which samples were damaged and replaced. Where a corpus has changed since, it cannot be told; so before
`forget` changes one, it keeps in the run's folder what the next question needs:

RUN/samples.parquet    of each sample that the run could read: corpus (place in run.json), key, task_type, image_id,
                       images, output_size (null: no output image); the corpora's digests in its metadata
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from x2i.corpus.corpus import Corpus
    from x2i.trainer.plan import StagePlan
    from x2i.trainer.table import SampleTable

#: What `forget` leaves in a run's folder.
SAMPLES = "samples.parquet"


@dataclass(frozen=True)
class Seen:
    """A checkpoint whose weights were trained on an image, or may have been.

    Attributes:
        first, last: steps (from 1) that consumed a sample with one of the images, up to the checkpoint's own.
        draws: how often, up to the checkpoint.
        unknown: why it cannot be told; then the other figures are None.
        through: the checkpoint that it began with, where that one saw the images.
    """

    run: str
    checkpoint: str
    step: int
    first: int | None = None
    last: int | None = None
    draws: int | None = None
    unknown: str | None = None
    through: str | None = None


def seen(folders: Collection[Path], corpus: Path, image_ids: Collection[str]) -> list[Seen]:
    """The checkpoints below `folders` that saw any of these images, or of which it cannot be told.

    Call it before the corpus is changed: with other samples the order is another.
    """
    found: list[Seen] = []
    weights: list[tuple[Path, str]] = []
    for run in sorted({r.resolve(): r for f in folders for r in runs_below(f)}.values()):
        try:
            record = json.loads((run / "run.json").read_text(encoding="utf-8"))
            base = record["config"]["model"].get("weights")
            found += _of_run(run, record, corpus, image_ids)
            weights += [(run, str(base))] if base else []
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            found += _all(run, f"its run.json cannot be read ({type(error).__name__}: {error})")
    return found + list(_inherited(found, weights))


def runs_below(folder: Path) -> Iterator[Path]:
    """Folders of training runs: those with a run.json, not looking into corpora, lakes and checkpoints."""
    for at, names, files in os.walk(folder):
        if "run.json" in files:
            yield Path(at)
        if "corpus.json" in files or {"rows", "recipes"} <= set(names):
            names.clear()
        names[:] = sorted(n for n in names if not n.startswith((".", "step-")))


def _of_run(run: Path, record: dict[str, Any], corpus: Path, image_ids: Collection[str]) -> Iterator[Seen]:
    from x2i.trainer.checkpoint import all_of
    from x2i.trainer.table import SampleTable

    checkpoints = all_of(run)
    if not checkpoints or not _concerns(record, corpus):
        return
    corpora = _kept(run, record) or _opened(record, corpus)
    if isinstance(corpora, str):
        yield from _all(run, corpora)
        return
    config = record["config"]
    table = SampleTable(corpora, config["held_out"])  # type: ignore[arg-type]
    gone = _rows(table, lambda c: _holding(c, image_ids))
    broken = {d["key"] for c in checkpoints for d in c.info.get("damaged", ())}
    damaged = _rows(table, lambda c: _named(c, broken)) if broken else gone[:0]
    steps = sorted(_steps(table, config, checkpoints[-1].step, gone, damaged))
    for checkpoint in checkpoints:
        until = [s for s in steps if s <= checkpoint.step]
        if until:
            yield Seen(str(run), str(checkpoint.path), checkpoint.step, until[0], until[-1], len(until))


def _concerns(record: dict[str, Any], corpus: Path) -> bool:
    """Whether a run read this corpus: by its digest, or by where it lies."""
    from x2i.corpus.corpus import Corpus

    digest = Corpus(corpus).digest
    return any(c["digest"] == digest or Path(c["path"]).resolve() == corpus.resolve() for c in record["corpora"])


def _opened(record: dict[str, Any], corpus: Path) -> list[Corpus] | str:
    """A run's corpora, if they are what they were; else why it cannot be told."""
    from x2i.base.errors import X2IError
    from x2i.corpus.corpus import Corpus

    out = []
    here = Corpus(corpus)
    for told in record["corpora"]:
        try:
            one = here if told["digest"] == here.digest else Corpus(told["path"])
        except X2IError:
            return f"its corpus {told['path']} is gone"
        if one.digest != told["digest"]:
            return f"its corpus {told['path']} has changed since (was {told['digest'][:12]}, is {one.digest[:12]})"
        out.append(one)
    return out


@dataclass(frozen=True)
class _Kept:
    """As much of a corpus as is needed, from a run's own folder."""

    path: Path
    manifest: pa.Table


def keep(folders: Collection[Path], corpus: Path) -> None:
    """Write RUN/samples.parquet of every run that read this corpus, while the corpus is what the run read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from x2i.base.files import atomic

    for run in (r for f in folders for r in runs_below(f)):
        try:
            record = json.loads((run / "run.json").read_text(encoding="utf-8"))
            corpora = _opened(record, corpus) if _concerns(record, corpus) and _kept(run, record) is None else ""
        except (OSError, ValueError, LookupError, TypeError):
            continue
        if isinstance(corpora, str):
            continue
        tables = []
        for place, one in enumerate(corpora):
            rows = one.manifest
            images = rows["images"] if "images" in rows.column_names else pa.nulls(len(rows), pa.list_(pa.string()))
            columns = {"corpus": pa.array([place] * len(rows), pa.int32())}
            columns |= {name: rows[name] for name in ("key", "task_type", "image_id")} | {"images": images}
            there = rows["output_size"].is_valid()
            columns["output_size"] = pa.chunked_array([pa.array([v or None for v in there.to_pylist()], pa.bool_())])
            tables.append(pa.table(columns))
        digests = json.dumps([c["digest"] for c in record["corpora"]])
        with atomic(run / SAMPLES) as temporary:
            table = pa.concat_tables(tables).replace_schema_metadata({"corpora": digests})
            pq.write_table(table, temporary, compression="zstd")


def _kept(run: Path, record: dict[str, Any]) -> list[_Kept] | None:
    """A run's corpora as `keep` wrote them; None if it did not, or of another run in the same folder."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(run / SAMPLES)
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    if json.loads((table.schema.metadata or {}).get(b"corpora", b"[]")) != [c["digest"] for c in record["corpora"]]:
        return None
    parts = (table.filter(pc.field("corpus") == place) for place in range(len(record["corpora"])))
    return [_Kept(Path(c["path"]), part) for c, part in zip(record["corpora"], parts, strict=True)]


def _all(run: Path, why: str) -> Iterator[Seen]:
    from x2i.trainer.checkpoint import all_of

    return (Seen(str(run), str(c.path), c.step, unknown=why) for c in all_of(run))


def _inherited(found: list[Seen], weights: list[tuple[Path, str]]) -> Iterator[Seen]:
    """Checkpoints of runs that began with one that saw an image, and so on; those in `found` are not told twice."""
    from x2i.trainer.checkpoint import all_of

    told = {Path(s.checkpoint).resolve() for s in found}
    fresh = set(told)
    while fresh:
        reached, fresh = fresh, set()
        for run, base in weights:
            begun = Path(base).resolve()
            if not any(begun == r or begun.is_relative_to(r) for r in reached):
                continue
            for checkpoint in all_of(run):
                if checkpoint.path.resolve() not in told:
                    told.add(checkpoint.path.resolve())
                    fresh.add(checkpoint.path.resolve())
                    yield Seen(str(run), str(checkpoint.path), checkpoint.step, through=base)


def _holding(corpus: Corpus | _Kept, image_ids: Collection[str]) -> np.ndarray:
    """Rows of the manifest whose samples hold one of the images."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = pa.array(sorted(image_ids), pa.string())
    own = np.flatnonzero(pc.is_in(corpus.manifest["image_id"], value_set=wanted).to_numpy())
    if "images" not in corpus.manifest.column_names:  # an old corpus names no partners
        return own
    images = corpus.manifest["images"].combine_chunks()
    hit = pc.is_in(images.flatten(), value_set=wanted).to_numpy(zero_copy_only=False)
    return np.union1d(own, pc.list_parent_indices(images).to_numpy(zero_copy_only=False)[hit])


def _named(corpus: Corpus | _Kept, keys: Collection[str]) -> np.ndarray:
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    there = pc.is_in(corpus.manifest["key"], value_set=pa.array(sorted(keys), pa.string()))
    return np.flatnonzero(there.to_numpy())


def _rows(table: SampleTable, wanted: Any) -> np.ndarray:
    """Rows of the sample table, given a function that says which rows of a corpus's manifest are meant."""
    import numpy as np

    out = [
        np.flatnonzero((table._corpus == place) & np.isin(table._row, wanted(corpus)))
        for place, corpus in enumerate(table.corpora)
    ]
    return np.concatenate(out)


def _steps(
    table: SampleTable, config: dict[str, Any], last: int, gone: np.ndarray, damaged: np.ndarray
) -> Iterator[int]:
    """The steps (from 1, over all stages) up to `last` that consumed one of the samples `gone`, once per draw."""
    from x2i.trainer.plan import StagePlan

    begun = 0
    for stage in config["stages"]:
        done = max(0, min(stage["steps"], last - begun))
        if done:
            plan = StagePlan(table.train, stage["mixture"], stage["batch"], config["seed"], stage["name"])
            for index in draws_of(plan, done * stage["batch"], gone, damaged):
                yield begun + index // stage["batch"] + 1
        begun += stage["steps"]


def draws_of(plan: StagePlan, count: int, gone: np.ndarray, damaged: np.ndarray) -> Iterator[int]:
    """Numbers of the draws below `count` that took one of the samples `gone`, themselves or as spares of `damaged` ones.

    The permutations are inverted, so that the work grows with the samples that are asked for, not with the draws.
    """
    wanted, broken = set(gone.tolist()), set(damaged.tolist())
    for task in plan.tasks:
        yield from (i for i, _ in _places(plan, task, count, wanted))
        for index, position in _places(plan, task, count, broken):
            attempt = 1
            while plan._at(task, position + attempt) in broken and attempt < 33:
                attempt += 1
            if plan._at(task, position + attempt) in wanted:
                yield index


def _places(plan: StagePlan, task: str, count: int, wanted: set[int]) -> Iterator[tuple[int, int]]:
    """(number, position in the task's stream) of every draw below `count` that is dealt one of these samples."""
    import numpy as np

    samples, dealt = plan._samples[task], plan.counts[task]
    size, number = len(samples), plan.tasks.index(task)
    most = -(-count // plan.window) * dealt  # positions that any of these draws can have
    for place in np.flatnonzero(np.isin(samples, sorted(wanted))).tolist():
        for epoch in range(-(-most // size)):
            position = epoch * size + unpermuted(place, size, *plan.key, task, epoch)
            window, rank = divmod(position, dealt)
            if position >= most:
                continue
            tasks, ranks = plan._deal_window(window)
            index = window * plan.window + int(np.flatnonzero((tasks == number) & (ranks == rank))[0])
            if index < count:
                yield index, position


def unpermuted(place: int, size: int, *key: int | str) -> int:
    """The number that `x2i.trainer.plan.permuted` sends to `place`: the same network, its rounds undone in reverse."""
    from x2i.trainer.plan import _mix, _round_keys

    half = max((size - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    rounds = _round_keys(*key)
    while True:
        left, right = place >> half, place & mask
        for round_key in reversed(rounds):
            left, right = right ^ (_mix(left ^ round_key) & mask), left
        place = left << half | right
        if place < size:
            return place
