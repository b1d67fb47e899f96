"""A published Ovis-U1 folder, tiny: `x2i sample` draws from it, `x2i convert` goes there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from tests.model.test_layouts_ovis_u1 import made
from x2i.base.errors import X2IError
from x2i.cli.convert import convert
from x2i.cli.sample import sample
from x2i.model import layouts, weights
from x2i.model.base import Request
from x2i.model.ovis_u1 import layouts as ovis_u1
from x2i.model.ovis_u1.processor import OvisU1Processor
from x2i.model.sampling import Options, Painter

app = typer.Typer()
app.command()(sample)
app.command()(convert)


def x2i(*arguments: str | Path) -> str:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False, standalone_mode=False).stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ovis")
    layouts.save(made(folder / "kl"), folder / "published", "published")
    (folder / "published/x2i.json").unlink()  # as AIDC-AI publishes it
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (36, 50, 3), dtype=np.uint8)).save(folder / "photo.png")
    return folder


def drawn(home: Path, tmp_path: Path, *arguments: str | Path) -> np.ndarray:
    out = tmp_path / "out.png"
    x2i("sample", home, "Make the sky darker", "--steps", "2", "--out", out, *arguments)
    return np.asarray(Image.open(out), int)


@pytest.mark.parametrize("images", [False, True], ids=["words", "edit"])
def test_sample_draws_as_its_publishers_would(home: Path, tmp_path: Path, images: bool) -> None:
    photo = ("--image", home / "photo.png") if images else ()
    picture = drawn(home / "published", tmp_path, "--size", "48x32", *photo)
    opened = ovis_u1.open_model(home / "published")
    processor = OvisU1Processor(opened.model.config, opened.tokenizer, opened.vae)
    assert opened.vae is not None
    painter = Painter(opened.model, opened.vae, processor)
    text, image = (6.0, 1.5) if images else (5.0, 1.0)
    shown = [Image.open(home / "photo.png")] if images else []
    options: dict[str, Any] = {"height": 32, "width": 48, "steps": 2, "guidance": text, "image_guidance": image}
    wanted = painter.generate("Make the sky darker", shown, **options)
    assert picture.shape == (32, 48, 3) and picture.std() > 5
    assert np.abs(picture - np.asarray(wanted, int)).max() <= 1
    if not images:  # shifted by the resolution
        request, plain = [Request("Make the sky darker")], Options(32, 48, steps=2, guidance=text, image_guidance=image)
        flat = painter.draw(request, Options(32, 48, steps=2, guidance=text, image_guidance=image, shift=1.0))
        assert (painter.draw(request, plain) - flat).abs().max() > 1e-4


def test_convert_goes_to_a_checkpoint_and_back_with_the_same_picture(home: Path, tmp_path: Path) -> None:
    x2i("convert", home / "published", tmp_path / "ours", "--layout", "x2i")
    x2i("convert", tmp_path / "ours", tmp_path / "back", "--layout", "published")
    options = ("--size", "32", "--image", home / "photo.png")
    there = drawn(home / "published", tmp_path, *options)
    here = drawn(tmp_path / "ours", tmp_path, *options, "--guidance", "6", "--image-guidance", "1.5")
    assert np.array_equal(there, here)
    assert np.array_equal(there, drawn(tmp_path / "back", tmp_path, *options))
    before, after = (weights.read(folder) for folder in (home / "published", tmp_path / "back"))
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    with pytest.raises(X2IError, match="exists already"):
        x2i("convert", home / "published", tmp_path / "ours", "--layout", "x2i")
    with pytest.raises(X2IError, match="ovis_u1 can be written as published, x2i"):
        x2i("convert", home / "published", tmp_path / "other", "--layout", "diffusers")


def test_an_edit_may_take_the_published_size_of_its_source(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OvisU1Processor, "edit_size", lambda self, height, width: (height - 4, width - 2))
    picture = drawn(home / "published", tmp_path, "--image", home / "photo.png", "--size", "input")
    assert picture.shape == (32, 48, 3)
