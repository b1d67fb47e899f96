"""`x2i sample` and `x2i convert` as a user runs them, on tiny models with random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from tests.model import tiny
from x2i.base.errors import RecipeError, X2IError
from x2i.cli.convert import convert
from x2i.cli.sample import sample
from x2i.model import lora
from x2i.model.lora_config import LoRAConfig
from x2i.model.omnigen import layouts, writing
from x2i.model.omnigen.layouts import Layout
from x2i.model.omnigen.pipeline import OmniGenPipeline

app = typer.Typer()
app.command()(sample)
app.command()(convert)


def x2i(*arguments: str | Path) -> str:
    """Run a command; its errors are raised as they reach `x2i.cli.main`."""
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False, standalone_mode=False).stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint on pixels, one with an autoencoder, that in the published layout, an adapter, two photographs."""
    folder = tmp_path_factory.mktemp("sample")
    writing.save(tiny.opened(), folder / "pixels", Layout.X2I)
    made = tiny.opened(tiny.write_vae(folder / "kl"))
    for layout in (Layout.X2I, Layout.PUBLISHED):
        writing.save(made, folder / layout.value, layout)
    lora.attach(made.model, LoRAConfig(rank=2, targets=("o_proj",)))
    with torch.no_grad():
        for layer in lora.adapters(made.model).values():
            layer.lora_B.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    lora.save_adapter(made.model, folder / "adapter")
    pixels = np.random.default_rng(0).integers(0, 255, (37, 52, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    return folder


def pixels(home: Path, tmp_path: Path, checkpoint: str, *options: str | Path) -> np.ndarray:
    out = tmp_path / "out.png"
    x2i("sample", home / checkpoint, "Make the sky darker", "--steps", "2", "--out", out, *options)
    return np.asarray(Image.open(out), int)


def test_a_checkpoint_is_drawn_from_in_its_own_size_and_without_guidance(home: Path, tmp_path: Path) -> None:
    plain = pixels(home, tmp_path, "pixels")
    assert plain.shape == (64, 64, 3)
    assert np.array_equal(plain, pixels(home, tmp_path, "pixels", "--guidance", "1", "--image-guidance", "1"))
    assert not np.array_equal(plain, pixels(home, tmp_path, "pixels", "--guidance", "3"))
    assert not np.array_equal(plain, pixels(home, tmp_path, "pixels", "--seed", "1"))


def test_a_published_folder_is_drawn_from_as_its_publishers_would(home: Path, tmp_path: Path) -> None:
    photo = home / "photo.png"
    given = ("--image", photo, "--size", "input", "--max-input", "48", "--seed", "3")
    drawn = pixels(home, tmp_path, "published", *given)
    pipeline = OmniGenPipeline.from_pretrained(home / "published", device="cpu")
    options: dict[str, Any] = {"num_inference_steps": 2, "max_input_image_size": 48, "seed": 3}
    wanted = pipeline.generate("Make the sky darker", [photo], use_input_image_size_as_output=True, **options)
    assert drawn.shape == (32, 48, 3)  # 52 x 37, scaled to 48 x 34, cut to whole tokens
    assert np.abs(drawn - np.asarray(wanted, int)).max() <= 1


@pytest.mark.parametrize(
    "options",
    [["--separate"], ["--no-cache"], ["--offload-cache"], ["--offload-model"], ["--separate", "--no-cache"]],
    ids=" ".join,
)
def test_every_way_to_compute_draws_the_same_picture(home: Path, tmp_path: Path, options: list[str]) -> None:
    given = ("--image", home / "photo.png", "--size", "32x16", "--guidance", "2", "--image-guidance", "1.5")
    plain = pixels(home, tmp_path, "x2i", *given)
    assert plain.shape == (16, 32, 3)
    assert np.abs(plain - pixels(home, tmp_path, "x2i", *given, *options)).max() <= 1


def test_adapters_and_the_negative_instruction_change_the_picture(home: Path, tmp_path: Path) -> None:
    given = ("--size", "16", "--guidance", "3")
    plain = pixels(home, tmp_path, "x2i", *given)
    assert not np.array_equal(plain, pixels(home, tmp_path, "x2i", *given, "--lora", home / "adapter"))
    assert not np.array_equal(plain, pixels(home, tmp_path, "x2i", *given, "--negative", "a red boat"))
    assert not np.array_equal(plain, pixels(home, tmp_path, "x2i", *given, "--shift", "4"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--image", "missing.jpg"], RecipeError, "missing.jpg: cannot be opened"),
        (["--size", "12by12"], RecipeError, "640x384, or input"),
        (["--size", "input"], RecipeError, "no input image"),
        (["--size", "14"], X2IError, "height 14: must be a multiple of 4"),
        (["--out", "picture.xyz"], RecipeError, r"no image format.*\.xyz"),
        (["--lora", "./nowhere"], X2IError, "./nowhere: no such file or folder"),
    ],
)
def test_sample_says_what_is_wrong(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    error: type[X2IError],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        x2i("sample", home / "pixels", "A cat", *arguments)
    with pytest.raises(X2IError, match="neither a checkpoint"):
        x2i("sample", tmp_path, "A cat")
    with pytest.raises(X2IError, match="./missing: no such file or folder"):
        x2i("sample", "./missing", "A cat")
    assert not list(tmp_path.iterdir())


def test_convert_writes_what_others_open_and_reads_it_back(home: Path, tmp_path: Path) -> None:
    told = json.loads(x2i("convert", home / "x2i", tmp_path / "diffusers", "--layout", "diffusers", "--json"))
    assert told["layout"] == "diffusers" and told["parameters"] > 20_000 and told["bytes"] > 4 * told["parameters"]
    x2i("convert", tmp_path / "diffusers", tmp_path / "back", "--layout", "x2i")
    before, after = (layouts.open_model(f, with_vae=False) for f in (home / "x2i", tmp_path / "back"))
    assert after.layout is Layout.X2I and after.model.config == before.model.config
    states = before.model.state_dict(), after.model.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    drawn = pixels(tmp_path, tmp_path, "back", "--size", "16")
    assert np.array_equal(drawn, pixels(home, tmp_path, "x2i", "--size", "16"))


def test_a_checkpoint_of_adapters_is_converted_with_them_folded_in(home: Path, tmp_path: Path) -> None:
    place = tmp_path / "step-000004"  # as the trainer writes it
    shutil.copytree(home / "adapter", place / "adapter")
    shutil.copyfile(home / "x2i/tokenizer.json", place / "tokenizer.json")
    described = json.loads((home / "x2i/config.json").read_text()) | {"base": str(home / "x2i")}
    (place / "config.json").write_text(json.dumps(described))
    (place / "trainer.json").write_text('{"step": 4}')
    x2i("convert", tmp_path, tmp_path / "whole", "--layout", "x2i")
    given = ("--size", "16", "--guidance", "3")
    wanted = pixels(home, tmp_path, "x2i", *given, "--lora", home / "adapter")
    assert np.array_equal(wanted, pixels(tmp_path, tmp_path, "whole", *given))
    assert np.array_equal(wanted, pixels(home, tmp_path, "x2i", *given, "--lora", place))
    folded = layouts.open_model(place, with_vae=False)
    whole = layouts.open_model(tmp_path / "whole", with_vae=False)
    assert folded.described.base is None and whole.described.base is None
    states = folded.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_convert_can_halve_the_weights(home: Path, tmp_path: Path) -> None:
    x2i("convert", home / "pixels", tmp_path / "half", "--layout", "published", "--dtype", "bfloat16")
    assert (
        2 * (tmp_path / "half/model.safetensors").stat().st_size
        < 1.1 * (home / "pixels/model.safetensors").stat().st_size
    )
    assert pixels(tmp_path, tmp_path, "half", "--size", "16").shape == (16, 16, 3)


def test_convert_says_what_is_wrong(home: Path, tmp_path: Path) -> None:
    with pytest.raises(X2IError, match="the layout `transformer`"):
        x2i("convert", home / "pixels", tmp_path / "out", "--layout", "diffusers")
    with pytest.raises(X2IError, match="exists already"):
        x2i("convert", home / "pixels", tmp_path, "--layout", "published")
    with pytest.raises(X2IError, match="omnigen can be written as published, diffusers, transformer, x2i"):
        x2i("convert", home / "pixels", tmp_path / "out", "--layout", "transformers")
    (tmp_path / "other").mkdir()
    other: dict[str, Any] = {"architecture": "ovis_u1", "model": {}, "vae": None}
    (tmp_path / "other/config.json").write_text(json.dumps(other))
    (tmp_path / "other/trainer.json").write_text('{"step": 3}')
    with pytest.raises(X2IError, match="ovis_u1 can be written as published, x2i"):
        x2i("convert", tmp_path / "other", tmp_path / "out", "--layout", "diffusers")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange/config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(X2IError, match=r"nor a model in its publishers' layout .*ovis2: .*ovis_u1: .*says 'llava'"):
        x2i("convert", tmp_path / "strange", tmp_path / "out", "--layout", "x2i")
    (tmp_path / "sdxl").mkdir()
    (tmp_path / "sdxl/model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(X2IError, match="nor a model in its publishers' layout"):
        x2i("convert", tmp_path / "sdxl", tmp_path / "out", "--layout", "x2i")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["sample", "convert"])
def test_help_has_an_example(command: str) -> None:
    assert f"Example: x2i {command} " in x2i(command, "--help")
