"""`x2i verify` and `x2i trace` as commands: exit codes, JSON for machines, words for people."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.corpora import Built
from x2i import corpus
from x2i.base.errors import RecipeError
from x2i.cli.trace import trace


def verify(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "x2i", "verify", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_verify_ends_with_0_if_whole_1_if_damaged_2_if_there_is_none(built: Built, tmp_path: Path) -> None:
    whole = verify(built.corpus, "--json")
    assert whole.returncode == 0, whole.stderr
    report = json.loads(whole.stdout)
    assert report["ok"] is True
    assert report["digest"] == corpus.open(built.corpus).digest
    copy = built.copy(tmp_path / "copy")
    shard = copy.corpus / "shards/00000.tar"
    shard.write_bytes(shard.read_bytes()[:9000])
    damaged = verify(copy.corpus, "--no-images")
    assert damaged.returncode == 1
    assert "shards/00000.tar" in damaged.stderr
    assert "What helps: " in damaged.stderr
    assert damaged.stdout == ""
    nothing = verify(tmp_path)
    assert nothing.returncode == 2
    assert "not a corpus" in nothing.stderr


@pytest.fixture
def run(built: Built, monkeypatch: pytest.MonkeyPatch) -> tuple[CliRunner, typer.Typer]:
    monkeypatch.chdir(built.root)
    app = typer.Typer()
    app.command()(trace)
    return CliRunner(), app


def test_trace_prints_the_whole_lineage(run: tuple[CliRunner, typer.Typer]) -> None:
    runner, app = run
    key = corpus.open("corpus").manifest["key"][0].as_py()
    done = runner.invoke(app, ["corpus", key], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    told = json.loads(runner.invoke(app, ["corpus", key, "--json"]).stdout)
    for part in (key, told["row"]["image_id"], told["sample"]["shard"], "sharp_enough", "blockiness", told["digest"]):
        assert part in done.output


def test_trace_says_why_a_file_is_not_there(run: tuple[CliRunner, typer.Typer]) -> None:
    runner, app = run
    done = runner.invoke(app, ["corpus", "--row", "page.jpg"])
    assert "fell at decode: not_an_image" in done.output


@pytest.mark.parametrize("arguments", [["corpus"], ["corpus", "abc", "--row", "x"], ["corpus", "nowhere"]])
def test_trace_refuses_what_names_no_sample(run: tuple[CliRunner, typer.Typer], arguments: list[str]) -> None:
    runner, app = run
    assert isinstance(runner.invoke(app, arguments).exception, RecipeError)
