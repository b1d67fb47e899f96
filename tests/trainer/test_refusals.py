"""What a run file may not say: refused before the first step, with the key and what would be right."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.trainer import corpora
from x2i.base.config import parse_config
from x2i.base.errors import RecipeError, X2IError
from x2i.trainer.config import RunConfig
from x2i.trainer.progress import Silent
from x2i.trainer.run import Result, train
from x2i.trainer.stage import Stage

TINY = {"preset": "omnigen-tiny", "hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 2, "intermediate_size": 48}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = [*corpora.samples(12), *corpora.chats(12)]
    return corpora.write(tmp_path_factory.mktemp("refusals") / "corpus", made)


def config(corpus: Path, output: Path, stage: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    base = {"name": "a", "resolution": 16, "batch": 2, "lr": 1e-3, "steps": 2, "mixture": {"deblur": 1}}
    whole = {"model": TINY, "preview": {"per_task": 0}, "stages": [base | (stage or {})], "ema": None}
    return parse_config(RunConfig, corpora.run_content(corpus, output, **(whole | changes)), "run.yaml")


@pytest.fixture(scope="module")
def start(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return train(config(corpus, tmp_path_factory.mktemp("refusals") / "start"))


@pytest.mark.parametrize(
    ("stage", "changes", "told"),
    [
        ({"betas": [0.9, 1.0]}, {}, r"stages\.0\.betas\.1: .*less than 1"),
        ({"mixture": {"deblur": float("nan")}}, {}, r"stages\.0\.mixture\.deblur: .*finite"),
        ({"clip": float("inf")}, {}, r"stages\.0\.clip: .*finite"),
        ({"tau": [1, 0]}, {}, r"stages\.0\.tau\.1: .*greater than 0"),
        ({"train": []}, {}, r"stages\.0\.train: a stage that trains nothing"),
        (
            {"edit_loss": {"kind": "paper", "tasks": ["debblur"]}},
            {},
            r"edit_loss\.tasks: 'debblur' is not in the mixture",
        ),
        ({}, {"model": {"weights": "somewhere"}}, r"tokenizer: the weights know the words of their own"),
        ({}, {"model": {"weights": "a", "pretrained": {"llm": "b"}}, "tokenizer": None}, r"model: pretrained: "),
        ({"inputs": {"hidden_size": 64}}, {}, r"stages\.0\.inputs\.hidden_size: it says what the network is"),
        ({"tau": [5, 0.05]}, {}, r"stages\.0\.tau: this model has no tokenizer with a temperature"),
        ({}, {"device": "cuda:99"}, r"device: 'cuda:99' cannot be had here"),
    ],
)
def test_a_run_that_could_not_work_is_refused(
    stage: dict[str, Any], changes: dict[str, Any], told: str, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=told):
        train(config(corpus, tmp_path / "run", stage, **changes))


def test_a_preference_without_worse_answers_is_refused_at_the_start(tmp_path: Path) -> None:
    made = [replace(m, sample=replace(m.sample, rejected_response=None)) for m in corpora.chats(6)]
    folder = corpora.write(tmp_path / "corpus", [*made, *corpora.samples(4)])
    model = TINY | {"text_head": True}
    later = {"name": "b", "resolution": 16, "batch": 2, "lr": 1e-3, "steps": 2, "mixture": {"describe": 1}}
    of_run = config(folder, tmp_path / "run", model=model)
    of_run = of_run.model_copy(
        update={"stages": (*of_run.stages, parse_config(Stage, later | {"preference": {}}, "b"))}
    )
    with pytest.raises(
        RecipeError, match=r"stages\.b\.preference: 5 samples of describe .* none has a rejected_response"
    ):
        train(of_run)


def test_numbers_that_say_how_a_model_reads_may_change(corpus: Path, tmp_path: Path) -> None:
    stage = {"mixture": {"describe": 1}, "inputs": {"max_pixels": 1600}, "steps": 1}
    with pytest.raises(RecipeError, match=r"inputs\.max_tokens: .* how it reads: min_pixels, max_pixels"):
        train(config(corpus, tmp_path / "no", stage | {"inputs": {"max_tokens": 99}}, model="ovis-u1-tiny"))
    made = train(config(corpus, tmp_path / "run", stage, model="ovis-u1-tiny"))
    assert json.loads((made.checkpoint / "config.json").read_text())["model"]["max_pixels"] == 1600


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ({"instruction": "x", "images": ["no/such.png"]}, "no/such.png"),
        ({"instruction": "x <img><|image_3|></img>"}, r"preview\.prompts\.0: 0 input images"),
    ],
)
def test_a_prompt_that_cannot_be_drawn_is_refused_before_the_training(
    prompt: dict[str, Any], told: str, corpus: Path, tmp_path: Path
) -> None:
    steps: list[int] = []

    class Count(Silent):
        def step(self, stage: str, done: int, loss: float, by_task: dict[str, float]) -> None:
            steps.append(done)

    with pytest.raises(X2IError, match=told):
        train(config(corpus, tmp_path / "run", preview={"per_task": 0, "prompts": [prompt]}), progress=Count())
    assert not steps


def test_adapters_learn_within_the_parts_that_a_stage_names(start: Result, corpus: Path, tmp_path: Path) -> None:
    adapters = {"weights": str(start.output), "lora": {"rank": 2, "targets": ["qkv_proj", "final_layer.linear"]}}
    changes: dict[str, Any] = {"model": adapters, "tokenizer": None, "vae": None}
    made = train(config(corpus, tmp_path / "run", {"train": ["head"]}, **changes))
    found = load_file(made.checkpoint / "adapter/adapter_model.safetensors")
    moved = {n.split(".")[2] for n, t in found.items() if n.endswith("lora_B.weight") and t.any()}
    assert moved == {"final_layer"}
    with pytest.raises(RecipeError, match=r"stages\.0\.train: none of these parts has a parameter that may learn"):
        train(config(corpus, tmp_path / "no", {"train": ["time"]}, **changes))
    with pytest.raises(X2IError, match="adapters alone, .*x2i convert"):
        train(config(corpus, tmp_path / "on", model={"weights": str(made.output)}, tokenizer=None, vae=None))


@pytest.mark.parametrize("damage", ["optimizer cut", "optimizer gone", "adapter incomplete", "adapter of another rank"])
def test_a_damaged_checkpoint_is_named(damage: str, start: Result, corpus: Path, tmp_path: Path) -> None:
    class Cut(Silent):
        def step(self, stage: str, done: int, loss: float, by_task: dict[str, float]) -> None:
            if done == 3:
                raise MemoryError

    adapters = {"weights": str(start.output), "lora": {"rank": 2}}
    changes: dict[str, Any] = {"model": adapters, "tokenizer": None, "vae": None, "checkpoint_every": 2}
    run = config(corpus, tmp_path / "run", {"steps": 4}, **changes)
    with pytest.raises(MemoryError):
        train(run, progress=Cut())
    optimizer = tmp_path / "run/step-000002/optimizer/__0_0.distcp"
    adapter = tmp_path / "run/step-000002/adapter/adapter_model.safetensors"
    state = load_file(adapter)
    if damage == "optimizer cut":
        optimizer.write_bytes(optimizer.read_bytes()[:-100])
    elif damage == "optimizer gone":
        optimizer.unlink()
    elif damage == "adapter incomplete":
        save_file(dict(list(state.items())[1:]), adapter)
    else:
        save_file({n: t[:1].clone() if "lora_A" in n else t[:, :1].clone() for n, t in state.items()}, adapter)
    with pytest.raises(X2IError, match=r"step-000002/(optimizer: cannot be read|adapter/.*does not hold these)"):
        train(run)


def test_a_damaged_checkpoint_says_how_to_go_on(corpus: Path, tmp_path: Path) -> None:
    class Cut(Silent):
        def step(self, stage: str, done: int, loss: float, by_task: dict[str, float]) -> None:
            if done == 3:
                raise MemoryError

    run = config(corpus, tmp_path / "run", {"steps": 4}, checkpoint_every=2, ema=0.9)
    with pytest.raises(MemoryError):
        train(run, progress=Cut())
    place = tmp_path / "run/step-000002"
    for name in ("model.safetensors", "ema.safetensors", "tokenizer.json", "trainer.json", "optimizer/__0_0.distcp"):
        whole = (place / name).read_bytes()
        (place / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(X2IError, match=rf"step-000002/.*\. Remove {place} to go on from the checkpoint before it"):
            train(run)
        (place / name).write_bytes(whole)
    assert train(run).finished


@pytest.mark.parametrize("limit", [20_000, 700_000])  # the model's file does not fit; it does, the optimiser's does not
def test_a_full_disk_is_told_and_leaves_nothing_half_written(limit: int, corpus: Path, tmp_path: Path) -> None:
    run = config(corpus, tmp_path / "run", {"steps": 4}, checkpoint_every=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(X2IError, match=r"step-000002(/.*)?: cannot be written"):
            train(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [p.name for p in (tmp_path / "run").iterdir() if "step" in p.name]
    assert train(run).finished
