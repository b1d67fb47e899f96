"""Rows that fall because of another picture: benchmark images, near duplicates, look-alikes, captions said twice.

Each step looks at the rows that stand so far, best first. Rows that are samples already (a published edit, a
conversation) are compared with benchmarks, and with nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from x2i.base.errors import RecipeError
from x2i.base.files import remove
from x2i.base.sql import identifier, literal
from x2i.corpus.lake import Lake
from x2i.pipelines.select.decontaminate import benchmark, by_embedding, by_hash
from x2i.pipelines.select.dedup import near_duplicates
from x2i.pipelines.select.near_text import near_texts
from x2i.pipelines.select.semantic import Part, Run, inline, parts, semantic_duplicates

if TYPE_CHECKING:
    import duckdb

    from x2i.pipelines.recipe import Plan

#: The table of verdicts, and what is joined to it for an update, under names that no annotator can have.
VERDICTS, NEAR = "x2i verdicts", "x2i near"

#: From so many rows on, embeddings are compared by workers: below, they would take longer to start.
SPREAD = 100_000


def check(plan: Plan) -> None:
    """Raise RecipeError if an annotator is missing that a step compares by, or a benchmark's folder."""
    select, where = plan.recipe.select, f"{plan.where}: select"
    if near := select.dedup.perceptual:
        _column(plan, f"{where}.dedup.perceptual", f"{near.annotator}.hash", "phash")
    if same := select.dedup.semantic:
        _column(plan, f"{where}.dedup.semantic", same.column, "classes")
    if text := select.dedup.text:
        _column(plan, f"{where}.dedup.text", f"{text.annotator}.minhash", "texts")
    if clean := select.decontaminate:
        if clean.perceptual:
            _column(plan, f"{where}.decontaminate.perceptual", f"{clean.perceptual.annotator}.hash", "phash")
        if clean.semantic:
            _column(plan, f"{where}.decontaminate.semantic", clean.semantic.column, "classes")
        for name, folder in clean.benchmarks.items():
            if not Path(folder).is_dir():
                raise RecipeError(f"{where}.decontaminate.benchmarks.{name}: {folder}: no such folder of images")


def _column(plan: Plan, key: str, column: str, kind: str) -> None:
    name, _, part = column.partition(".")
    there = {a.name: a.columns for a in plan.annotators}
    if name not in there:
        raise RecipeError(
            f"{key}: needs the annotator `{name}`: add it under `annotators`, e.g. `{name}: {{kind: {kind}}}`"
        )
    if part not in there[name].names:
        raise RecipeError(f"{key}: {name} has no column {part!r}; it has {', '.join(there[name].names)}")
    field = there[name].field(part).type
    if part != "hash" and not (pa.types.is_list(field) or pa.types.is_fixed_size_list(field)):
        raise RecipeError(f"{key}: {column} is no embedding, but {field}")


def apply(plan: Plan, lake: Lake, connection: duckdb.DuckDBPyConnection, scratch: Path, run: Run = inline) -> None:
    """Strike out what is near to a benchmark, then near duplicates by pHash, by embedding, by caption.

    Args:
        connection: has the table of verdicts and a view per annotator.
        scratch: a folder that all workers see; it is gone afterwards.
        run: how functions over many embeddings are called.
    """
    select = plan.recipe.select
    try:
        if select.decontaminate is not None:
            _decontaminate(plan, lake, connection, scratch, run)
        if near := select.dedup.perceptual:
            table = _standing(connection, near.annotator, "hash")
            found = near_duplicates(table["hash"].to_numpy(), near.bits)
            far = pa.array(found.distance, pa.int32())
            said = pc.binary_join_element_wise(far.cast(pa.string()), "of 64 bits differ", " ")
            _strike(
                connection, table["row_id"], found.dropped, "duplicate", "duplicate_near", said, found.survivor, far
            )
        if same := select.dedup.semantic:
            name, _, column = same.column.partition(".")
            ids, files = _files(plan, lake, connection, name)
            made = parts(pa.table({"row_id": ids, "file": files}), scratch / "semantic")
            got = semantic_duplicates(
                made, column, same.similarity, scratch / "same", same.clusters, _runner(run, len(ids))
            )
            said = pa.array([f"cosine {c:.4f} of {same.column}" for c in got.similarity], pa.string())
            _strike(connection, ids, got.dropped, "duplicate", "duplicate_semantic", said, got.survivor)
        if text := select.dedup.text:
            table = _standing(connection, text.annotator, "minhash")
            found = near_texts(table["minhash"], text.similarity)
            far = pa.array(found.distance, pa.int32())
            said = pc.binary_join_element_wise(far.cast(pa.string()), "places of the caption's MinHash differ", " ")
            _strike(
                connection, table["row_id"], found.dropped, "duplicate", "duplicate_text", said, found.survivor, far
            )
    finally:
        remove(scratch)


