"""`x2i ask` as a user runs it: checkpoints of ours, published folders and transformers', and pictures of answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from tests.model import test_layouts_mini_gemini as mini_gemini
from tests.model import test_layouts_ovis2 as ovis2
from tests.model import tiny
from x2i.base.errors import RecipeError, X2IError
from x2i.cli.ask import ask
from x2i.cli.pictures import open_image
from x2i.model import layouts
from x2i.model.base import Chat, Message
from x2i.model.mini_gemini import generation
from x2i.model.mini_gemini.processor import MiniGeminiProcessor
from x2i.model.ovis2.processor import Ovis2Processor

app = typer.Typer()
app.command()(ask)
QUESTION = "What is this?"


def x2i(*arguments: str | Path) -> str:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False, standalone_mode=False).stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Ovis2 in every layout, a published Mini-Gemini, an OmniGen, a photograph larger than a checkpoint's pictures."""
    folder = tmp_path_factory.mktemp("ask")
    for layout in ("published", "transformers", "x2i"):
        layouts.save(ovis2.made(), folder / layout, layout)
    layouts.save(mini_gemini.made(), folder / "mgm", "published")
    layouts.save(tiny.opened(), folder / "omnigen", "published")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (36, 50, 3), dtype=np.uint8)).save(folder / "photo.png")
    return folder


def answer(place: Path, *options: str | Path) -> str:
    told: dict[str, Any] = json.loads(x2i(place, QUESTION, "--max-tokens", "12", "--json", *options))
    assert told["checkpoint"] == str(place) and 0 < told["tokens"] <= 12
    return str(told["answer"])


@pytest.mark.parametrize("layout", ["published", "transformers", "x2i"])
def test_every_layout_answers_the_same(home: Path, layout: str) -> None:
    opened = ovis2.made()
    processor = Ovis2Processor(opened.model.config, opened.tokenizer, None)
    picture = np.asarray(Image.open(home / "photo.png"))
    chat = Chat((Message("user", f"<image>\n{QUESTION}"),), (picture,))
    ids = opened.model.answer(processor.chats([chat], labels=False), 12, processor.stop)[0]
    wanted = processor.text(ids)
    assert answer(home / layout, "--image", home / "photo.png") == wanted
    assert answer(home / layout) != wanted  # without the picture


def test_a_gpu_gets_published_weights_in_bfloat16(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    class Stop(Exception):
        pass

    def opened(place: Path, *, dtype: torch.dtype, with_vae: bool) -> None:
        seen.append(dtype)
        raise Stop

    monkeypatch.setattr("x2i.model.ovis2.layouts.open_model", opened)
    for device in ("cpu", "cuda"):
        with pytest.raises(Stop):
            x2i(home / "published", QUESTION, "--device", device)
    assert seen == [torch.float32, torch.bfloat16]


def test_a_picture_is_drawn_of_the_answers_prompt(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    chats = MiniGeminiProcessor.chats

    def noted(self: MiniGeminiProcessor, found: Any, labels: bool, plain: bool = False) -> Any:
        asked.append(found[0].messages[-1].text)
        return chats(self, found, labels, plain)

    drawn: list[tuple[Any, ...]] = []

    class Painter:
        def __init__(self, weights: str, device: str) -> None:
            drawn.append((weights, device))

        def __call__(self, reply: str, **options: Any) -> np.ndarray:
            drawn.append((generation.split_prompt(reply), options))
            return np.full((8, 8, 3), 200, np.uint8)

    monkeypatch.setattr(MiniGeminiProcessor, "chats", noted)
    monkeypatch.setattr(MiniGeminiProcessor, "text", lambda self, ids: "Here: <h>a red boat</h>")
    monkeypatch.setattr(generation, "Painter", Painter)
    out = tmp_path / "boat.png"
    options = ("--max-tokens", "2", "--out", out, "--steps", "3", "--seed", "4")
    x2i(home / "mgm", "Draw a boat", *options)
    assert np.asarray(Image.open(out)).mean() == 200
    assert json.loads(x2i(home / "mgm", "Draw", *options, "--draw", "./sdxl", "--json")) == {
        "answer": "Here: <h>a red boat</h>",
        "tokens": 2,
        "checkpoint": str(home / "mgm"),
        "out": str(out),
    }
    assert asked == ["Draw a boat <GEN>", "Draw <GEN>"]
    made = ("a red boat", {"steps": 3, "seed": 4})
    assert drawn == [("stabilityai/stable-diffusion-xl-base-1.0", "cpu"), made, ("./sdxl", "cpu"), made]
    x2i(home / "mgm", "Draw a boat", "--max-tokens", "2")
    assert asked[-1] == "Draw a boat" and len(drawn) == 4


def test_what_is_wrong_is_said(home: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="1 <image>, but 0 pictures"):
        x2i(home / "x2i", "What is <image>?")
    with pytest.raises(RecipeError, match="--draw needs --out"):
        x2i(home / "mgm", "Draw", "--draw", "./sdxl")
    with pytest.raises(RecipeError, match="no image format"):
        x2i(home / "mgm", "Draw", "--out", tmp_path / "boat.xyz")
    with pytest.raises(X2IError, match="answers of ovis2 are not drawn, only those of mini_gemini"):
        x2i(home / "x2i", "Draw", "--out", tmp_path / "boat.png")
    with pytest.raises(X2IError, match="no prompt between <h> and </h>"):
        x2i(home / "mgm", "Draw", "--max-tokens", "2", "--out", tmp_path / "boat.png")
    with pytest.raises(X2IError, match="omnigen that writes no text"):
        x2i(home / "omnigen", QUESTION)
    with pytest.raises(X2IError, match="neither a checkpoint .* nor a run .* nor a model in its publishers' layout"):
        x2i(tmp_path, QUESTION)
    assert not list(tmp_path.iterdir())


def test_help_has_an_example() -> None:
    assert "Example: x2i ask " in x2i("--help")


def test_pictures_are_opened_as_a_build_opens_them(tmp_path: Path) -> None:
    """Transparency lies on white, 16 bits are scaled and not cut off, and a page of text is no picture."""
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "page.jpg").write_text("<html>")
    assert np.asarray(open_image(tmp_path / "clear.png")).min() == 255
    assert abs(int(np.asarray(open_image(tmp_path / "deep.png")).mean()) - 128) <= 1
    for name in ("page.jpg", "absent.png"):
        with pytest.raises(RecipeError, match=f"--image .*{name}: cannot be opened"):
            open_image(tmp_path / name)
