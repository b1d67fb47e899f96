"""`x2i train` and `x2i sample` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
import yaml
from PIL import Image
from typer.testing import CliRunner

from tests.trainer import corpora
from x2i.base.errors import RecipeError, X2IError
from x2i.cli.sample import sample
from x2i.cli.train import train

app = typer.Typer()
app.command()(train)
app.command()(sample)


def x2i(*arguments: str | Path) -> str:
    """Run a command; its errors are raised as they reach `x2i.cli.main`."""
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False, standalone_mode=False).stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    corpus = corpora.write(folder / "corpus", list(corpora.samples(8)))
    (folder / "run.yaml").write_text(yaml.safe_dump(corpora.run_content(corpus, folder / "train")))
    return folder / "run.yaml"


def test_train_prints_json_and_a_second_call_computes_nothing(run: Path) -> None:
    first, second = (json.loads(x2i("train", run, "--json")) for _ in range(2))
    assert first["finished"] and first["steps_now"] == 11 and Path(first["checkpoint"]).name == "step-000011"
    assert second["finished"] and second["steps_now"] == 0 and second["held_out"] == first["held_out"]
    x2i("train", run)  # and the table for people


def test_sample_draws_from_a_run_or_a_checkpoint_with_and_without_an_image(run: Path, tmp_path: Path) -> None:
    x2i("train", run, "--json")
    Image.new("RGB", (50, 40), "red").save(tmp_path / "in.jpg")
    drawn = tmp_path / "drawn.png"
    told = json.loads(x2i("sample", run.parent / "train", "A cat", "--out", drawn, "--steps", "2", "--json"))
    assert Image.open(drawn).size == (24, 24)  # the last stage's resolution
    assert told["checkpoint"].endswith("step-000011")
    arguments = ("--image", tmp_path / "in.jpg", "--size", "24x16", "--steps", "2", "--out", tmp_path / "b.jpg")
    x2i("sample", run.parent / "train/step-000005", "Sharpen", *arguments)
    assert Image.open(tmp_path / "b.jpg").size == (24, 16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--image", "missing.jpg"], RecipeError, "missing.jpg: cannot be opened"),
        (["--size", "12by12"], RecipeError, "640x384"),
        (["--size", "12"], X2IError, "height 12: must be a multiple of 8"),
        (["--out", "picture.xyz"], RecipeError, r"no image format.*\.xyz"),
    ],
)
def test_sample_says_what_is_wrong(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    error: type[X2IError],
    message: str,
) -> None:
    x2i("train", run, "--json")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        x2i("sample", run.parent / "train", "A cat", *arguments)
    with pytest.raises(X2IError, match="neither a checkpoint"):
        x2i("sample", tmp_path, "A cat")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "sample"])
def test_help_has_an_example(command: str) -> None:
    assert f"Example: x2i {command} " in x2i(command, "--help")
