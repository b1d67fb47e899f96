"""One trainer for pictures and words: both kinds in one step, parts that are frozen, adapters, preferences."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.trainer import corpora
from x2i.base.config import parse_config
from x2i.base.errors import RecipeError
from x2i.model import registry, weights
from x2i.model.base import Chat, Message
from x2i.trainer import checkpoint
from x2i.trainer.config import RunConfig
from x2i.trainer.progress import Silent
from x2i.trainer.run import Result, train


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures to draw, and questions about them."""
    made = [*corpora.samples(36), *corpora.chats(36)]
    return corpora.write(tmp_path_factory.mktemp("mixed") / "corpus", made)


def content(mixed: Path, output: Path, stage: dict[str, Any], **changes: Any) -> dict[str, Any]:
    base = {"name": "only", "resolution": 8, "batch": 8, "lr": 0.004, "betas": [0.9, 0.95], "steps": 4}
    tiny = {
        "preset": "omnigen-tiny",
        "hidden_size": 64,
        "layers": 2,
        "heads": 2,
        "kv_heads": 2,
        "intermediate_size": 96,
    }
    whole = {
        "model": tiny,
        "vae": {"kind": "pixels", "factor": 1},
        "checkpoint_every": 1000,
        "preview": {"per_task": 1, "steps": 2},
        "stages": [base | stage],
    }
    return corpora.run_content(mixed, output, **(whole | changes))


def run(*args: Any, **changes: Any) -> Result:
    return train(parse_config(RunConfig, content(*args, **changes), "test"))


