"""Semantic duplicates: pictures whose embeddings all but coincide, found cluster by cluster.

SemDeDup (Abbas et al. 2023, arXiv 2303.09540): k-means over the embeddings, then cosines within each cluster.
Here the rule is that of `near_duplicates`, so that the recipe's order says which row stays: a row falls to the
best of its cluster that stays and is similar enough (the paper keeps the row farthest from the centroid).

Three passes of jobs, each a function of files: sample (the centroids are learnt from the rows whose embedding
has a small hash), assign (a file's rows, sorted by cluster, are laid down in `scratch`), judge (some clusters at a
time). Results do not depend on the order of files or jobs, nor on how many work: whatever float32 leaves in
doubt is decided by float64, summed in one order.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from x2i.base.config import Config
from x2i.base.errors import X2IError
from x2i.base.files import writing
from x2i.pipelines.select.dedup import STAYS_HERE, down_the_order

#: Up to so many rows there is one cluster, and so nothing is missed; beyond, the square root of their number.
ONE_CLUSTER = 20_000
#: Rows from which each centroid is learnt, on average, and rounds of learning.
PER_CENTROID, ROUNDS = 64, 10
#: Rows compared at once; survivors that they are compared with at once; bytes of embeddings that a job takes on.
BLOCK, SURVIVORS, JOB_BYTES = 1024, 4096, 256 * 2**20
#: What float32 may be wrong by: cosines this near to a decision are computed again.
DOUBT = 1e-5

#: Calls a function with each of the tuples of arguments, here or on other machines; results in any order.
Run = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Iterable[Any]]


class Semantic(Config):
    """Near-duplicate removal on an embedding."""

    column: str = Field("classes.embedding", description="annotator.column with an embedding, e.g. clip.embedding")
    similarity: float = Field(
        0.9, gt=0, le=1, description="pictures whose embeddings have this cosine or more are the same, e.g. 0.95"
    )
    clusters: int | None = Field(
        None,
        gt=0,
        description="only rows of one cluster are compared, e.g. 1000; default: 1 for up to 20,000 rows, else the "
        "square root of their number",
    )

    @property
    def annotator(self) -> str:
        """The recipe's name of the annotator."""
        return self.column.partition(".")[0]


@dataclass(frozen=True)
class Part:
    """A file of the lake with embeddings, and a file that says which of its rows stand, and their ranks (0 is best)."""

    embeddings: Path
    standing: Path


@dataclass(frozen=True)
class SemanticDuplicates:
    """Ranks: row `dropped[i]` falls to `survivor[i]` (int64), whose cosine is `similarity[i]` (float64); by `dropped`.

    `without` rows had no embedding, or one of zeros; they are near nothing.
    """

    dropped: np.ndarray
    survivor: np.ndarray
    similarity: np.ndarray
    clusters: int
    without: int


