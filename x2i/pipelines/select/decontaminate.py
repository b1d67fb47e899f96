"""Rows whose picture is that of a benchmark, or nearly: training on them would make the benchmark's figures worthless.

A benchmark is a folder of images. An annotator of the recipe is run on them as it is on rows, and what it says
is kept in the lake, under the digest of the folder's content:

    LAKE/benchmarks/<annotator's fingerprint>/<digest>.parquet    file, image_id, the annotator's columns, error
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from x2i.base.config import Config
from x2i.base.digests import remembered
from x2i.base.errors import RecipeError, X2IError
from x2i.base.files import atomic, writing
from x2i.corpus.lake import ERRORS, SHORT
from x2i.pipelines.annotators.base import Annotator, Item
from x2i.pipelines.calling import call
from x2i.pipelines.images import BadImage, decode, read_header
from x2i.pipelines.select.hamming import pairs_between
from x2i.pipelines.select.semantic import Part, Run, cosines, inline, read_embeddings, similar_pairs
from x2i.pipelines.sources._files import extension
from x2i.pipelines.sources.base import IMAGE_EXTENSIONS

log = logging.getLogger(__name__)

#: The nearest benchmark image of each row that is too near to one. `value`: bits that differ, or the cosine.
MATCHES = pa.schema({"rank": pa.int64(), "benchmark": pa.string(), "file": pa.string(), "value": pa.float64()})

#: Rows and benchmark images that are compared at once.
BLOCK = 2048


class ByHash(Config):
    """How near is too near, by the pHash; needs the annotator `phash`."""

    bits: int = Field(8, ge=0, le=32, description="so many differing bits of 64, or fewer, are too near, e.g. 6")
    annotator: str = Field("phash", description="the recipe's name of the `phash` annotator, e.g. phash")


class ByEmbedding(Config):
    """How near is too near, by an embedding."""

    column: str = Field("classes.embedding", description="annotator.column with an embedding, e.g. clip.embedding")
    similarity: float = Field(
        0.85,
        gt=0,
        le=1,
        description="cosines from this on are too near, e.g. 0.9; what is right depends on the embedding: of `classes`, "
        "copies at half size, cropped by a tenth or mirrored have 0.85 and more",
    )

    @property
    def annotator(self) -> str:
        """The recipe's name of the annotator."""
        return self.column.partition(".")[0]


class Decontaminate(Config):
    """Drop rows that are too near to an image of a benchmark."""

    benchmarks: dict[str, str] = Field(
        min_length=1, description="folders of images, by the names under which reports show them, e.g. {coco: val2017}"
    )
    perceptual: ByHash | None = Field(ByHash(), description="compare pHashes, e.g. {bits: 8}; null does not")
    semantic: ByEmbedding | None = Field(
        None, description="compare embeddings as well, e.g. {column: clip.embedding, similarity: 0.9}"
    )

    @model_validator(mode="after")
    def _one_at_least(self) -> Decontaminate:
        if self.perceptual is None and self.semantic is None:
            raise ValueError("nothing is compared: give `perceptual` or `semantic`")
        return self