@pytest.fixture(scope="session")
def both(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A model that learned for some seconds to draw and to answer."""
    stage = {"steps": 300, "mixture": {"deblur": 1, "describe": 1}, "warmup": 10, "schedule": "cosine"}
    return run(mixed, tmp_path_factory.mktemp("both") / "run", stage, ema=0.98)


def test_pictures_and_answers_are_learned_side_by_side(both: Result) -> None:
    drawn, answered = both.held_out["deblur"], both.held_out["describe"]
    assert drawn["loss"] < 0.5 * drawn["baseline"]
    assert answered["loss"] < 0.25 * answered["baseline"]  # far below guessing by frequency: the words are learned


def test_answers_depend_on_the_picture(both: Result) -> None:
    loaded = checkpoint.load_model(both.checkpoint)
    right = 0
    for name, image in corpora.crops(6, side=8):
        chat = Chat((Message("user", "<image>What is this?"),), (np.asarray(image),))
        ids = loaded.model.answer(loaded.processor.chats([chat], labels=False), 20, loaded.processor.stop)[0]
        right += loaded.processor.text(ids) == f"This is {name}."
    assert right >= 4


def test_the_preview_shows_answers(both: Result) -> None:
    assert both.preview is not None and both.preview.stat().st_size > 5000


def test_a_stage_trains_the_parts_that_it_names_and_no_other(mixed: Path, tmp_path: Path) -> None:
    start = run(mixed, tmp_path / "a", {"mixture": {"deblur": 1}, "steps": 1})
    changes = {"model": {"weights": str(start.checkpoint)}, "tokenizer": None, "vae": None}
    stage = {"mixture": {"deblur": 1}, "train": ["head", "time"]}
    with pytest.raises(RecipeError, match="nothing that learns takes part in describe"):
        run(mixed, tmp_path / "d", stage | {"mixture": {"describe": 1}}, **changes)
    after = run(mixed, tmp_path / "b", stage, **changes)
    old = load_file(checkpoint.weights_of(start.checkpoint))
    new = load_file(after.checkpoint / "model.safetensors")
    moved = {n for n in old if not torch.equal(old[n], new[n])}
    assert moved and all(n.startswith(("final_layer.", "time_token.", "t_embedder.")) for n in moved)
    with pytest.raises(RecipeError, match=r"stages\.0\.train: no part 'heads'; omnigen has trunk, "):
        run(mixed, tmp_path / "c", {"mixture": {"deblur": 1}, "train": ["heads"]})


def test_adapters_are_trained_alone_written_alone_and_loaded_again(both: Result, mixed: Path, tmp_path: Path) -> None:
    changes = {"model": {"weights": str(both.output), "lora": {"rank": 4}}, "tokenizer": None, "vae": None, "ema": 0.5}
    stage = {"mixture": {"colorize": 1}, "steps": 40, "lr": 0.01}
    tuned = run(mixed, tmp_path / "lora", stage, **changes)
    names = {p.name for p in tuned.checkpoint.iterdir()}
    assert {"adapter", "ema_adapter"} <= names and not {"model.safetensors", "ema.safetensors"} & names
    assert (tuned.checkpoint / "adapter/adapter_model.safetensors").stat().st_size < 40_000
    fresh = run(mixed, tmp_path / "base", {**stage, "steps": 1, "lr": 1e-9}, **changes)
    assert tuned.held_out["colorize"]["loss"] < 0.8 * fresh.held_out["colorize"]["loss"]
    painter, _ = checkpoint.load_painter(tuned.checkpoint)
    base = checkpoint.load_model(tuned.checkpoint, adapters=False)
    changed = {n for n, t in painter.model.state_dict().items() if not torch.equal(t, base.model.state_dict()[n])}
    assert changed and all(n.endswith(("qkv_proj.weight", "o_proj.weight")) for n in changed)


@pytest.mark.parametrize("kind", ["adapters", "preference", "words that are drawn"])
def test_a_run_that_was_cut_goes_on_exactly(kind: str, both: Result, mixed: Path, tmp_path: Path) -> None:
    lora = {"lora": {"rank": 2, "dropout": 0.3}} if kind == "adapters" else {}
    changes: dict[str, Any] = {"model": {"weights": str(both.output), **lora}, "tokenizer": None, "vae": None}
    stage: dict[str, Any] = {"mixture": {"describe": 1}, "steps": 6, "lr": 0.001}
    stage |= {"preference": {"beta": 0.5}} if kind == "preference" else {}
    if kind == "words that are drawn":
        stage |= {"tau": [5, 0.5], "resolution": 32}
        changes = {"model": {"preset": "ovis2-tiny", "tokenizer": {"tokenize": "gumbel_argmax"}}}
    changes |= {"checkpoint_every": 2, "ema": 0.9}

    class Cut(Silent):
        def step(self, stage: str, done: int, loss: float, by_task: dict[str, float]) -> None:
            if done == 5:
                raise MemoryError

    straight = run(mixed, tmp_path / "straight", stage, **changes)
    cut = parse_config(RunConfig, content(mixed, tmp_path / "cut", stage, **changes), "test")
    with pytest.raises(MemoryError):
        train(cut, progress=Cut())
    torch.rand(5)  # another process has other random numbers
    resumed = train(cut)
    assert resumed.steps_now == 2 and resumed.held_out == straight.held_out
    folder = "adapter/adapter_model.safetensors" if lora else "model.safetensors"
    one, two = (load_file(r.checkpoint / folder) for r in (straight, resumed))
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_adapters_stay_with_the_weights_that_they_began_with(mixed: Path, tmp_path: Path) -> None:
    stage: dict[str, Any] = {"mixture": {"deblur": 1}, "steps": 2}
    start = run(mixed, tmp_path / "base", stage)
    changes: dict[str, Any] = {"model": {"weights": str(start.output), "lora": {"rank": 2}}, "tokenizer": None}
    tuned = run(mixed, tmp_path / "lora", stage, vae=None, **changes)
    before = checkpoint.load_model(tuned.checkpoint).model.state_dict()
    other = run(mixed, tmp_path / "other", stage | {"steps": 3, "lr": 0.05})
    shutil.copytree(other.checkpoint, start.output / "step-000003")  # the run went on
    after = checkpoint.load_model(tuned.checkpoint).model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_preferences_move_the_likelihoods_apart(both: Result, mixed: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"model": {"weights": str(both.output)}, "tokenizer": None, "vae": None}
    result = run(
        mixed, tmp_path / "dpo", {"mixture": {"describe": 1}, "steps": 12, "lr": 3e-4, "preference": {}}, **changes
    )
    assert result.train_loss["describe"] < 0.69  # below log 2, where it begins
    with pytest.raises(RecipeError, match=r"stages\.only\.preference: deblur are drawn"):
        run(mixed, tmp_path / "no", {"mixture": {"deblur": 1}, "preference": {}}, **changes)


def test_every_architecture_has_presets_that_name_it() -> None:
    for name, config in registry.presets().items():
        assert config.architecture in registry.architectures(), name


def test_parts_start_from_other_models_checkpoints(mixed: Path, tmp_path: Path) -> None:
    """As {llm: Qwen/Qwen2.5-0.5B-Instruct} does: a language model that transformers saved, and an encoder."""
    tokenizer = {"train": {"vocab_size": 320}}
    numbers = registry.preset("ovis2-tiny").adapted(vocab_size=320, latent_channels=48)
    other = registry.build(numbers)
    other.llm.save_pretrained(tmp_path / "llm")
    state = {n.removeprefix("visual_tokenizer.backbone."): t for n, t in other.state_dict().items() if "backbone" in n}
    weights.save(state, tmp_path / "encoder.safetensors")
    spec: dict[str, Any] = {"llm": str(tmp_path / "llm"), "encoder": str(tmp_path / "encoder.safetensors")}
    stage = {"mixture": {"describe": 1}, "steps": 1, "lr": 1e-12, "resolution": 32}
    changes: dict[str, Any] = {"tokenizer": tokenizer, "preview": {"per_task": 0}}
    made = run(mixed, tmp_path / "run", stage, model={"preset": "ovis2-tiny", "pretrained": spec}, **changes)
    found = load_file(made.checkpoint / "model.safetensors")
    for name, tensor in other.state_dict().items():
        if name in found and name.startswith(("llm.", "visual_tokenizer.backbone.")):
            torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)
    words, table = found["llm.model.embed_tokens.weight"], found["vte.weight"]
    assert abs(float(table.std() / words.std()) - 1) < 0.1  # drawn like the language model's own
    with pytest.raises(RecipeError, match=r"model\.pretrained: no part 'lm'"):
        run(mixed, tmp_path / "no", stage, model={"preset": "ovis2-tiny", "pretrained": {"lm": "x"}}, **changes)
