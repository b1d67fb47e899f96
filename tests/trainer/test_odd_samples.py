"""Conversations that are not as one would wish: left out and told, or learned; none of them ends a run."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.trainer import corpora
from tests.trainer.corpora import Made
from x2i.base.config import parse_config
from x2i.base.errors import X2IError
from x2i.corpus.sample import Sample
from x2i.trainer.config import RunConfig
from x2i.trainer.run import Result, train

MODELS: dict[str, Any] = {
    "omnigen": {"preset": "omnigen-tiny", "hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 2},
    "ovis_u1": "ovis-u1-tiny",
    "ovis2": "ovis2-tiny",
    "mini_gemini": "mini-gemini-tiny",
}
ASKED = (("user", "<image>What is this?"), ("assistant", "A cat."))


def chat(number: int, turns: Any = ASKED, image: Image.Image | None = None, rejected: str | None = None) -> Made:
    shown = image or Image.fromarray(np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    image_id = hashlib.sha256(bytes([number])).hexdigest()
    messages = tuple({"role": role, "content": text} for role, text in turns)
    made = Sample(
        f"{image_id[:12]}-x", "describe", "", (corpora.picture(shown),), None, messages, rejected_response=rejected
    )
    return Made(made, image_id)


def run(folder: Path, made: Callable[[int], Made], model: Any, stage: dict[str, Any] | None = None) -> Result:
    corpus = corpora.write(folder / "corpus", [made(i) for i in range(12)])
    base = {"name": "a", "resolution": 32, "batch": 4, "lr": 1e-3, "steps": 2, "mixture": {"describe": 1}}
    whole = {"model": model, "stages": [base | (stage or {})], "ema": None, "max_text_tokens": 64, "held_out": 0.3}
    whole |= {"preview": {"per_task": 3, "answer_tokens": 2}}
    return train(parse_config(RunConfig, corpora.run_content(corpus, folder / "run", **whole), "run.yaml"))


@pytest.mark.parametrize("model", MODELS)
def test_an_image_may_come_with_a_later_question(model: str, tmp_path: Path) -> None:
    turns = (("user", "Hello"), ("assistant", "Yes?"), *ASKED)
    made = run(tmp_path, lambda i: chat(i, turns), MODELS[model])
    assert made.finished and made.preview is not None and not made.damaged


@pytest.mark.parametrize(
    ("turns", "told"),
    [
        ((("user", "What is this?"), ("assistant", "A cat.")), "0 marks <image>, and it has 1 images"),
        ((("user", "<image><image>What?"), ("assistant", "A cat.")), "2 marks <image>"),
        ((("user", "<image>What is this?"),), "no message of it is the assistant's"),
        ((("tool", "<image>"), ("assistant", "A cat.")), "the role 'tool'"),
    ],
)
def test_a_conversation_that_contradicts_itself_gives_way_to_another(turns: Any, told: str, tmp_path: Path) -> None:
    made = run(tmp_path, lambda i: chat(i, turns if i % 2 else ASKED), MODELS["ovis2"])
    assert made.finished and made.damaged and all(told in d["reason"] for d in made.damaged)


def test_where_all_are_so_the_reason_is_told(tmp_path: Path) -> None:
    with pytest.raises(X2IError, match="33 samples of describe .*0 marks <image>"):
        run(tmp_path, lambda i: chat(i, (("user", "?"), ("assistant", "!"))), MODELS["ovis2"])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", [(1000, 1, 3), (1, 1000, 3), (1, 1, 3)])
def test_thin_pictures_end_no_run(
    model: str, shape: tuple[int, int, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    thin = Image.fromarray(np.full(shape, 90, np.uint8))
    with caplog.at_level(logging.WARNING):
        made = run(tmp_path, lambda i: chat(i, ASKED, thin if i % 2 else None), MODELS[model])
    assert made.finished
    # OmniGen has no positions for a thousand pixels of so small a model: these are left out, and told
    assert ("left out: sample " in caplog.text) == (model == "omnigen" and 1000 in shape)


def test_turns_that_a_template_cannot_write_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    turns = (("user", "<image>"), ("user", "What is this?"), ("assistant", "A cat."))
    with caplog.at_level(logging.WARNING):
        made = run(tmp_path, lambda i: chat(i, turns if i % 2 else ASKED), MODELS["mini_gemini"])
    assert made.finished and "it is: user, user, assistant" in caplog.text
    with pytest.raises(X2IError, match="sample .*-x .describe.: .*it is: user, user, assistant"):
        run(tmp_path / "all", lambda i: chat(i, turns), MODELS["mini_gemini"])


@pytest.mark.parametrize("model", ["omnigen", "ovis2", "mini_gemini"])
def test_answers_that_are_cut_off_are_told_of(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    turns = (("user", "<image>" + "What is this? " * 60), ("assistant", "A cat."))
    with caplog.at_level(logging.WARNING):
        made = run(tmp_path, lambda i: chat(i, turns), MODELS[model])
    assert caplog.text.count("nothing is learned from sample") == 1
    assert not made.held_out  # a loss of 0 over no tokens would look perfect


def test_preferences_are_learned_from_samples_that_have_them(tmp_path: Path) -> None:
    stage: dict[str, Any] = {"preference": {}}
    model = MODELS["omnigen"]
    assert run(tmp_path / "a", lambda i: chat(i, rejected="A dog." if i % 2 else None), model, stage).finished
    with pytest.raises(X2IError, match="none has a rejected_response to learn from"):
        run(tmp_path / "b", chat, model, stage)


@pytest.mark.parametrize("rejected", [7, ["A dog."], "<image>"])
def test_a_rejected_answer_that_is_no_text_gives_way_in_packs_too(rejected: Any, tmp_path: Path) -> None:
    stage = {"preference": {}, "batch": None, "pack": {"tokens": 512, "packs": 1}}
    made = run(tmp_path, lambda i: chat(i, rejected="A dog." if i % 3 else rejected), MODELS["ovis2"], stage)
    assert made.finished and {d["reason"] for d in made.damaged} == {"its rejected_response is not a text"}


def test_objects_of_another_layout_give_way(tmp_path: Path) -> None:
    def made(number: int) -> Made:
        found = chat(number)
        return found if number % 2 else replace(found, sample=replace(found.sample, objects=[{"ref": "a cat"}]))

    found = run(tmp_path, made, MODELS["ovis2"])
    assert found.finished and found.damaged and all("AttributeError" in d["reason"] for d in found.damaged)
