"""The manifest's file: row groups of one size, and columns that say on which side of a split an image lies."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage.filters
import skimage.measure
import skimage.morphology
import skimage.transform
import sklearn.datasets
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.corpora import Built
from tests.corpus.forgetting import build, make
from tests.corpus.test_verify import edit_info, edit_table, kinds
from x2i import corpus
from x2i.base.seeds import canonical_json, digest
from x2i.corpus import forget
from x2i.corpus.manifest import MADE, SPLIT, STORED, ManifestWriter, corpus_digest
from x2i.corpus.text import rejected_tokens, sample_tokens, text_tokens
from x2i.corpus.verify import verify


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus whose samples share images, as an earlier x2i wrote it. Not to be changed."""
    root = make(tmp_path_factory.mktemp("earlier"))
    file = root / "corpus/manifest.parquet"
    earlier = pq.read_table(file).drop_columns([*SPLIT.names, "text_tokens", "rejected_tokens"])
    pq.write_table(earlier, file, row_group_size=5)
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
            writer.write(table.slice(start, size).select(MADE.names))
            start += size
    with pq.ParquetFile(tmp_path / "m.parquet") as file:
        assert file.schema_arrow.equals(STORED)
        assert [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)] == [7, 7, 7, 3]
        assert file.read().to_pylist() == table.to_pylist()


def test_the_digest_is_of_the_samples_and_not_of_what_follows_from_them(built: Built) -> None:
    opened = corpus.open(built.corpus)
    plain = opened.manifest.drop_columns([*SPLIT.names, "text_tokens"])
    assert corpus_digest(opened.info["shards"], plain.to_batches()) == opened.digest


def test_a_corpus_of_an_earlier_build_is_whole_and_a_build_gives_it_the_columns(made: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(made, tmp_path / "x"))
    assert verify(root / "corpus").ok
    before = corpus.open(root / "corpus").digest
    build(root)
    check_split(root / "corpus")
    assert corpus.open(root / "corpus").digest == before and verify(root / "corpus").ok
    assert corpus.open(root / "corpus").manifest["text_tokens"].null_count == len(corpus.open(root / "corpus"))
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


@pytest.mark.parametrize("column", ["text_tokens", "rejected_tokens"])
def test_verify_finds_a_text_of_another_length(column: str, built: Built, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built.corpus, tmp_path / "corpus"))
    edit_table(folder, "manifest.parquet", lambda rows: rows[3].update({column: 700}))
    report = verify(folder)
    assert kinds(report) == {"manifest_row", "seal"} and report.digest == corpus.open(folder).digest
    assert any("tokens of the text" in f.problem and "700 in the manifest" in f.problem for f in report.faults)


def test_a_build_counts_the_tokens_of_every_text(built: Built) -> None:
    opened = corpus.open(built.corpus)
    rows = opened.manifest.to_pylist()
    drawn = next(r for r in rows if r["output_size"] is not None and r["instruction_chars"])
    assert drawn["text_tokens"] == text_tokens(opened[drawn["key"]].instruction) > 1
    assert all(r["text_tokens"] > 0 for r in rows if r["output_size"] is None or r["instruction_chars"])


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", 0),
        ("a photograph of a cat", 6),
        ("photographs", 2),
        ("Sharpen <img><|image_1|></img> and <image>", 2),
        ("1984, yes!", 4 + 1 + 1 + 1),
        ("\u4e00\u53ea\u732b", 3),
        ("\u043a\u043e\u0442 ...", 1 + 2),
        ("snake_case", 3),
    ],
)
def test_tokens_of_a_text_are_those_of_its_pieces(text: str, tokens: int) -> None:
    assert text_tokens(text) == tokens


def test_of_a_conversation_all_turns_count_and_boxes_besides() -> None:
    turns = [
        {"role": "user", "content": "<image>Where is the <ref-object>?"},
        {"role": "assistant", "content": "<bbox>"},
    ]
    plain = sample_tokens("", turns, {})
    assert plain == text_tokens("Where is the ?") == 4
    assert sample_tokens("", turns, {"ref": ["dog"], "bbox": [[0.1, 0.2, 0.3, 0.4]]}) == plain + 1 + text_tokens(
        "[100, 200, 300, 400]"
    )
    assert sample_tokens("Draw a cat", [], {}) == 3
    assert rejected_tokens(turns, "Not here", {"ref": ["dog"]}) == plain + 1 + 2
    assert rejected_tokens(turns, None, {}) is None


def test_the_estimate_is_nearer_to_a_tokenizer_than_the_number_of_characters() -> None:
    """A byte-level BPE of 8,000 tokens, trained on scikit-image's documentation, is asked about scikit-learn's."""
    lines = [
        [line.strip() for name in module.__all__ for line in (getattr(module, name).__doc__ or "").splitlines()]
        for module in (skimage.filters, skimage.measure, skimage.transform, skimage.morphology, sklearn.datasets)
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    read = [line for part in lines[:-1] for line in part]
    tokenizer.train_from_iterator(read, trainers.BpeTrainer(vocab_size=8000, show_progress=False))
    asked = [line for line in lines[-1] if len(line) > 40]
    real = np.array([len(tokenizer.encode(line).ids) for line in asked], float)

    def left(estimate: list[int]) -> float:
        share = real / estimate
        return float(np.std(share) / np.mean(share))

    assert len(asked) > 500
    ours = left([text_tokens(line) for line in asked])
    assert ours < 0.8 * left([len(line) for line in asked]) and ours < 0.25