def inline(function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """One job after another, in this process."""
    return (function(*job) for job in jobs)


def parts(standing: pa.Table, scratch: Path) -> list[Part]:
    """Divide the rows that stand by the file that their embedding lies in.

    Args:
        standing: `row_id` and `file`, best first: a row's place is its rank.
        scratch: a folder that all workers see.
    """
    folder = scratch / "standing"
    folder.mkdir(parents=True, exist_ok=True)
    files = pc.dictionary_encode(standing["file"].combine_chunks())
    of = np.asarray(files.indices)
    order = np.argsort(of, kind="stable")
    bounds = np.searchsorted(of[order], np.arange(len(files.dictionary) + 1))
    out = []
    for i, file in enumerate(files.dictionary.to_pylist()):
        ranks = order[bounds[i] : bounds[i + 1]]
        path = folder / f"{i}.parquet"
        pq.write_table(pa.table({"row_id": standing["row_id"].take(ranks), "rank": ranks}), path)
        out.append(Part(Path(file), path))
    return out


def semantic_duplicates(
    parts: Sequence[Part],
    column: str,
    similarity: float,
    scratch: Path,
    clusters: int | None = None,
    run: Run = inline,
) -> SemanticDuplicates:
    """Drop each row whose embedding has a cosine of `similarity` or more with that of a better row that stays.

    Only rows of one cluster are compared. Memory: of a job 256 MiB of embeddings, or the largest cluster, twice;
    here the centroids and 64 rows for each of them. `scratch` takes the embeddings once more, at 2 bytes a number
    where they are half floats.

    Args:
        parts: see `parts`.
        column: a list of floats, all of one length, e.g. `embedding`; it need not be normalised.
        similarity: 1 - epsilon of the paper, above 0, at most 1.
        scratch: an empty folder that all workers see; the caller removes it.
        clusters: how many; None takes 1 for up to 20,000 rows, else the square root of their number.
        run: calls functions of this module with given arguments.

    Raises:
        X2IError: a file has no such column, or embeddings of another length.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    rows = sum(pq.read_metadata(p.standing).num_rows for p in parts)
    count = clusters or (1 if rows <= ONE_CLUSTER else round(math.sqrt(rows)))
    share = min(1.0, PER_CENTROID * count / max(rows, 1)) if count > 1 else 0.0
    sampled = list(run(_sample, [(p, column, share) for p in parts]))
    have, widths = sum(s[0] for s in sampled), {s[1].shape[1] for s in sampled if s[0]}
    if len(widths) > 1:
        raise X2IError(f"embeddings in `{column}` of different lengths: {', '.join(map(str, sorted(widths)))}")
    if not have:
        none = np.empty(0, np.int64)
        return SemanticDuplicates(none, none, np.empty(0), 0, rows)
    centroids = _learn([s[1] for s in sampled if s[0]], count)
    del sampled
    _save(scratch / "centroids.npy", centroids)

    jobs = [(p, column, scratch / "centroids.npy", scratch / f"part-{i}") for i, p in enumerate(parts)]
    sizes = np.zeros(len(centroids), np.int64)
    for found in run(_assign, jobs):
        sizes += found
    groups = _groups(sizes, centroids.shape[1])
    judged = list(run(_judge, [(scratch, len(parts), first, last, similarity) for first, last in groups]))
    dropped, survivor, cosine = (np.concatenate([j[k] for j in judged]) for k in range(3))
    order = np.argsort(dropped)
    return SemanticDuplicates(dropped[order], survivor[order], cosine[order], len(centroids), rows - have)


def _groups(sizes: np.ndarray, width: int) -> list[tuple[int, int]]:
    """Clusters [first, last) that one job takes on."""
    most = max(1, JOB_BYTES // (2 * width))
    out, first, held = [], 0, 0
    for cluster, size in enumerate(sizes.tolist()):
        if held and held + size > most:
            out.append((first, cluster))
            first, held = cluster, 0
        held += size
    return [*out, (first, len(sizes))]


def read_embeddings(part: Part, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Ranks, ascending, int64 [N], and embeddings [N, D] (as stored) of the rows that stand and have one."""
    if column not in pq.read_schema(part.embeddings).names:
        raise X2IError(f"{part.embeddings}: no column {column!r}")
    stored = pq.read_table(part.embeddings, columns=["row_id", column])
    standing = pq.read_table(part.standing)
    at = pc.index_in(standing["row_id"], value_set=stored["row_id"])
    there = pc.is_valid(at)
    ranks = np.asarray(standing["rank"].filter(there))
    lists = stored[column].take(at.filter(there)).combine_chunks()
    some = np.flatnonzero(np.asarray(lists.is_valid()))
    lists, ranks = lists.take(pa.array(some)), ranks[some]
    if not len(lists):
        return np.empty(0, np.int64), np.empty((0, 1), np.float16)
    lengths = pc.unique(pc.list_value_length(lists))
    if len(lengths) != 1:
        raise X2IError(f"{part.embeddings}: `{column}` has lists of different lengths: {lengths.to_pylist()}")
    embeddings = np.asarray(lists.flatten()).reshape(len(lists), -1)
    good = np.isfinite(embeddings).all(axis=1) & (embeddings != 0).any(axis=1)
    ranks, embeddings = ranks[good], embeddings[good]
    order = np.argsort(ranks)
    return ranks[order], embeddings[order]


def _sample(part: Part, column: str, share: float) -> tuple[int, np.ndarray]:
    """How many rows have an embedding, and the embeddings with the smallest hashes: that share of them."""
    _, embeddings = read_embeddings(part, column)
    below = int(share * 2**64)
    chosen = [i for i, row in enumerate(embeddings) if int.from_bytes(_hash(row)[:8], "big") < below] if share else []
    return len(embeddings), embeddings[chosen]


def _hash(row: np.ndarray) -> bytes:
    return hashlib.blake2b(row.tobytes(), digest_size=16).digest()


def _learn(samples: list[np.ndarray], count: int) -> np.ndarray:
    """Centroids, float32 [C, D] of length 1: spherical k-means, begun at the rows with the smallest hashes.

    Sums are taken in one order, in float64.
    """
    width = samples[0].shape[1]
    if count == 1:
        return np.full((1, width), 1 / math.sqrt(width), np.float32)
    unordered = np.concatenate(samples)
    hashes = [_hash(row) for row in unordered]
    rows = unordered[sorted(range(len(hashes)), key=hashes.__getitem__)]
    del unordered, hashes
    new = np.concatenate([[True], (rows[1:] != rows[:-1]).any(axis=1)]) if len(rows) else np.ones(0, bool)
    if not new.any():
        return np.full((1, width), 1 / math.sqrt(width), np.float32)
    centroids = _unit(rows[new][:count])
    for _ in range(ROUNDS):
        nearest = _nearest(rows, centroids)
        sums = np.zeros((len(centroids), width))
        order = np.argsort(nearest, kind="stable")
        for start in range(0, len(order), BLOCK):
            some = order[start : start + BLOCK]
            of, begins = np.unique(nearest[some], return_index=True)
            sums[of] += np.add.reduceat(_unit(rows[some]).astype(np.float64), begins, axis=0)
        filled = np.flatnonzero((sums != 0).any(axis=1))  # a centroid that nothing is nearest to stays where it is
        before = centroids.copy()
        centroids[filled] = _unit(sums[filled])
        if (centroids == before).all():
            break
    return centroids


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows at length 1, float32."""
    wide = rows.astype(np.float32)
    return wide / np.sqrt((wide * wide).sum(axis=1, keepdims=True))


def _nearest(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Each row's most similar centroid, the first of equals; int64 [N]."""
    out = np.empty(len(rows), np.int64)
    for start in range(0, len(rows), BLOCK):
        cosines = _unit(rows[start : start + BLOCK]) @ centroids.T
        out[start : start + BLOCK] = cosines.argmax(axis=1)
        close = cosines >= cosines.max(axis=1, keepdims=True) - DOUBT
        for row in np.flatnonzero(close.sum(axis=1) > 1):
            candidates = np.flatnonzero(close[row])
            exact = (centroids[candidates].astype(np.float64) * rows[start + row].astype(np.float64)).sum(axis=1)
            out[start + row] = candidates[exact.argmax()]
    return out


def _assign(part: Part, column: str, centroids: Path, out: Path) -> np.ndarray:
    """Lay a file's rows down, sorted by cluster, then rank; how many each cluster got."""
    ranks, embeddings = read_embeddings(part, column)
    known = np.load(centroids)
    if len(ranks):
        of = _nearest(embeddings, known) if len(known) > 1 else np.zeros(len(ranks), np.int64)
    else:
        of, embeddings = np.empty(0, np.int64), np.empty((0, known.shape[1]), np.float16)
    order = np.argsort(of, kind="stable")
    sizes = np.bincount(of, minlength=len(known))
    _save(Path(f"{out}.embeddings.npy"), embeddings[order])
    _save(Path(f"{out}.ranks.npy"), ranks[order])
    _save(Path(f"{out}.ends.npy"), np.cumsum(sizes))
    return sizes


def _save(path: Path, values: np.ndarray) -> None:
    with writing(path):
        np.save(path, values)


def _judge(
    scratch: Path, count: int, first: int, last: int, similarity: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The duplicates in the clusters [first, last) of `count` parts: ranks of dropped and survivors, and their cosines."""
    ranks, rows, clusters = [], [], []
    for path in (scratch / f"part-{i}" for i in range(count)):
        ends = np.concatenate([[0], np.load(f"{path}.ends.npy")])[first : last + 1]
        if ends[-1] > ends[0]:
            ranks.append(np.load(f"{path}.ranks.npy", mmap_mode="r")[ends[0] : ends[-1]])
            rows.append(np.load(f"{path}.embeddings.npy", mmap_mode="r")[ends[0] : ends[-1]])
            clusters.append(np.repeat(np.arange(first, last), np.diff(ends)))
    out: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    if ranks:
        rank, cluster = np.concatenate(ranks), np.concatenate(clusters)
        embeddings = np.concatenate(rows)
        order = np.lexsort([rank, cluster])
        bounds = np.flatnonzero(np.diff(cluster[order], prepend=-1, append=-1))
        for begin, end in itertools.pairwise(bounds):
            if end - begin > 1:
                mine = order[begin:end]
                dropped, survivor, cosine = similar(embeddings[mine], similarity)
                out.append((rank[mine][dropped], rank[mine][survivor], cosine))
    none = np.empty(0, np.int64)
    out.append((none, none, np.empty(0)))
    dropped, survivor, cosine = (np.concatenate([o[k] for o in out]) for k in range(3))
    return dropped, survivor, cosine


def similar(embeddings: np.ndarray, similarity: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Within one cluster, best first: the rows that fall, the best similar one that stays of each, and their cosines.

    Args:
        embeddings: float [N, D], finite, none of zeros.
    """
    count = len(embeddings)
    fell = np.full(count, -1, np.int64)
    kept, held = np.empty(count, np.int64), 0
    for start in range(0, count, BLOCK):
        rows = np.arange(start, min(start + BLOCK, count))
        for first in range(0, held, SURVIVORS):  # the best survivors first: who is caught by one needs no other
            theirs = kept[first : min(first + SURVIVORS, held)]
            a, b = _pairs(embeddings, rows, theirs, similarity)
            near, once = np.unique(a, return_index=True)
            fell[rows[near]] = theirs[b[once]]
            rows = np.delete(rows, near)
        a, b = _pairs(embeddings, rows, rows, similarity)
        better, worse = a[a < b], b[a < b]
        local = down_the_order((worse.astype(np.uint64) << np.uint64(32)) | better.astype(np.uint64), len(rows))
        stays = local == STAYS_HERE
        fell[rows[~stays]] = rows[local[~stays]]
        stayed = rows[stays]
        kept[held : held + len(stayed)] = stayed
        held += len(stayed)
    dropped = np.flatnonzero(fell >= 0)
    return dropped, fell[dropped], cosines(embeddings, dropped, embeddings, fell[dropped])


def _pairs(embeddings: np.ndarray, a: np.ndarray, b: np.ndarray, similarity: float) -> tuple[np.ndarray, np.ndarray]:
    """Places in `a` and in `b` of rows whose cosine is `similarity` or more, by the place in `a`, then in `b`."""
    return similar_pairs(embeddings[a], embeddings[b], similarity)


def similar_pairs(mine: np.ndarray, theirs: np.ndarray, similarity: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two sets, float [N, D] and [M, D], whose cosine is `similarity` or more, by the first, then the second.

    Holds N x M cosines.
    """
    found = _unit(mine) @ _unit(theirs).T
    a, b = np.divmod(np.flatnonzero(found >= similarity - DOUBT), found.shape[1] or 1)
    unsure = np.flatnonzero(found[a, b] < similarity + DOUBT)
    fine = np.ones(len(a), bool)
    fine[unsure] = cosines(mine, a[unsure], theirs, b[unsure]) >= similarity
    return a[fine], b[fine]


def cosines(x: np.ndarray, a: np.ndarray, y: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines of rows `x[a]` with `y[b]`, float64 [len(a)], to 9 digits, the same on every machine."""
    out = np.empty(len(a))
    at_once = max(1, (1 << 20) // max(1, x.shape[1]))
    for start in range(0, len(a), at_once):
        p = x[a[start : start + at_once]].astype(np.float64)
        q = y[b[start : start + at_once]].astype(np.float64)
        lengths = np.sqrt((p * p).sum(axis=1) * (q * q).sum(axis=1))
        out[start : start + at_once] = np.round((p * q).sum(axis=1) / lengths, 9)
    return out
