"""A run: exact resumption, refusals, locks, what a checkpoint holds, what a finished run does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.trainer import corpora
from x2i.base.config import parse_config
from x2i.base.errors import RecipeError, Stopped, X2IError
from x2i.base.files import exclusive
from x2i.corpus.manifest import SCHEMA
from x2i.trainer import checkpoint
from x2i.trainer.config import RunConfig
from x2i.trainer.progress import Silent
from x2i.trainer.run import Result, train


def config(corpus: Path, output: Path, **changes: Any) -> RunConfig:
    return parse_config(RunConfig, corpora.run_content(corpus, output, **changes), "test")


class At(Silent):
    """Does something after a given step, and notes what it is told."""

    def __init__(self, step: int = -1, action: Any = None) -> None:
        self.at, self.action, self.notes = step, action, list[str]()

    def step(self, stage: str, done: int, loss: float, by_task: dict[str, float]) -> None:
        if done == self.at:
            self.action()

    def note(self, message: str) -> None:
        self.notes.append(message)


def power_cut() -> None:
    raise MemoryError("the machine is gone")


@pytest.fixture(scope="module")
def straight(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The tiny run, never interrupted."""
    return train(config(corpus_folder, tmp_path_factory.mktemp("straight") / "run"))


def equal(a: Path, b: Path) -> bool:
    names = (checkpoint.MODEL, checkpoint.EMA)
    return all(
        torch.equal(x, y)
        for name in names
        for x, y in zip(load_file(a / name).values(), load_file(b / name).values(), strict=True)
    )


# checkpoints are written after steps 3, 5 (the end of the first stage), 6, 9 and 11
@pytest.mark.parametrize("step", [4, 5, 8], ids=["in the first stage", "between the stages", "in the second stage"])
def test_weights_after_a_crash_and_a_resume_are_those_of_a_straight_run(
    corpus_folder: Path, tmp_path: Path, straight: Result, step: int
) -> None:
    run = config(corpus_folder, tmp_path / "run")
    with pytest.raises(MemoryError):
        train(run, progress=At(step, power_cut))
    resumed = train(run)
    assert resumed.finished and 0 < resumed.steps_now < 11
    assert equal(resumed.checkpoint, straight.checkpoint)
    assert resumed.held_out == straight.held_out


