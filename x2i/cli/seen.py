"""Which checkpoints saw an image: a run's ledger says which samples each step consumed, the manifests what is in them.

A sample may hold other images than its own, and only the manifest names them. Where a corpus has changed since, it
cannot be told; so before `forget` changes one, it keeps in the run's folder what the next question needs:

RUN/samples.parquet    of each sample that the run could read: corpus (place in run.json), key, image_id, images;
                       the corpora's digests in its metadata
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from x2i.trainer.record import SAMPLES, SAMPLES_UNTIL

if TYPE_CHECKING:
    import pyarrow as pa

    from x2i.corpus.corpus import Corpus


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

    Call it before the corpus is changed: its manifest says which samples hold them.
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

    checkpoints = all_of(run)
    if not checkpoints or not _concerns(record, corpus):
        return
    kept = _kept(run, record)
    if kept is None:
        corpora = _opened(record, corpus)
        if isinstance(corpora, str):
            yield from _all(run, corpora)
            return
        kept = [_samples(c) for c in corpora]
    for change in record.get("changes", ()):  # until then the run read the corpora as they were
        earlier = _kept(run, change, SAMPLES_UNTIL.format(change["step"]))
        if earlier is None:
            yield from _all(
                run,
                f"its corpora changed after step {change['step']} (--reconcile), and nobody kept what they held before",
            )
            return
        kept += [table.slice(0, 0) for table in earlier[len(kept) :]]
        for place, table in enumerate(earlier):
            kept[place] = _together(kept[place], table)
    keys = [_holding(table, image_ids) for table in kept]
    steps = _steps(run, checkpoints[-1].step, keys)
    if steps is None:
        yield from _all(
            run,
            "its ledger does not tell of all its steps (an earlier x2i trained it, or files are missing or damaged)",
        )
        return
    for checkpoint in checkpoints:
        until = [s for s in steps if s <= checkpoint.step]
        if until:
            yield Seen(str(run), str(checkpoint.path), checkpoint.step, until[0], until[-1], len(until))


def _concerns(record: dict[str, Any], corpus: Path) -> bool:
    """Whether a run read this corpus: by its digest, or by where it lies."""
    from x2i.corpus.corpus import Corpus

    digest = Corpus(corpus).digest
    read = [*record["corpora"], *(c for change in record.get("changes", ()) for c in change["corpora"])]
    return any(c["digest"] == digest or Path(c["path"]).resolve() == corpus.resolve() for c in read)


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
        tables = [_samples(corpus) for corpus in corpora]
        for place, table in enumerate(tables):
            tables[place] = table.append_column("corpus", pa.array([place] * len(table), pa.int32()))
        digests = json.dumps([c["digest"] for c in record["corpora"]])
        with atomic(run / SAMPLES) as temporary:
            table = pa.concat_tables(tables).replace_schema_metadata({"corpora": digests})
            pq.write_table(table, temporary, compression="zstd")


def _samples(corpus: Corpus) -> pa.Table:
    """Key and images of a corpus's samples; a corpus of an early build names no images but the sample's own."""
    import pyarrow as pa

    with corpus.open_manifest() as file:
        columns = [n for n in ("key", "image_id", "images") if n in file.schema_arrow.names]
        table = file.read(columns)
    if "images" not in columns:
        table = table.append_column("images", pa.nulls(len(table), pa.list_(pa.string())))
    return table


def _together(*tables: pa.Table) -> pa.Table:
    import pyarrow as pa

    return pa.concat_tables(
        [table.select(["key", "image_id", "images"]) for table in tables], promote_options="permissive"
    )


def _kept(run: Path, record: dict[str, Any], name: str = SAMPLES) -> list[pa.Table] | None:
    """A run's samples by corpus as `keep` wrote them; None if it did not, or of another run in the same folder."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(run / name)
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    if json.loads((table.schema.metadata or {}).get(b"corpora", b"[]")) != [c["digest"] for c in record["corpora"]]:
        return None
    return [table.filter(pc.field("corpus") == place) for place in range(len(record["corpora"]))]


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


def _holding(samples: pa.Table, image_ids: Collection[str]) -> pa.Array:
    """Keys of the samples that hold one of the images."""
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = pa.array(sorted(image_ids), pa.string())
    own = samples.filter(pc.is_in(samples["image_id"], value_set=wanted))["key"]
    images = samples["images"].combine_chunks()
    parents = pc.list_parent_indices(images).filter(pc.is_in(images.flatten(), value_set=wanted))
    return pc.unique(pa.concat_arrays([*own.chunks, *samples["key"].take(parents).chunks]))


def _steps(run: Path, last: int, keys: Sequence[pa.Array]) -> list[int] | None:
    """The steps up to `last` that consumed a sample of these keys (by corpus), once per draw; None if it is not told."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from x2i.trainer.ledger import files_of

    steps: list[int] = []
    told = 0
    for file, first, end in files_of(run):
        if first != told + 1:
            return None
        told = end
        try:
            table = pq.read_table(file, columns=["step", "corpus", "key"])
        except (pa.ArrowException, OSError):
            return None
        for place, wanted in enumerate(keys):
            here = table.filter((pc.field("corpus") == place) & pc.field("key").isin(wanted))
            steps += here["step"].to_pylist()
    return sorted(steps) if told >= last else None
