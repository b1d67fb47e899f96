"""What a stage can be: rates by part, adapters on parts, another beginning, a sitting of its own; what is logged."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainer import corpora
from x2i.base.config import parse_config
from x2i.base.errors import RecipeError, X2IError
from x2i.trainer import checkpoint, ledger
from x2i.trainer.config import RunConfig
from x2i.trainer.progress import Silent
from x2i.trainer.run import Result, train

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
    from x2i.trainer.parts import part_of

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
    content["stages"][0]["train"] = yaml.safe_load("{head: 1e-3, trunk: {lr: 5e-4}}")  # words to YAML, without a dot
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


def ledger_of(output: Path) -> list[dict[str, Any]]:
    rows = [row for file, _, _ in ledger.files_of(output) for row in pq.read_table(file).to_pylist()]
    return sorted(rows, key=lambda row: (row["step"], row["draw"]))


FOREST = ({"steps": 4}, {"steps": 3, "mixture": {"colorize": 1}}, {"steps": 2, "start": "a", "lr": 2e-3})


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Stage b goes on from a, and so does c."""
    return train(config(corpus, tmp_path_factory.mktemp("forest") / "whole", *FOREST))


def test_stages_one_by_one_are_the_whole_run_bit_for_bit(corpus: Path, tmp_path: Path, whole: Result) -> None:
    run = config(corpus, tmp_path / "run", *FOREST)
    for stage, steps in (("a", 4), ("c", 2), ("b", 3)):  # c does not need b
        assert train(run, stage=stage).steps_now == steps
        assert train(run, stage=stage).steps_now == 0
    for step in (4, 7, 9):
        assert same(*(r / f"step-{step:06d}" for r in (run.output, whole.output)))
    assert ledger_of(run.output) == ledger_of(whole.output)
    assert train(run).finished and train(run).steps_now == 0


def test_a_stage_begins_with_the_one_that_it_names(corpus: Path, tmp_path: Path, whole: Result) -> None:
    begun = [c.info["begun"] for c in checkpoint.all_of(whole.output)]
    assert begun == [0, 4, 4] and whole.finished
    # cut within the branch, and before it
    for step in (7, 8):
        run = config(corpus, tmp_path / f"cut{step}", *FOREST, checkpoint_every=2)
        with pytest.raises(MemoryError):
            train(run, progress=CutAfter(step))
        assert same(train(run).checkpoint, whole.checkpoint)


def test_a_branch_that_was_trained_alone_is_kept_by_the_whole_run(corpus: Path, tmp_path: Path, whole: Result) -> None:
    run = config(corpus, tmp_path / "run", *FOREST)
    train(run, stage="a")
    train(run, stage="c")
    rest = train(run)
    assert rest.steps_now == 3 and rest.finished and same(rest.checkpoint, whole.checkpoint)
    assert ledger_of(run.output) == ledger_of(whole.output)


def test_what_was_trained_alone_from_other_weights_passes_for_nothing_else(corpus: Path, tmp_path: Path) -> None:
    run = config(corpus, tmp_path / "run", *FOREST, checkpoint_every=1)
    with pytest.raises(MemoryError):
        train(run, stage="b", progress=CutAfter(6))  # of steps 5 to 7: it begins with fresh weights
    assert train(run, stage="b").steps_now == 2
    assert checkpoint.all_of(run.output)[-1].info["begun"] == 0
    told = r"step-000007: stage b was trained alone, from fresh weights, and would now begin with the end of stage a"
    with pytest.raises(RecipeError, match=told):
        train(run)
    assert train(run, stage="a").steps_now == 4
    with pytest.raises(RecipeError, match=told):
        train(run, stage="b")
    with pytest.raises(
        RecipeError, match=r"--stage bb: no such stage; did you mean|--stage bb: no such stage; the run"
    ):
        train(run, stage="bb")


def test_a_stage_may_begin_with_other_weights(corpus: Path, tmp_path: Path, whole: Result) -> None:
    elsewhere = str(whole.output / "step-000007")
    other = {"start": elsewhere, "lr": 1e-12, "steps": 2}
    run = config(corpus, tmp_path / "run", {"mixture": {"colorize": 1}}, other, seed=3, checkpoint_every=1)
    made = train(run)
    given, found = load_file(f"{elsewhere}/ema.safetensors"), load_file(made.checkpoint / "model.safetensors")
    assert all(torch.allclose(given[n], found[n], atol=1e-6) for n in given)
    assert made.checkpoint.name == "step-000004" and checkpoint.find(run.output).info["begun"] == elsewhere
    again = run.model_copy(update={"output": tmp_path / "again"})
    with pytest.raises(MemoryError):
        train(again, progress=CutAfter(4))
    assert same(train(again).checkpoint, made.checkpoint)
    alone = run.model_copy(update={"output": tmp_path / "alone"})
    assert same(train(alone, stage="b").checkpoint, made.checkpoint)


