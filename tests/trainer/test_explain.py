"""`x2i train RUN --explain`: published runs without their corpora and weights, and a run whose corpus is there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.trainer import corpora
from x2i.base.config import parse_config
from x2i.cli.main import app
from x2i.trainer.config import RunConfig, load_run
from x2i.trainer.explain import explain
from x2i.trainer.told import Devices, Explained

CONFIGS = Path(__file__).parents[2] / "configs/train"


@pytest.fixture(scope="module")
def omnigen() -> Explained:
    return explain(load_run(CONFIGS / "omnigen.yaml"), Devices(104, "a100", 0.4))


def test_omnigen_as_published(omnigen: Explained) -> None:
    """FACTS of the paper: 3,762,072,592 parameters, five stages, and so many pictures."""
    assert omnigen.parameters == 3_762_072_592
    assert [s.trained for s in omnigen.stages] == [omnigen.parameters] * 5
    assert [s.samples for s in omnigen.stages] == [520e6, 156e6, 20.8e6, 3.12e6, 8.32e6]
    assert omnigen.total("steps") == 1_010_000
    assert any("not a corpus" in note for note in omnigen.notes)
    assert all(d.epochs is None for s in omnigen.stages for d in s.tasks.values())


def test_flops_and_time_follow_from_tokens(omnigen: Explained) -> None:
    first = omnigen.stages[0]
    layers = 32 * (9216 * 3072 + 3072 * 3072 + 16384 * 3072 + 3072 * 8192)
    assert 6 * layers < first.flops / first.tokens < 6.4 * layers  # attention is little at 256 pixels
    assert first.seconds == pytest.approx(first.flops / (104 * 312e12 * 0.4))
    assert omnigen.stages[3].flops / omnigen.stages[3].tokens > 1.2 * first.flops / first.tokens  # and not at 2240
    assert first.memory.optimiser == 8 * 3_762_072_592 / 104


def test_ovis_u1_trains_what_the_paper_says() -> None:
    told = explain(load_run(CONFIGS / "ovis_u1.yaml"))
    parts = {part: count for stage in told.stages for part, count in stage.trains.items()}
    assert parts == {
        "refiner": 81_054_720,
        "decoder": 1_046_172_688,
        "adapter": 134_217_728,
        "encoder": 578_534_392,
        "llm": 1_720_574_976,
    }
    assert [list(s.trains) for s in told.stages][3] == ["encoder", "adapter", "llm"]
    frozen, trained = told.stages[1], told.stages[2]  # the same samples; in s2 the encoder learns too
    assert frozen.flops / frozen.samples < trained.flops / trained.samples


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("explain")
    made = [*corpora.samples(24), *corpora.chats(24)]
    stages: list[dict[str, Any]] = [
        {"name": "one", "resolution": 32, "steps": 30, "batch": 8, "lr": 1e-3, "mixture": {"deblur": 3, "describe": 1}},
        {"name": "two", "resolution": 64, "steps": 10, "batch": 8, "lr": 1e-3, "mixture": {"text_to_image": 1}},
    ]
    content = corpora.run_content(corpora.write(folder / "corpus", made), folder / "run", stages=stages)
    return parse_config(RunConfig, content | {"model": "omnigen-tiny", "held_out": 0.2}, "test")


def test_samples_are_counted_in_the_corpus(run: RunConfig) -> None:
    told = explain(run, Devices(1, "h100", 0.5))
    first, second = told.stages
    blurred = first.tasks["deblur"]
    assert blurred.share == 0.75 and blurred.samples == 180
    assert blurred.there is not None and blurred.there < 24  # the others are held out
    assert blurred.epochs == 180 / blurred.there
    (corpus,) = first.corpora.values()
    assert corpus.samples == 240 and corpus.there == sum(d.there or 0 for d in first.tasks.values())
    assert first.images == pytest.approx(180 * 2 + 60)
    assert second.images == 80
    # 64 pixels are 64 tokens; six words, or none where the condition is dropped
    assert second.tokens / 80 == pytest.approx(64 + 0.8 * 6 + 0.2, abs=1.5)


def test_tables_fit_eighty_columns(run: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(app, ["train", str(CONFIGS / "ovis2.yaml"), "--explain", "--devices", "16"])
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80
    assert re.search(r"trains +last_block +encoder", result.output)
    assert "sharded over 16 ranks" in result.output and "16 h100 (assumed" in result.output.replace("\n", " ")


def test_json_for_machines_and_nothing_is_trained(run: RunConfig, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(run.model_dump_json(exclude_unset=True))
    given = [
        "train",
        str(file),
        "--explain",
        "--json",
        "--set",
        f"output={tmp_path / 'made'}",
        "--set",
        "stages.two.steps=5",
    ]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [s["samples"] for s in told["stages"]] == [240, 40]
    assert told["total"]["flops"] == pytest.approx(sum(s["flops"] for s in told["stages"]))
    assert not (tmp_path / "made").exists()