def benchmark(folder: str | Path, annotator: Annotator, lake: str | Path) -> pa.Table:
    """What an annotator says of each image of a folder, computed once: `file` (relative), `image_id`, columns, error.

    Files that cannot be read have nulls and the reason in `error`; a warning names them.

    Raises:
        RecipeError: no such folder, no image in it, or the annotator needs more than an image.
        X2IError: the annotator's weights cannot be had.
    """
    folder, cache = Path(folder), Path(lake) / "benchmarks"
    if not folder.is_dir():
        raise RecipeError(f"{folder}: no such folder; `benchmarks` names folders of images")
    if annotator.needs == "row" or annotator.reads:
        raise RecipeError(
            f"{annotator.name}: it needs more than an image, and so cannot be asked about {folder}; "
            "phash, classes and clip can"
        )
    names = sorted(
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        if extension(p.name) in IMAGE_EXTENSIONS and p.is_file() and not p.name.startswith(".")
    )
    if not names:
        raise RecipeError(f"select.decontaminate: {folder}: no image in it; `benchmarks` names folders of images")
    digest = remembered(folder, cache / "digests", names)
    path = cache / annotator.fingerprint[:SHORT] / f"{digest}.parquet"
    if not path.is_file():
        working = copy.copy(annotator)  # its models go when this is done
        working.setup()
        table = pa.concat_tables(_annotated(folder, names, working))
        with atomic(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")
    table = pq.read_table(path)
    bad = table.filter(table["error"].is_valid())
    if bad.num_rows:
        some = ", ".join(
            f"{f} ({e})" for f, e in zip(bad["file"].to_pylist()[:5], bad["error"].to_pylist(), strict=False)
        )
        log.warning("%s: %d of %d images say nothing: %s", folder, bad.num_rows, table.num_rows, some)
    return table


def _annotated(folder: Path, names: list[str], annotator: Annotator) -> Iterator[pa.Table]:
    schema = pa.schema([("file", pa.string()), ("image_id", pa.string()), *annotator.columns, *ERRORS])
    size = annotator.config.batch_size
    for start in range(0, len(names), size):
        items: list[Item] = []
        at: list[int | None] = []
        ids: list[str] = []
        errors: list[tuple[str | None, str | None]] = []
        for name in names[start : start + size]:
            data = (folder / name).read_bytes()
            ids.append(hashlib.sha256(data).hexdigest())
            try:
                header = read_header(data, annotator.decoding.max_pixels)
                pixels = decode(data, header, annotator.decoding.shorter_side) if annotator.needs == "pixels" else None
            except BadImage as bad:
                at.append(None)
                errors.append((bad.reason, bad.detail))
                continue
            at.append(len(items))
            errors.append((None, None))
            items.append(Item(ids[-1], None, data=data, header=header, pixels=pixels))
        called = call(annotator, items, pa.table({"_": pa.nulls(len(items))}).select([]))
        for row, place in enumerate(at):
            problem = None if place is None else called.problems[place]
            if problem is not None:
                errors[row] = (problem.reason, problem.detail)
        values = called.values.take(pa.array(at, pa.int64()))
        arrays = [names[start : start + size], ids, *values.columns, *(list(e) for e in zip(*errors, strict=True))]
        yield pa.table(
            [a if isinstance(a, pa.ChunkedArray) else pa.array(a, pa.string()) for a in arrays], schema=schema
        )


def by_hash(hashes: np.ndarray, benchmarks: Mapping[str, pa.Table], bits: int, column: str = "hash") -> pa.Table:
    """Rows within `bits` of a benchmark image, each with the nearest (`MATCHES`, by rank).

    Of equally near ones the first counts, in the order of the benchmarks, then of their files. Memory: 8 bytes
    a row beyond the hashes.

    Args:
        hashes: uint64 [N], in the order of the ranks.
        benchmarks: what `benchmark` gave, by name.
    """
    names, files, values = _known(benchmarks, column)
    best = np.full(len(hashes), np.iinfo(np.uint64).max, np.uint64)
    for row, image, distance in pairs_between(np.asarray(hashes, np.uint64), values.astype(np.uint64), bits):
        np.minimum.at(best, row, (distance.astype(np.uint64) << np.uint64(32)) | image.astype(np.uint64))
    rows = np.flatnonzero(best != np.iinfo(np.uint64).max)
    near = best[rows]
    return _matches(rows, (near & np.uint64(0xFFFFFFFF)).astype(np.int64), near >> np.uint64(32), names, files)


def by_embedding(
    parts: Sequence[Part],
    column: str,
    benchmarks: Mapping[str, pa.Table],
    similarity: float,
    scratch: Path,
    run: Run = inline,
) -> pa.Table:
    """Rows whose embedding has a cosine of `similarity` or more with a benchmark image's, each with the most similar.

    Args:
        parts: see `x2i.pipelines.select.semantic.parts`.
        column: the column of embeddings, in the parts and in the benchmarks' tables, e.g. `embedding`.
        benchmarks: what `benchmark` gave, by name.
        scratch: a folder that all workers see.
        run: calls a function of this module with given arguments, here or elsewhere.

    Raises:
        X2IError: a file has no such column, or embeddings of another length than the benchmark's.
    """
    names, files, values = _known(benchmarks, column)
    scratch.mkdir(parents=True, exist_ok=True)
    with writing(scratch / "benchmarks.npy"):
        np.save(scratch / "benchmarks.npy", values)
    jobs = [(part, column, scratch / "benchmarks.npy", similarity) for part in parts]
    found = list(run(_near, jobs)) if len(values) else []
    ranks, images, nearness = (
        np.concatenate([f[k] for f in found]) if found else np.empty(0, np.int64) for k in range(3)
    )
    order = np.argsort(ranks)
    return _matches(ranks[order], images[order].astype(np.int64), nearness[order], names, files)


def _near(part: Part, column: str, known: Path, similarity: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ranks, embeddings = read_embeddings(part, column)
    images = np.load(known)
    if len(ranks) and embeddings.shape[1] != images.shape[1]:
        raise X2IError(
            f"{part.embeddings}: `{column}` is {embeddings.shape[1]} wide, the benchmark's {images.shape[1]}"
        )
    rows, theirs = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for i in range(0, len(ranks), BLOCK):
        for j in range(0, len(images), BLOCK):
            a, b = similar_pairs(embeddings[i : i + BLOCK], images[j : j + BLOCK], similarity)
            rows.append(a + i)
            theirs.append(b + j)
    row, image = np.concatenate(rows), np.concatenate(theirs)
    cosine = cosines(embeddings, row, images, image)
    order = np.lexsort([image, -cosine, row])
    first = order[np.diff(row[order], prepend=-1) > 0]
    return ranks[row[first]], image[first], cosine[first]


def _known(benchmarks: Mapping[str, pa.Table], column: str) -> tuple[np.ndarray, pa.Array, np.ndarray]:
    """Of all images that have the column: the benchmark's name, the file, the value [M] or [M, D]."""
    tables = [t.append_column("benchmark", pa.array([n] * t.num_rows, pa.string())) for n, t in benchmarks.items()]
    whole = pa.concat_tables([t.select(["benchmark", "file", column]) for t in tables])
    whole = whole.filter(whole[column].is_valid()).combine_chunks()
    values = whole[column].combine_chunks()
    nested = pa.types.is_nested(values.type)
    array = np.asarray(values.flatten()).reshape(len(values), -1) if nested and len(values) else np.asarray(values)
    if nested and len(array):  # of a picture of nothing there may be an embedding of zeros
        good = np.flatnonzero(np.isfinite(array).all(axis=1) & (array != 0).any(axis=1))
        whole, array = whole.take(pa.array(good)), array[good]
    return whole["benchmark"].combine_chunks(), whole["file"].combine_chunks(), array


def _matches(rows: np.ndarray, images: np.ndarray, values: np.ndarray, names: pa.Array, files: pa.Array) -> pa.Table:
    chosen = pa.array(images, pa.int64())
    arrays = [pa.array(rows, pa.int64()), names.take(chosen), files.take(chosen), pa.array(values.astype(np.float64))]
    return pa.table(arrays, schema=MATCHES)