def test_an_interrupt_writes_a_checkpoint_and_the_run_goes_on_exactly(
    corpus_folder: Path, tmp_path: Path, straight: Result
) -> None:
    run = config(corpus_folder, tmp_path / "run")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped):
        train(run, progress=At(7, lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint.find(run.output).step == 8 or checkpoint.find(run.output).step == 7
    resumed = train(run)
    assert equal(resumed.checkpoint, straight.checkpoint)


def test_a_killed_process_leaves_nothing_half_written(corpus_folder: Path, tmp_path: Path, straight: Result) -> None:
    content = corpora.run_content(corpus_folder, tmp_path / "run", checkpoint_every=1, keep=100)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    code = "import sys, torch; torch.set_num_threads(1); from x2i.trainer.run import train; train(sys.argv[1])"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run.yaml")])
    deadline = time.monotonic() + 60
    while not (tmp_path / "run/step-000004").is_dir() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    found = checkpoint.all_of(tmp_path / "run")
    assert found and found[-1].step < 11
    for each in found:
        assert each.info["step"] == each.step and load_file(each.path / checkpoint.MODEL)
    resumed = train(tmp_path / "run.yaml")
    assert equal(resumed.checkpoint, straight.checkpoint)
    assert not list((tmp_path / "run").rglob(".*.tmp"))


def test_a_checkpoint_holds_all_that_is_promised(straight: Result, corpus_folder: Path) -> None:
    names = {p.name for p in straight.checkpoint.iterdir()}
    assert names == {
        "model.safetensors", "ema.safetensors", "config.json", "tokenizer.json", "trainer.json", "preview.png",
    }  # fmt: skip
    weights = load_file(straight.checkpoint / "model.safetensors")
    assert "llm.layers.0.self_attn.qkv_proj.weight" in weights and "pos_embed" in weights
    info = json.loads((straight.checkpoint / "trainer.json").read_text())
    assert (info["step"], info["stage"], info["stage_step"], info["seed"]) == (11, "high", 6, 0)
    assert info["corpora"][0]["digest"] == json.loads((corpus_folder / "corpus.json").read_text())["digest"]
    # keep: 1, and the ends of stages always
    assert [c.step for c in checkpoint.all_of(straight.output)] == [5, 11]
    assert straight.held_out["colorize"]["samples"] > 0
    assert straight.preview is not None and straight.preview.read_bytes()[:4] == b"\x89PNG"
    assert any(p.name.startswith("events") for p in straight.logs.iterdir())


def test_a_finished_run_computes_nothing_and_loads_no_framework(straight: Result, tmp_path: Path) -> None:
    identity = json.loads((straight.output / "run.json").read_text())
    content = identity["config"] | {"output": str(straight.output), "corpora": [c["path"] for c in identity["corpora"]]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    code = (
        "import sys; from x2i.trainer.run import train; r = train(sys.argv[1]);"
        "print(r.finished, r.steps_now, 'torch' in sys.modules)"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run.yaml")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "0", "False"]
    assert time.monotonic() - began < 10  # about one second on a machine that does nothing else


def test_a_changed_run_is_refused_and_the_change_named(straight: Result, corpus_folder: Path) -> None:
    run = config(corpus_folder, straight.output)
    stages = (run.stages[0].model_copy(update={"lr": 0.5}), run.stages[1])
    with pytest.raises(RecipeError, match=r"stages\.0\.lr: was 0\.003, is 0\.5(.|\n)*--fresh"):
        train(run.model_copy(update={"stages": stages}))
    harmless = {"checkpoint_every": 7, "keep": 9, "preview": run.preview.model_copy(update={"steps": 3})}
    assert train(run.model_copy(update=harmless)).steps_now == 0


def test_a_changed_corpus_is_refused_until_fresh(straight: Result, corpus_folder: Path, tmp_path: Path) -> None:
    other = corpora.write(tmp_path / "corpus", list(corpora.samples(12)))
    run = config(corpus_folder, tmp_path / "run", preview={"per_task": 0})
    train(run)
    changed = config(other, tmp_path / "run", preview={"per_task": 0})
    with pytest.raises(RecipeError, match=r"corpora\.0: .*: its digest was"):
        train(changed)
    (tmp_path / "run/notes.txt").write_text("mine")
    again = train(changed, fresh=True)
    assert again.steps_now == 11 and (tmp_path / "run/notes.txt").read_text() == "mine"


def test_two_runs_in_one_folder_are_refused(corpus_folder: Path, tmp_path: Path) -> None:
    run = config(corpus_folder, tmp_path / "run")
    with exclusive(run.output, "training"), pytest.raises(X2IError, match="another process is training here"):
        train(run)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(
    corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from x2i.model import flow

    exact = flow.squared_error
    steps = iter(range(100))

    def broken(*tensors: torch.Tensor) -> torch.Tensor:
        losses = exact(*tensors)
        if losses.requires_grad and next(steps) == 4:
            losses = losses * torch.tensor([1, float("nan"), 1, 1])
        return losses

    monkeypatch.setattr(flow, "squared_error", broken)
    run = config(corpus_folder, tmp_path / "run", preview={"per_task": 0})
    with pytest.raises(X2IError, match=r"stage low, step 4: the loss is not finite; samples: [0-9a-f]{12}-\w+ \("):
        train(run)
    assert checkpoint.find(run.output).step == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "omnigen-tinny"}, "no preset 'omnigen-tinny'; did you mean 'omnigen-tiny'"),
        (
            {"model": {"preset": "omnigen-tiny", "hiden_size": 32}},
            "hiden_size: unknown key; did you mean 'hidden_size'",
        ),
        ({"vae": {"kind": "pixels", "factor": 3}}, "multiple of 6"),
        ({"device": "abacus"}, "device: 'abacus'"),
        ({"tokenizer": {}}, "either path"),
        ({"tokenizer": {"trian": 1}}, "did you mean 'train'"),
        ({"held_out": 2}, "held_out"),
    ],
)
def test_a_wrong_run_file_is_refused_with_the_key(
    corpus_folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        train(config(corpus_folder, tmp_path / "run", **change))
    assert not checkpoint.all_of(tmp_path / "run")
    corrected = train(config(corpus_folder, tmp_path / "run", preview={"per_task": 0})) if "device" in change else None
    assert corrected is None or corrected.finished  # a run that never began leaves no claim on its folder


def test_conversations_are_refused_by_a_model_without_words(corpus_folder: Path, tmp_path: Path) -> None:
    mute = shutil.copytree(corpus_folder, tmp_path / "mute")
    rows = pq.read_table(mute / "manifest.parquet").to_pylist()
    for row in rows:
        if row["task_type"] == "deblur":
            row["output_size"] = None
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), mute / "manifest.parquet")
    with pytest.raises(RecipeError, match=r"stages\.\w+\.mixture: samples of deblur have no output image"):
        train(
            config(mute, tmp_path / "run", model={"preset": "omnigen-tiny", "text_head": False, "tie_text_head": False})
        )


def test_a_run_may_start_from_given_weights(straight: Result, corpus_folder: Path, tmp_path: Path) -> None:
    content = corpora.run_content(corpus_folder, tmp_path / "run", preview={"per_task": 0})
    content["model"] |= {"weights": str(straight.checkpoint)}
    content |= {"tokenizer": None}
    content["stages"] = [{**content["stages"][1], "steps": 1, "lr": 1e-12}]
    result = train(parse_config(RunConfig, content, "test"))
    # the averaged ones, which are those that are drawn with
    before, after = (
        load_file(straight.checkpoint / "ema.safetensors"),
        load_file(result.checkpoint / "model.safetensors"),
    )
    assert all(torch.allclose(before[n], after[n], atol=1e-6) for n in before)
