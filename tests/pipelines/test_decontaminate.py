"""Rows too near to a benchmark's images are found, with the image; the folder is annotated once per content."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from tests.pipelines.annotating import photo
from x2i.base.config import parse_config
from x2i.base.errors import RecipeError, X2IError
from x2i.pipelines.annotators.base import Annotator, AnnotatorConfig, Item
from x2i.pipelines.annotators.phash import PHash, phash
from x2i.pipelines.annotators.texts import Texts
from x2i.pipelines.images import decode, encode, read_header
from x2i.pipelines.select.decontaminate import Decontaminate, benchmark, by_embedding, by_hash
from x2i.pipelines.select.semantic import parts

NAMES = ("astronaut", "chelsea", "coffee", "rocket")


class Colours(Annotator):
    """A small embedding without a model: coarse colours, less their mean."""

    name = "colours"
    columns = pa.schema({"embedding": pa.list_(pa.float16(), 192)})
    heavy = frozenset({"embedding"})
    calls: ClassVar[list[int]] = []

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        self.calls.append(len(batch))
        rows = [
            cv2.resize(i.pixels, (8, 8), interpolation=cv2.INTER_AREA).ravel() for i in batch if i.pixels is not None
        ]
        centred = np.stack(rows).astype(np.float32) - np.stack(rows).mean(axis=1, keepdims=True)
        flat = pa.array(centred.astype(np.float16).ravel())
        return pa.table({"embedding": pa.FixedSizeListArray.from_arrays(flat, 192)})


def pixels(name: str) -> np.ndarray:
    data = photo(name)
    return decode(data, read_header(data))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A benchmark: photographs in folders, and a file that is none."""
    place = tmp_path / "benchmark"
    for i, name in enumerate(NAMES):
        (place / f"part{i % 2}").mkdir(parents=True, exist_ok=True)
        (place / f"part{i % 2}" / f"{name}.png").write_bytes(encode(pixels(name), "png"))
    (place / "broken.jpg").write_bytes(b"no picture")
    (place / "labels.txt").write_text("astronaut 1")
    return place


