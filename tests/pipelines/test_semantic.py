"""Semantic duplicates against brute force; photographs seen again; nothing depends on files, order or workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pipelines.annotating import photo
from x2i.base.cluster import ray_session
from x2i.base.errors import X2IError
from x2i.pipelines.engine.pool import Job, Pool, through
from x2i.pipelines.images import decode, encode, read_header
from x2i.pipelines.select import semantic
from x2i.pipelines.select.semantic import Part, parts, semantic_duplicates, similar

Fallen = dict[int, int]


def by_definition(embeddings: np.ndarray, similarity: float) -> Fallen:
    """Row -> survivor: each against every better one, in float64."""
    wide = embeddings.astype(np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    kept: list[int] = []
    fallen = {}
    for i, row in enumerate(wide):
        near = [k for k in kept if wide[k] @ row >= similarity]
        if near:
            fallen[i] = near[0]
        else:
            kept.append(i)
    return fallen


def clouds(count: int, width: int = 24, seed: int = 0, spread: float = 0.15) -> np.ndarray:
    """Unit vectors in clouds, some of them near copies; half floats, as the lake has them."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(12, width))
    rows = centres[rng.integers(0, 12, count)] + spread * rng.normal(size=(count, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def lake(folder: Path, embeddings: np.ndarray, seed: int = 0, files: int = 5) -> list[Part]:
    """Embeddings in files, as annotators leave them: rows in any order; and the parts made of them."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    of = rng.integers(0, files, len(embeddings))
    for file in range(files):
        mine = rng.permutation(np.flatnonzero(of == file))
        flat = pa.array(embeddings[mine].ravel())
        lists = pa.FixedSizeListArray.from_arrays(flat, embeddings.shape[1])
        table = pa.table({"row_id": [f"row {i}" for i in mine], "embedding": lists})
        pq.write_table(table, folder / f"{file}.parquet")
    standing = pa.table(
        {"row_id": [f"row {i}" for i in range(len(of))], "file": [str(folder / f"{f}.parquet") for f in of]}
    )
    return parts(standing, folder / "scratch")


def fallen(made: list[Part], folder: Path, similarity: float, **options: Any) -> Fallen:
    got = semantic_duplicates(made, "embedding", similarity, folder, **options)
    assert (np.diff(got.dropped) > 0).all()
    assert (got.similarity >= similarity).all()
    return dict(zip(got.dropped.tolist(), got.survivor.tolist(), strict=True))


@pytest.mark.parametrize("similarity", [0.5, 0.9, 0.97, 1.0])
def test_one_cluster_equals_brute_force(tmp_path: Path, similarity: float, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = clouds(700)
    embeddings[500:520] = embeddings[:20]
    made = lake(tmp_path / "lake", embeddings)
    whole = fallen(made, tmp_path / "whole", similarity, clusters=1)
    if similarity < 1:  # rounding decides whether a vector is quite like itself
        assert whole == by_definition(embeddings, similarity)
    assert {i: i - 500 for i in range(500, 520)}.items() <= fallen(made, tmp_path / "s", 0.9999, clusters=1).items()
    monkeypatch.setattr(semantic, "BLOCK", 64)
    monkeypatch.setattr(semantic, "SURVIVORS", 10)
    assert fallen(made, tmp_path / "blocks", similarity, clusters=1) == whole


def test_clusters_equal_brute_force_within_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = clouds(900)
    made = lake(tmp_path / "lake", embeddings)
    monkeypatch.setattr(semantic, "JOB_BYTES", 4000)  # several jobs
    got = fallen(made, tmp_path / "scratch", 0.8, clusters=20)
    centroids = np.load(tmp_path / "scratch" / "centroids.npy")
    assert len(centroids) == 20
    assert np.allclose(np.linalg.norm(centroids, axis=1), 1)
    of = (embeddings.astype(np.float64) @ centroids.T.astype(np.float64)).argmax(axis=1)
    expected: Fallen = {}
    for cluster in range(20):
        mine = np.flatnonzero(of == cluster)
        expected |= {int(mine[a]): int(mine[b]) for a, b in by_definition(embeddings[mine], 0.8).items()}
    assert got == expected
    assert len(expected) > 100


def test_few_near_copies_are_lost_between_clusters(tmp_path: Path) -> None:
    embeddings = clouds(4000, width=64)
    rng = np.random.default_rng(1)
    copies = (embeddings[:400].astype(np.float32) + 0.005 * rng.normal(size=(400, 64))).astype(np.float16)
    made = lake(tmp_path / "lake", np.concatenate([embeddings, copies]))
    got = fallen(made, tmp_path / "scratch", 0.99, clusters=66)
    assert sum(got.get(4000 + i) == i for i in range(400)) > 380


@pytest.mark.parametrize("clusters", [1, 15])
def test_files_and_their_order_change_nothing(tmp_path: Path, clusters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = clouds(600)
    monkeypatch.setattr(semantic, "PER_CENTROID", 20)  # a sample, not all rows
    first = lake(tmp_path / "a", embeddings)
    other = lake(tmp_path / "b", embeddings, seed=1, files=3)
    expected = fallen(first, tmp_path / "1", 0.85, clusters=clusters)
    assert expected
    assert fallen(first[::-1], tmp_path / "2", 0.85, clusters=clusters) == expected
    assert fallen(other, tmp_path / "3", 0.85, clusters=clusters) == expected

    def backwards(function: Any, jobs: Any) -> Any:
        return [function(*job) for job in reversed(jobs)]

    assert fallen(other, tmp_path / "4", 0.85, clusters=clusters, run=backwards) == expected


def test_the_same_on_ray(tmp_path: Path) -> None:
    made = lake(tmp_path / "lake", clouds(500))
    expected = fallen(made, tmp_path / "inline", 0.85, clusters=10)
    with ray_session(1, None):
        import ray

        class Caller:
            def call(self, function: Any, *arguments: Any) -> Any:
                return function(*arguments)

        actor = ray.remote(Caller).options(num_cpus=0.5)
        pool = Pool(lambda: actor.remote(), 2)

        def keep(job: Job) -> Job:
            return job

        assert fallen(made, tmp_path / "ray", 0.85, clusters=10, run=through(lambda j: pool.run(j, keep))) == expected


def test_many_equal_embeddings_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 rows have 200 million pairs."""
    embeddings = np.repeat(clouds(2), 10_000, axis=0)
    dropped, survivor, cosine = similar(embeddings, 0.9)
    assert len(dropped) == 19_998
    assert set(survivor.tolist()) == {0, 10_000}
    assert np.allclose(cosine, 1)


def feature(data: bytes) -> np.ndarray:
    """A picture's colours, coarsely, less their mean: enough to know it again."""
    pixels = decode(data, read_header(data))
    small = cv2.resize(pixels, (16, 16), interpolation=cv2.INTER_AREA).astype(np.float32).ravel()
    return (small - small.mean()).astype(np.float16)


def test_photographs_again_encoded_and_cropped(tmp_path: Path) -> None:
    names = ["astronaut", "chelsea", "coffee", "rocket", "china", "flower"]
    pictures = [decode(d, read_header(d)) for d in map(photo, names)]
    again = [encode(p, "jpg", quality=60) for p in pictures]
    cropped = [encode(np.ascontiguousarray(p[6:-6, 6:-6]), "jpg", quality=80) for p in pictures]
    embeddings = np.stack([feature(d) for d in [*map(photo, names), *again, *cropped]])
    got = fallen(lake(tmp_path / "lake", embeddings), tmp_path / "scratch", 0.95)
    count = len(names)
    assert got == {i: i % count for i in range(count, 3 * count)}


def test_rows_without_an_embedding_stay(tmp_path: Path) -> None:
    file = tmp_path / "0.parquet"
    rows = [[1, 0], None, [0, 0], [1, 0], [float("nan"), 1], None]
    lists = pa.array(rows, pa.list_(pa.float32(), 2))
    pq.write_table(pa.table({"row_id": list("abcdef"), "embedding": lists}), file)
    standing = pa.table({"row_id": list("fedcba"), "file": [str(file)] * 6})
    got = semantic_duplicates(parts(standing, tmp_path / "x"), "embedding", 0.9, tmp_path / "y")
    assert (got.dropped.tolist(), got.survivor.tolist(), got.without) == ([5], [2], 4)


def test_rows_that_fell_before_take_no_part(tmp_path: Path) -> None:
    """Only those that stand are in `standing`; the file has them all."""
    made = lake(tmp_path / "lake", np.repeat(clouds(1), 3, axis=0), files=1)
    standing = pa.table({"row_id": ["row 2", "row 1"], "file": [str(made[0].embeddings)] * 2})
    assert fallen(parts(standing, tmp_path / "x"), tmp_path / "y", 0.9) == {1: 0}


def test_nothing_in_nothing_out(tmp_path: Path) -> None:
    empty = pa.table({"row_id": pa.array([], pa.string()), "file": pa.array([], pa.string())})
    assert len(semantic_duplicates(parts(empty, tmp_path), "embedding", 0.9, tmp_path).dropped) == 0


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    made = lake(tmp_path / "a", clouds(10)) + lake(tmp_path / "b", clouds(10, width=8))
    with pytest.raises(X2IError, match=r"no column 'feature'"):
        semantic_duplicates(made, "feature", 0.9, tmp_path / "x")
    with pytest.raises(X2IError, match=r"different lengths: 8, 24"):
        semantic_duplicates(made, "embedding", 0.9, tmp_path / "x")