def _decontaminate(plan: Plan, lake: Lake, connection: duckdb.DuckDBPyConnection, scratch: Path, run: Run) -> None:
    asked = plan.recipe.select.decontaminate
    assert asked is not None
    known = {a.name: a for a in plan.annotators}
    if asked.perceptual:
        annotator = known[asked.perceptual.annotator]
        images = {n: benchmark(f, annotator, lake.path) for n, f in asked.benchmarks.items()}
        table = _standing(connection, annotator.name, "hash", ready=True)
        found = by_hash(table["hash"].to_numpy(), images, asked.perceptual.bits)
        far = found["value"].cast(pa.int32()).combine_chunks()
        _contaminated(connection, table["row_id"], found, [f"{v} of 64 bits from" for v in far.to_pylist()], far)
    if asked.semantic:
        name, _, column = asked.semantic.column.partition(".")
        images = {n: benchmark(f, known[name], lake.path) for n, f in asked.benchmarks.items()}
        ids, files = _files(plan, lake, connection, name, ready=True)
        made: Sequence[Part] = parts(pa.table({"row_id": ids, "file": files}), scratch / "benchmarks")
        found = by_embedding(made, column, images, asked.semantic.similarity, scratch / "near", _runner(run, len(ids)))
        _contaminated(connection, ids, found, [f"cosine {v:.4f} to" for v in found["value"].to_pylist()])


def _contaminated(
    connection: duckdb.DuckDBPyConnection,
    ids: pa.ChunkedArray,
    found: pa.Table,
    how: list[str],
    far: pa.Array | None = None,
) -> None:
    """Rows that match a benchmark image: the reason is the benchmark's name, the detail ends with the image's."""
    names, files = found["benchmark"].to_pylist(), found["file"].to_pylist()
    said = pa.array([f"{h} {n}/{f}" for h, n, f in zip(how, names, files, strict=True)], pa.string())
    _strike(
        connection, ids, found["rank"].to_numpy(), "contaminated", found["benchmark"].combine_chunks(), said, None, far
    )


def _runner(run: Run, rows: int) -> Run:
    return run if rows >= SPREAD else inline


def _standing(connection: duckdb.DuckDBPyConnection, annotator: str, column: str, ready: bool = False) -> pa.Table:
    """The rows that stand so far, best first, with a column of theirs. `ready`: samples already, too."""
    return connection.sql(
        f"""select row_id, {identifier(column)} from "{VERDICTS}" join {identifier(annotator)} using (row_id)
        where reason is null and {"true" if ready else "not ready"} and {identifier(column)} is not null order by rank"""
    ).to_arrow_table()


def _files(
    plan: Plan, lake: Lake, connection: duckdb.DuckDBPyConnection, annotator: str, ready: bool = False
) -> tuple[pa.ChunkedArray, pa.Array]:
    """The rows that stand so far and that an annotator saw, best first, and the file in which its values of each lie."""
    column = next(plan.column(a) for a in plan.annotators if a.name == annotator)
    sources = {s.name: s.fingerprint for s in plan.sources}
    table = connection.sql(
        f"""select row_id, rows.unit as unit, rows.source as source from "{VERDICTS}" join rows using (row_id)
        join {identifier(annotator)} using (row_id)
        where reason is null and {"true" if ready else "not ready"} and error is null order by rank"""
    ).to_arrow_table()
    units = dict(zip(table["unit"].to_pylist(), table["source"].to_pylist(), strict=True))
    paths = {unit: str(lake.file(column, unit, sources[source])) for unit, source in units.items()}
    return table["row_id"], pa.array([paths[u] for u in table["unit"].to_pylist()], pa.string())


def _strike(
    connection: duckdb.DuckDBPyConnection,
    ids: pa.ChunkedArray,
    dropped: np.ndarray,
    stage: str,
    reason: str | pa.Array,
    detail: pa.Array,
    survivor: np.ndarray | None = None,
    distance: pa.Array | None = None,
) -> None:
    """Write why rows fall. `dropped` and `survivor` are places in `ids`."""
    rows = len(detail)
    fell = pa.table(
        {
            "row_id": ids.take(pa.array(dropped, pa.int64())),
            "reason": pa.array([reason] * rows, pa.string()) if isinstance(reason, str) else reason,
            "detail": detail,
            "survivor": pa.nulls(rows, pa.string()) if survivor is None else ids.take(pa.array(survivor, pa.int64())),
            "distance": pa.nulls(rows, pa.int32()) if distance is None else distance,
        }
    )
    connection.register(NEAR, fell)
    connection.execute(
        f"""update "{VERDICTS}" v set stage = {literal(stage)}, reason = n.reason, survivor = n.survivor,
           distance = n.distance, detail = n.detail from "{NEAR}" n where v.row_id = n.row_id"""
    )
    connection.unregister(NEAR)