def test_hashes_of_the_folder_are_those_of_rows(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        table = benchmark(folder, PHash(AnnotatorConfig()), tmp_path / "lake")
    assert table["file"].to_pylist() == [
        "broken.jpg",
        "part0/astronaut.png",
        "part0/coffee.png",
        "part1/chelsea.png",
        "part1/rocket.png",
    ]
    assert table["hash"].to_pylist() == [None] + [
        phash(pixels(n)) for n in ("astronaut", "coffee", "chelsea", "rocket")
    ]
    assert table["error"].to_pylist() == ["not_an_image", None, None, None, None]
    assert "1 of 5 images" in caplog.text
    assert "broken.jpg" in caplog.text


def test_a_folder_is_annotated_once_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    annotator = Colours(AnnotatorConfig(batch_size=3))
    Colours.calls.clear()
    first = benchmark(folder, annotator, tmp_path / "lake")
    assert Colours.calls == [2, 2]  # batches of three files, one of which is broken
    assert benchmark(folder, annotator, tmp_path / "lake").equals(first)
    shutil.copytree(folder, tmp_path / "moved")
    assert benchmark(tmp_path / "moved", annotator, tmp_path / "lake").equals(first)
    assert len(Colours.calls) == 2
    (folder / "new.png").write_bytes(encode(pixels("rocket"), "png"))
    assert benchmark(folder, annotator, tmp_path / "lake").num_rows == 6
    assert len(Colours.calls) == 4


def test_copies_are_matched_with_their_nearest_image(folder: Path, tmp_path: Path) -> None:
    table = benchmark(folder, PHash(AnnotatorConfig()), tmp_path / "lake")
    again = [decode(d, read_header(d)) for d in (encode(pixels(n), "jpg", 50) for n in ("rocket", "chelsea"))]
    other = pixels("china")
    hashes = np.array([phash(p) for p in (other, *again)], np.uint64)
    found = by_hash(hashes, {"bench": table}, 8)
    assert found["rank"].to_pylist() == [1, 2]
    assert found["benchmark"].to_pylist() == ["bench", "bench"]
    assert found["file"].to_pylist() == ["part1/rocket.png", "part1/chelsea.png"]
    expected = [(int(hashes[i]) ^ phash(pixels(n))).bit_count() for i, n in ((1, "rocket"), (2, "chelsea"))]
    assert found["value"].to_pylist() == expected


def known(hashes: np.ndarray, names: Sequence[str]) -> pa.Table:
    return pa.table({"file": list(names), "hash": pa.array(hashes, pa.uint64())})


def test_every_row_within_the_bound_and_the_first_of_the_nearest() -> None:
    """Against brute force, with planted rows at every distance."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 2**64, 300, dtype=np.uint64)
    images[200:] = images[100:200]  # the same pictures in a second benchmark
    rows = rng.integers(0, 2**64, 30_000, dtype=np.uint64)
    for i in range(2000):
        rows[i] = images[i % 300]
        for bit in rng.choice(64, i % 12, replace=False).tolist():
            rows[i] ^= np.uint64(1 << bit)
    files = [f"{i}.png" for i in range(300)]
    found = by_hash(rows, {"a": known(images[:200], files[:200]), "b": known(images[200:], files[200:])}, 6)
    apart = np.bitwise_count(rows[:, None] ^ images)
    near = np.flatnonzero(apart.min(axis=1) <= 6)
    assert found["rank"].to_pylist() == near.tolist()
    assert found["value"].to_pylist() == apart[near].min(axis=1).tolist()
    assert found["file"].to_pylist() == [files[i] for i in apart[near].argmin(axis=1)]
    assert set(found["benchmark"].to_pylist()) == {"a"}


def test_embeddings_against_brute_force(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, rows = rng.normal(size=(50, 16)).astype(np.float16), rng.normal(size=(400, 16)).astype(np.float16)
    rows[::7] = images[rng.integers(0, 50, len(rows[::7]))] * 2 + 0.1
    made = []
    for file in range(3):
        made.append(str(tmp_path / f"{file}.parquet"))
        flat = pa.array(rows[file::3].ravel())
        lists = pa.FixedSizeListArray.from_arrays(flat, 16)
        pq.write_table(pa.table({"row_id": [str(i) for i in range(file, 400, 3)], "embedding": lists}), made[-1])
    standing = pa.table({"row_id": [str(i) for i in range(400)], "file": [made[i % 3] for i in range(400)]})
    lists = pa.FixedSizeListArray.from_arrays(pa.array(images.ravel()), 16)
    benchmarks = {"b": pa.table({"file": [f"{i}.png" for i in range(50)], "embedding": lists})}
    found = by_embedding(parts(standing, tmp_path), "embedding", benchmarks, 0.8, tmp_path / "scratch")

    def unit(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)

    cosine = unit(rows) @ unit(images).T
    near = np.flatnonzero(cosine.max(axis=1) >= 0.8)
    assert len(near) > 57
    assert found["rank"].to_pylist() == near.tolist()
    assert found["file"].to_pylist() == [f"{i}.png" for i in cosine[near].argmax(axis=1)]
    assert np.allclose(found["value"], cosine[near].max(axis=1))
    assert by_embedding(parts(standing, tmp_path)[::-1], "embedding", benchmarks, 0.8, tmp_path / "x").equals(found)
    narrow = {"b": pa.table({"file": ["a"], "embedding": pa.array([[1.0] * 8], pa.list_(pa.float16(), 8))})}
    with pytest.raises(X2IError, match="16 wide, the benchmark's 8"):
        by_embedding(parts(standing, tmp_path), "embedding", narrow, 0.8, tmp_path / "x")


def test_embeddings_of_a_folder(folder: Path, tmp_path: Path) -> None:
    annotator = Colours(AnnotatorConfig())
    table = benchmark(folder, annotator, tmp_path / "lake")
    crops = [np.ascontiguousarray(pixels(n)[8:-8, 8:-8]) for n in ("china", "coffee")]
    mine = annotator([Item("", None, pixels=p) for p in crops])
    pq.write_table(mine.append_column("row_id", pa.array(["a", "b"])), tmp_path / "unit.parquet")
    standing = pa.table({"row_id": ["a", "b"], "file": [str(tmp_path / "unit.parquet")] * 2})
    found = by_embedding(parts(standing, tmp_path), "embedding", {"x": table}, 0.9, tmp_path / "scratch")
    assert (found["rank"].to_pylist(), found["file"].to_pylist()) == ([1], ["part0/coffee.png"])


def test_nothing_to_match(tmp_path: Path) -> None:
    empty = known(np.empty(0, np.uint64), [])
    assert by_hash(np.arange(5, dtype=np.uint64), {"x": empty}, 64).num_rows == 0
    assert by_hash(np.empty(0, np.uint64), {"x": known(np.zeros(1, np.uint64), ["a"])}, 64).num_rows == 0


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    annotator = PHash(AnnotatorConfig())
    with pytest.raises(RecipeError, match="no such folder"):
        benchmark(tmp_path / "not here", annotator, tmp_path / "lake")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="no image in it"):
        benchmark(tmp_path / "empty", annotator, tmp_path / "lake")
    with pytest.raises(RecipeError, match="more than an image"):
        benchmark(tmp_path, Texts(Texts.Config()), tmp_path / "lake")
    with pytest.raises(RecipeError, match="nothing is compared"):
        parse_config(Decontaminate, {"benchmarks": {"a": "b"}, "perceptual": None}, "recipe")
    with pytest.raises(ValidationError):
        Decontaminate(benchmarks={})