def test_an_origin_that_cannot_be_is_refused(corpus: Path, tmp_path: Path, whole: Result) -> None:
    for name in ("b", "c"):
        with pytest.raises(RecipeError, match=rf"stages\.1\.start: '{name}' is no earlier stage; those are: a"):
            config(corpus, tmp_path / "run", {}, {"start": name}, {})
    with pytest.raises(X2IError, match="no/such/weights"):
        train(config(corpus, tmp_path / "run", {}, {"start": "no/such/weights"}))
    assert not checkpoint.all_of(tmp_path / "run")  # told at once
    words = config(corpus, tmp_path / "words", {}, {"start": str(whole.output)})
    with pytest.raises(X2IError, match="another tokenizer"):
        train(words)


LOW_RANK = {"rank": 2, "alpha": 4, "targets": ["qkv_proj", "down_proj"], "dropout": 0.1}
ADAPTED = (
    {"steps": 2, "train": ["head"]},
    {"steps": 6, "train": {"head": None, "trunk": {"lr": 1e-2, "lora": LOW_RANK}}},
    {"steps": 2},
)


@pytest.fixture(scope="module")
def adapted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return train(config(corpus, tmp_path_factory.mktemp("adapted") / "run", *ADAPTED))


def test_a_stages_adapters_are_merged_at_its_end(adapted: Result) -> None:
    before, after = (load_file(adapted.output / f"step-{n:06d}/model.safetensors") for n in (2, 8))
    assert before.keys() == after.keys()  # plain weights in the published names
    assert not (adapted.output / "step-000008/adapted.safetensors").exists()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    low = {n for n in moved if n.startswith("llm.")}
    assert low == {f"llm.layers.0.{n}.weight" for n in ("self_attn.qkv_proj", "mlp.down_proj")}
    assert moved - low and all(n.startswith("final_layer.") for n in moved - low)
    for name in low:
        values = torch.linalg.svdvals((after[name] - before[name]).double())
        assert values[1] > 1e-4 and values[2] < 1e-5 * values[0]


def test_a_run_that_was_cut_among_adapters_goes_on_exactly(corpus: Path, tmp_path: Path, adapted: Result) -> None:
    run = config(corpus, tmp_path / "run", *ADAPTED, checkpoint_every=5, keep=9)
    with pytest.raises(MemoryError):
        train(run, progress=CutAfter(6))
    within = run.output / "step-000005"
    beside = load_file(within / "adapted.safetensors")
    merged, layer = load_file(within / "model.safetensors"), "llm.layers.0.mlp.down_proj"
    update = beside[f"{layer}.lora_B.weight"] @ beside[f"{layer}.lora_A.weight"]
    assert update.any()
    assert torch.allclose(merged[f"{layer}.weight"], beside[f"{layer}.weight"] + 2 * update)
    # whoever opens it sees weights like any other, the averaged ones
    opened = checkpoint.load_model(within).model.state_dict()
    averaged = load_file(within / "ema.safetensors")
    assert averaged.keys() == merged.keys() <= opened.keys()
    assert torch.equal(opened[f"{layer}.weight"], averaged[f"{layer}.weight"])
    assert not torch.equal(averaged[f"{layer}.weight"], beside[f"{layer}.weight"])
    made = train(run)
    assert same(made.checkpoint, adapted.checkpoint) and made.held_out == adapted.held_out
    assert same(run.output / "step-000008", adapted.output / "step-000008")


def test_the_averages_are_those_of_the_merged_weights(corpus: Path, tmp_path: Path) -> None:
    part = {"train": {"trunk": {"lr": 1e-2, "lora": LOW_RANK}}, "steps": 2}
    made = train(config(corpus, tmp_path / "run", part, ema=0.2, checkpoint_every=1, keep=9))
    name = "llm.layers.0.mlp.down_proj.weight"
    first, second = (made.output / f"step-{n:06d}" for n in (1, 2))
    base = load_file(first / "adapted.safetensors")[name]
    # decay is min(0.2, (1 + step) / (10 + step)), step being the number of steps done
    wanted = base
    for place, step in ((first, 1), (second, 2)):
        wanted = wanted.lerp(load_file(place / "model.safetensors")[name], 1 - min(0.2, (1 + step) / (10 + step)))
        assert torch.allclose(load_file(place / "ema.safetensors")[name], wanted, atol=1e-6)


