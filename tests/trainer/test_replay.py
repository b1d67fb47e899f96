"""A step that is computed anew is the step that was trained: samples, timesteps, order; the commands show it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from tests.trainer import corpora
from x2i.base.config import parse_config
from x2i.base.errors import RecipeError, X2IError
from x2i.cli.main import app
from x2i.trainer import ledger, replay
from x2i.trainer.config import RunConfig
from x2i.trainer.run import Result, train
from x2i.trainer.speed import measure, trained


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = [*corpora.samples(12), *corpora.chats(12)]
    return corpora.write(tmp_path_factory.mktemp("replayed") / "corpus", made)


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    content = corpora.run_content(corpus, tmp_path_factory.mktemp("replay") / "run", preview={"per_task": 0})
    content["stages"][1]["mixture"] = {"colorize": 1, "describe": 1}
    return train(parse_config(RunConfig, content, "test"))


def test_every_step_is_the_one_that_was_trained(run: Result) -> None:
    told = [row for file, _, _ in ledger.files_of(run.output) for row in pq.read_table(file).to_pylist()]
    setup = replay.open_run(run.output)
    for step in (11, 1, 6, 7, 2):  # in any order
        _, rows = replay.replay(setup, step)
        wanted = [(r["draw"], r["key"], r["task"], r["t"]) for r in told if r["step"] == step]
        assert [(r.draw, r.key, r.task, pytest.approx(r.t) if r.t else None) for r in rows] == sorted(wanted)
    with pytest.raises(X2IError, match="steps 1 to 11"):
        replay.replay(setup, 12)


def test_the_command_draws_what_the_model_was_shown(run: Result, tmp_path: Path) -> None:
    out = tmp_path / "step.png"
    done = CliRunner().invoke(app, ["replay", str(run.output), "--step", "7", "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["samples"]) == 4
    assert Image.open(out).width > 300


def test_what_cannot_be_replayed_is_refused(run: Result, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(X2IError, match="no run here"):
        replay.open_run(tmp_path)
    copy = shutil.copytree(run.output, tmp_path / "copy")
    record = json.loads((copy / "run.json").read_text())
    record["corpora"][0]["digest"] = "0" * 64
    (copy / "run.json").write_text(json.dumps(record))
    with pytest.raises(X2IError, match=r"has changed since the run began: its digest was 0{12}"):
        replay.open_run(copy)


def test_the_loaders_speed_is_measured(corpus: Path, run: Result, tmp_path: Path) -> None:
    config = parse_config(RunConfig, corpora.run_content(corpus, tmp_path / "run"), "test")
    full, reduced, raw = measure(config, "low", steps=5)
    assert [s.what for s in (full, reduced, raw)] == ["full", "reduced", "none"]
    assert full.samples == reduced.samples == raw.samples == 20 and full.steps == 5
    assert 0 < raw.cpu_ms < full.cpu_ms and 0 < raw.reads < 1 < raw.peak_mb
    assert trained(config) is None  # it has not begun
    seconds = trained(parse_config(RunConfig, corpora.run_content(corpus, run.output), "test"), "low")
    assert seconds is not None and 0 < seconds < 10
    with pytest.raises(RecipeError, match="the run has low, high"):
        measure(config, "hihg")


def test_the_command_tells_how_many_times_over_a_step_is_served(corpus: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(corpora.run_content(corpus, tmp_path / "run")))
    told = CliRunner().invoke(app, ["bench-loader", str(file), "--steps", "4", "--step-seconds", "2", "--json"])
    found = json.loads(told.stdout)
    assert told.exit_code == 0 and [row["what"] for row in found["rows"]] == ["full", "reduced", "none"]
    for row in found["rows"]:
        assert row["headspace"] == pytest.approx(row["rate"] * 2 / 4)
    shown = CliRunner().invoke(app, ["bench-loader", str(file), "--steps", "2"]).output
    assert "has not trained" in shown
