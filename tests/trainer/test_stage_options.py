"""What a stage can be: rates by part, adapters on parts, another beginning, a sitting of its own; what is logged."""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainer import corpora
from x2i.base.config import parse_config
from x2i.base.errors import RecipeError
from x2i.trainer.config import RunConfig
from x2i.trainer.progress import Silent
from x2i.trainer.run import train

STAGE = {"resolution": 16, "batch": 2, "lr": 1e-3, "steps": 2, "mixture": {"deblur": 1}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpora.write(tmp_path_factory.mktemp("options") / "corpus", list(corpora.samples(12)))


def config(corpus: Path, output: Path, *stages: dict[str, Any], **changes: Any) -> RunConfig:
    """A run of stages a, b, c …"""
    named = [{"name": "abc"[i]} | STAGE | stage for i, stage in enumerate(stages)]
    whole = {"preview": {"per_task": 0}, "stages": named, "held_out_samples": 2} | changes
    return parse_config(RunConfig, corpora.run_content(corpus, output, **whole), "run.yaml")


class CutAfter(Silent):
    """The machine is gone after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def step(self, stage: str, done: int, loss: float, by_task: dict[str, float]) -> None:
        if done == self._step:
            raise MemoryError


def same(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same weights, bit for bit, with the averaged ones."""
    files = ("model.safetensors", "ema.safetensors")
    states = [(load_file(a / name), load_file(b / name)) for name in files if (a / name).exists()]
    return all(x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in states)


def scalars(output: Path, name: str) -> list[float]:
    events = EventAccumulator(str(output / "logs"))
    events.Reload()
    return [e.value for e in events.Scalars(name)]


def test_parts_learn_at_rates_of_their_own(corpus: Path, tmp_path: Path) -> None:
    shape = {"steps": 3, "warmup": 2, "schedule": "linear"}
    made = train(config(corpus, tmp_path / "run", shape | {"train": {"head": 1e-2, "patchers": 1e-4, "time": None}}))
    assert scalars(made.output, "train/lr/head") == pytest.approx([5e-3, 1e-2, 1e-2])
    assert scalars(made.output, "train/lr/patchers") == pytest.approx([5e-5, 1e-4, 1e-4])
    assert scalars(made.output, "train/lr") == pytest.approx([5e-4, 1e-3, 1e-3])
    start = train(config(corpus, tmp_path / "none", shape | {"train": {"text_head": 1e-12, "head": 1e-12}}))
    before, after = (load_file(r.checkpoint / "model.safetensors") for r in (start, made))
    step = {n: (before[n] - after[n]).abs().max().item() for n in before}
    # Adam's steps are about as long as the rate
    assert 5e-3 < step["final_layer.linear.weight"] < 5e-2
    assert 5e-5 < step["x_embedder.proj.weight"] < 5e-4
    assert step["llm.layers.0.mlp.down_proj.weight"] == 0


def test_equal_rates_are_one_rate_and_resume_exactly(corpus: Path, tmp_path: Path) -> None:
    listed = train(config(corpus, tmp_path / "list", {"steps": 4, "train": ["head", "trunk"]}))
    run = config(
        corpus, tmp_path / "map", {"steps": 4, "train": {"trunk": 1e-3, "head": {"lr": 1e-3}}}, checkpoint_every=2
    )
    with pytest.raises(MemoryError):
        train(run, progress=CutAfter(3))
    assert same(train(run).checkpoint, listed.checkpoint)


def test_the_inner_part_decides(corpus: Path) -> None:
    from x2i.model import registry
    from x2i.trainer.learner import part_of

    with torch.device("meta"):
        model = registry.build(registry.preset("ovis2-tiny"))
    assert part_of(model, ["all", "head"], "visual_tokenizer.head.0.weight") == "head"
    assert part_of(model, ["head", "all"], "llm.lm_head.weight") == "all"


@pytest.mark.parametrize(
    ("stage", "told"),
    [
        ({"train": {}}, r"stages\.0\.train: a stage that trains nothing"),
        ({"train": {"head": -1}}, r"stages\.0\.train\.head\.lr: .*greater than 0"),
        ({"train": {"head": {"rate": 1}}}, r"stages\.0\.train\.head\.rate: unknown key"),
        ({"train": {"haed": 1e-3}}, r"stages\.0\.train: no part 'haed'; omnigen has"),
    ],
)
def test_wrong_parts_are_named(stage: dict[str, Any], told: str, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=told):
        train(config(corpus, tmp_path / "run", stage))


def test_the_stages_rate_may_be_left_out(corpus: Path, tmp_path: Path) -> None:
    content = corpora.run_content(corpus, tmp_path)
    content["stages"] = [{k: v for k, v in STAGE.items() if k != "lr"} | {"name": "a", "train": {"head": 1e-3}}]
    assert parse_config(RunConfig, content, "run.yaml").stages[0].lr == 1e-3
    content["stages"][0]["train"] = {"head": 1e-3, "trunk": None}
    with pytest.raises(RecipeError, match=r"stages\.0\.lr: required"):
        parse_config(RunConfig, content, "run.yaml")


class Recorder(types.ModuleType):
    """In the place of the library wandb: what it is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)  # other libraries look whether it is there
        self.begun: list[dict[str, Any]] = []
        self.told: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def init(self, **options: Any) -> Recorder:
        self.begun.append(options)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.finished += 1

    Image = staticmethod(lambda picture: ("picture", picture.size))


def test_weights_and_biases_are_told_what_tensorboard_is(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    section = {"project": "tests", "mode": "offline"}
    shown = {"per_task": 1, "steps": 1}
    run = config(corpus, tmp_path / "run", {"steps": 4}, checkpoint_every=2, wandb=section, preview=shown)
    with pytest.raises(MemoryError):
        train(run, progress=CutAfter(3))
    made = train(run.model_copy(update={"wandb": None}))  # no part of what the run is
    assert made.finished and len(recorder.begun) == 1
    train(run, fresh=True)
    first, second = recorder.begun
    assert (first["project"], first["mode"], first["name"], first["resume"]) == ("tests", "offline", "run", "allow")
    assert first["id"] == second["id"] and "wandb" not in first["config"] and recorder.finished == 2
    told = recorder.told[-8:]
    losses = [(step, values["train/loss"]) for step, values in told if "train/loss" in values]
    assert [step for step, _ in losses] == [1, 2, 3, 4]
    assert [value for _, value in losses] == pytest.approx(scalars(made.output, "train/loss"), rel=1e-6)
    assert [step for step, values in told if "held_out/loss/deblur" in values] == [2, 4]
    assert [step for step, values in told if values.get("preview", " ")[0] == "picture"] == [2, 4]
    steps = [step for step, _ in told]
    assert steps == sorted(steps)  # what comes late, the library drops


def test_without_the_library_it_is_refused_at_once(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RecipeError, match=r"wandb: the library is not installed: `pip install 'x2i\[wandb\]'`"):
        train(config(corpus, tmp_path / "run", {}, wandb={"project": "tests"}))
    assert not (tmp_path / "run/run.json").exists()