def test_adapters_of_two_ranks_continued_on_one_are_those_of_one(corpus: Path, tmp_path: Path) -> None:
    stages = [*ADAPTED]
    # what is dropped depends on how the rows are divided
    stages[1] = {"steps": 6, "train": {"head": None, "trunk": {"lr": 1e-2, "lora": LOW_RANK | {"dropout": 0.0}}}}
    run = config(corpus, tmp_path / "run", *stages, checkpoint_every=5, keep=9)
    alone = train(run.model_copy(update={"output": tmp_path / "alone"}))
    content = run.model_dump(mode="json", exclude={"output"}) | {"output": str(run.output)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "tests.trainer.ranks", str(tmp_path / "run.yaml"), "2,6:1:stop"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [t["codes"] for t in told] == [[3, 3]], done.stdout + done.stderr
    train(run)
    for step, names in ((5, ("model", "ema", "adapted")), (8, ("model", "ema")), (10, ("model", "ema"))):
        for name in names:
            many, one = (load_file(r / f"step-{step:06d}/{name}.safetensors") for r in (run.output, alone.output))
            assert one.keys() == many.keys()
            assert all(torch.allclose(one[n], many[n], atol=1e-5) for n in one), (step, name)


def test_adapters_learn_preferences_and_resume_exactly(tmp_path: Path) -> None:
    chats = corpora.write(tmp_path / "chats", list(corpora.chats(12)))
    stage = {"mixture": {"describe": 1}, "preference": {"beta": 0.1}, "steps": 4}
    stages = ({"mixture": {"describe": 1}}, stage | {"train": {"trunk": {"lr": 1e-2, "lora": LOW_RANK}}})
    made = train(config(chats, tmp_path / "straight", *stages))
    run = config(chats, tmp_path / "run", *stages, checkpoint_every=3)
    with pytest.raises(MemoryError):
        train(run, progress=CutAfter(5))
    assert same(train(run).checkpoint, made.checkpoint)
    assert scalars(made.output, "train/loss")[2] == pytest.approx(math.log(2))  # as good as the reference


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (
            {"lora": {"targets": ["q_proj"]}},
            r"stages\.0\.train\.trunk\.lora: no linear layer is called 'q_proj'; it has",
        ),
        ({"lora": {"targets": ["linear"]}}, r"stages\.0\.train\.trunk\.lora: no linear layer of this part is among"),
        ({"lora": {"rank": 0}}, r"stages\.0\.train\.trunk\.lora\.rank: .*greater than 0"),
    ],
)
def test_adapters_that_cannot_be_are_refused(part: dict[str, Any], told: str, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=told):
        train(config(corpus, tmp_path / "run", {"train": {"trunk": part}}))


def test_adapters_of_the_run_and_of_a_stage_exclude_each_other(corpus: Path, tmp_path: Path) -> None:
    model = {"weights": "w", "lora": {"rank": 2}}
    with pytest.raises(RecipeError, match=r"stages\.0\.train: with model\.lora adapters are all that learns"):
        config(corpus, tmp_path, {"train": {"trunk": {"lora": LOW_RANK}}}, model=model, tokenizer=None, vae=None)


def test_explain_counts_what_adapters_learn(corpus: Path, tmp_path: Path) -> None:
    from x2i.trainer.explain import explain

    told = explain(config(corpus, tmp_path / "run", *ADAPTED)).stages
    head, both = told[0].trained, told[1].trained
    width, middle = 32, 48  # of the model's states and of its feed-forward layers
    low = 2 * (width + 3 * width) + 2 * (middle + width)
    assert both == head + low and told[1].trains == {"head": head, "trunk": low}
    whole = explain(config(corpus, tmp_path / "run", {"steps": 6})).stages[0]
    assert told[1].flops < 0.8 * whole.flops and told[1].memory.optimiser == 8 * both / 8  # of eight ranks


def test_a_stage_may_average_its_weights_over_another_time(corpus: Path, tmp_path: Path) -> None:
    made = train(config(corpus, tmp_path / "run", {"lr": 0.01}, {"lr": 0.01, "ema": 1e-6}, ema=0.99))

    def apart(step: int) -> float:
        place = checkpoint.folder(made.output, step)
        now, averaged = (load_file(place / name) for name in (checkpoint.MODEL, checkpoint.EMA))
        return max(float((now[n] - averaged[n]).abs().max()) for n in now)

    assert apart(2) > 1e-4 and apart(4) < 1e-6
    with pytest.raises(RecipeError, match=r"stages\.a\.ema: the run keeps no averaged weights"):
        config(corpus, tmp_path / "none", {"ema": 0.9}, ema=None)
