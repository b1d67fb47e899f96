"""The manifest's file: row groups of one size, and columns that say on which side of a split an image lies."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.corpora import Built
from tests.corpus.forgetting import build, make
from tests.corpus.test_verify import edit_info, edit_table, kinds
from x2i import corpus
from x2i.base.seeds import canonical_json, digest
from x2i.corpus import forget
from x2i.corpus.manifest import SCHEMA, SPLIT, STORED, ManifestWriter, corpus_digest
from x2i.corpus.verify import verify


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus whose samples share images, as an earlier x2i wrote it. Not to be changed."""
    root = make(tmp_path_factory.mktemp("earlier"))
    file = root / "corpus/manifest.parquet"
    pq.write_table(pq.read_table(file).drop_columns(SPLIT.names), file, row_group_size=5)
    found = hashlib.sha256(file.read_bytes()).hexdigest()

    def reseal(info: dict[str, Any]) -> None:
        info["files"]["manifest.parquet"] = found
        del info["seal"]
        info["seal"] = hashlib.sha256(canonical_json(info).encode()).hexdigest()

    edit_info(root / "corpus", reseal)
    return root


def point(image: str) -> int:
    return int(digest("held-out/1", image)[:8], 16)


def check_split(folder: Path) -> None:
    rows = pq.read_table(folder / "manifest.parquet").to_pylist()
    assert any(row["split_others"] is not None for row in rows)
    for row in rows:
        others = [point(i) for i in row["images"] if i != row["image_id"]]
        assert (row["split"], row["split_others"]) == (point(row["image_id"]), min(others, default=None))


@pytest.mark.parametrize("sizes", [(24,), (1, 2, 3, 18), (10, 0, 14)])
def test_row_groups_have_one_size_however_the_rows_come(built: Built, tmp_path: Path, sizes: tuple[int, ...]) -> None:
    table = corpus.open(built.corpus).manifest
    start = 0
    with ManifestWriter(tmp_path / "m.parquet", row_group=7) as writer:
        for size in sizes:
            writer.write(table.slice(start, size).select(SCHEMA.names))
            start += size
    with pq.ParquetFile(tmp_path / "m.parquet") as file:
        assert file.schema_arrow.equals(STORED)
        assert [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)] == [7, 7, 7, 3]
        assert file.read().to_pylist() == table.to_pylist()


def test_the_digest_is_of_the_samples_and_not_of_what_follows_from_them(built: Built) -> None:
    opened = corpus.open(built.corpus)
    plain = opened.manifest.drop_columns(SPLIT.names)
    assert corpus_digest(opened.info["shards"], plain.to_batches()) == opened.digest


def test_a_corpus_of_an_earlier_build_is_whole_and_a_build_gives_it_the_columns(made: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(made, tmp_path / "x"))
    assert verify(root / "corpus").ok
    before = corpus.open(root / "corpus").digest
    build(root)
    check_split(root / "corpus")
    assert corpus.open(root / "corpus").digest == before and verify(root / "corpus").ok
    written = (root / "corpus/manifest.parquet").stat().st_mtime_ns
    build(root)
    assert (root / "corpus/manifest.parquet").stat().st_mtime_ns == written


def test_what_is_left_after_a_forget_has_the_columns(made: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(made, tmp_path / "x"))
    image = corpus.open(root / "corpus").manifest["image_id"][0].as_py()
    forget.forget(root / "corpus", [image], lake=root / "lake")
    check_split(root / "corpus")
    assert verify(root / "corpus").ok


@pytest.mark.parametrize("column", SPLIT.names)
def test_verify_finds_a_row_on_the_wrong_side(built: Built, tmp_path: Path, column: str) -> None:
    folder = Path(shutil.copytree(built.corpus, tmp_path / "corpus"))
    edit_table(folder, "manifest.parquet", lambda rows: rows[3].update({column: 7}))
    report = verify(folder)
    assert kinds(report) == {"manifest_split", "seal"} and pa.types.is_uint32(STORED.field(column).type)
    assert report.digest == corpus.open(folder).digest
