"""A run may start from a folder in the publishers' layout, all of it or adapters beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.model import test_layouts_ovis_u1 as ovis_u1
from tests.model import tiny
from tests.trainer import corpora
from x2i.base.config import parse_config
from x2i.base.errors import RecipeError, X2IError
from x2i.model import layouts
from x2i.model.base import Request
from x2i.model.sampling import Options
from x2i.trainer import checkpoint
from x2i.trainer.config import RunConfig
from x2i.trainer.run import train


def write(kind: str, folder: Path) -> layouts.Opened[Any]:
    """A tiny model in its publishers' layout."""
    if kind == "ovis_u1":
        opened = ovis_u1.made(folder.parent / "kl")
    else:
        opened = tiny.opened(tiny.write_vae(folder.parent / "kl"))
    layouts.save(opened, folder, "published")
    return opened


@pytest.mark.parametrize(("kind", "lora"), [("omnigen", False), ("omnigen", True), ("ovis_u1", False)])
def test_a_published_model_is_tuned(kind: str, lora: bool, corpus_folder: Path, tmp_path: Path) -> None:
    opened = write(kind, tmp_path / "published")
    content = corpora.run_content(corpus_folder, tmp_path / "run", preview={"per_task": 1, "steps": 1})
    content["model"] = {"weights": str(tmp_path / "published")} | ({"lora": {"rank": 2}} if lora else {})
    content |= {"vae": None, "tokenizer": None, "ema": None, "checkpoint_every": 1}
    content["stages"] = [content["stages"][0] | {"resolution": 32, "steps": 2, "lr": 1e-9}]
    config = parse_config(RunConfig, content, "test")
    result = train(config)
    state = opened.model.state_dict()
    loaded = checkpoint.load_model(result.checkpoint)
    for name, tensor in loaded.model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], atol=1e-5, rtol=0)
    assert loaded.processor.tokenizer.to_str() == opened.tokenizer.to_str()
    assert loaded.vae is not None and loaded.vae.channels == 4
    assert loaded.painter.paint([Request("a red boat")], Options(32, 32, steps=1))
    names = {p.name for p in result.checkpoint.iterdir()}
    assert ("adapter" in names) is lora and ("model.safetensors" in names) is not lora
    assert result.finished and train(config).steps_now == 0


def test_other_numbers_than_the_weights_are_refused(corpus_folder: Path, tmp_path: Path) -> None:
    write("omnigen", tmp_path / "published")
    content = corpora.run_content(corpus_folder, tmp_path / "run", model={"weights": str(tmp_path / "published")})
    content["model"]["layers"] = 3
    content |= {"vae": None, "tokenizer": None}
    with pytest.raises(X2IError, match="has other numbers"):
        train(parse_config(RunConfig, content, "test"))
    (tmp_path / "empty").mkdir()
    content["model"] = {"weights": str(tmp_path / "empty")}
    with pytest.raises((RecipeError, X2IError), match="does not say which model it is"):
        train(parse_config(RunConfig, content, "test"))
    assert load_file(tmp_path / "published/model.safetensors")
