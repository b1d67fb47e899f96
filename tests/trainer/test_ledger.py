"""The ledger tells every sample of every step once, whatever happened to the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tests.trainer import corpora
from x2i.base.config import parse_config
from x2i.base.errors import X2IError
from x2i.cli.main import app
from x2i.trainer import ledger
from x2i.trainer.config import RunConfig
from x2i.trainer.ledger import opened
from x2i.trainer.progress import Silent
from x2i.trainer.run import Result, train


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [row for file, _, _ in ledger.files_of(run) for row in pq.read_table(file).to_pylist()]


def config(corpus: Path, output: Path) -> RunConfig:
    return parse_config(RunConfig, corpora.run_content(corpus, output, preview={"per_task": 0}), "test")


@pytest.fixture(scope="module")
def straight(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return train(config(corpus_folder, tmp_path_factory.mktemp("ledger") / "run"))


def test_every_sample_of_every_step_is_told_once(straight: Result, corpus_folder: Path) -> None:
    rows = rows_of(straight.output)
    assert [r["step"] for r in rows] == [s for s in range(1, 12) for _ in range(4)]
    assert [r["draw"] for r in rows if r["stage"] == "low"] == list(range(20))
    manifest = {r["key"]: r for r in pq.read_table(corpus_folder / "manifest.parquet").to_pylist()}
    for row in rows:
        wanted = manifest[row["key"]]
        assert (row["task"], row["image_id"], row["source"]) == (wanted["task_type"], wanted["image_id"], "photographs")
        assert row["loss"] > 0 and 0 < row["t"] < 1 and row["replaced"] is None


def test_a_run_that_was_cut_tells_the_same(straight: Result, corpus_folder: Path, tmp_path: Path) -> None:
    class Cut(Silent):
        def step(self, stage: str, done: int, loss: float, by_task: dict[str, float]) -> None:
            if done == 8:  # checkpoints lie after 6 and 9
                raise MemoryError

    run = config(corpus_folder, tmp_path / "run")
    with pytest.raises(MemoryError):
        train(run, progress=Cut())
    assert max(r["step"] for r in rows_of(run.output)) == 6
    # as if the power had gone between the ledger and its checkpoint
    (file, _, _), *_ = ledger.files_of(straight.output)
    (run.output / "ledger/00000007-00000009.parquet").write_bytes(file.read_bytes())
    train(run)
    assert rows_of(run.output) == rows_of(straight.output)


def test_a_damaged_sample_is_told_with_its_reason(tmp_path: Path) -> None:
    corpus = corpora.write(tmp_path / "corpus", list(corpora.samples(12)))
    shard = corpus / "shards/00000.tar"
    data = bytearray(shard.read_bytes())
    first = next(r for r in pq.read_table(corpus / "manifest.parquet").to_pylist() if r["task_type"] == "colorize")
    data[first["offset"] + 700] ^= 255
    shard.write_bytes(data)
    run = config(corpus, tmp_path / "run")
    train(run)
    replaced = [r for r in rows_of(run.output) if r["replaced"]]
    assert replaced and all(r["replaced"].startswith(f"{first['key']}: its bytes") for r in replaced)
    assert all(r["key"] != first["key"] for r in replaced)


def test_the_command_answers(straight: Result) -> None:
    def ask(*words: str) -> list[dict[str, Any]]:
        done = CliRunner().invoke(app, ["ledger", str(straight.output), *words, "--json"])
        assert done.exit_code == 0, done.output
        return list(json.loads(done.stdout))

    totals = {r["task"]: r for r in ask()}
    assert {t: r["samples"] for t, r in totals.items()}.keys() == {"text_to_image", "deblur", "colorize"}
    assert sum(r["samples"] for r in totals.values()) == 44
    image = rows_of(straight.output)[0]["image_id"]
    seen = ask("--image", image[:16])
    assert [r["step"] for r in seen] == [r["step"] for r in rows_of(straight.output) if r["image_id"] == image]
    assert len(ask("--spikes", "2")) == 2
    assert ask("--sql", "select count(*) as n from ledger") == [{"n": 44}]
    for words in (["--by", "colour"], ["--sql", "select nothing"], ["--image", "x", "--spikes", "1"]):
        assert CliRunner().invoke(app, ["ledger", str(straight.output), *words]).exit_code != 0
    with pytest.raises(X2IError, match="no ledger here"):
        ledger.opened([straight.output / "logs"])


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger/00000001-00000002.parquet").write_bytes(b"not parquet")
    with pytest.raises(X2IError, match=r"the ledger is damaged .*00000001-00000002\.parquet"):
        opened([tmp_path])
