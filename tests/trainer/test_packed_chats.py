"""Packs of conversations in training: models that only write, cut, on two ranks, with adapters."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tests.trainer import corpora
from tests.trainer.test_ranks import consumed, start
from x2i import corpus
from x2i.base.config import parse_config
from x2i.base.seeds import generator
from x2i.model.base import Message
from x2i.trainer import checkpoint, ledger, replay
from x2i.trainer.batch import PackBatch
from x2i.trainer.config import RunConfig
from x2i.trainer.explain import explain
from x2i.trainer.flops import StageFlops
from x2i.trainer.learner import Learner
from x2i.trainer.progress import Silent
from x2i.trainer.reports import Totals
from x2i.trainer.run import Result, train
from x2i.trainer.setup import Setup

BUDGET = 1024


def content(folder: Path, output: Path, stage: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A run of one packed stage on a tiny Mini-Gemini."""
    base = {"name": "only", "resolution": 32, "lr": 0.002, "steps": 4, "mixture": {"describe": 1}}
    base |= {"pack": {"tokens": BUDGET, "packs": 3}}
    found = corpora.run_content(folder, output, model={"preset": "mini-gemini-tiny"}, stages=[base | (stage or {})])
    return found | {"checkpoint_every": 2, "preview": {"per_task": 0}, "keep": 9} | changes


def run(*args: Any, **changes: Any) -> Result:
    return train(parse_config(RunConfig, content(*args, **changes), "test"))


def opened(*args: Any, **changes: Any) -> Setup:
    config = parse_config(RunConfig, content(*args, **changes), "test")
    return Setup(config, [corpus.open(path) for path in config.corpora], None)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions about pictures, with answers and worse ones."""
    return corpora.write(tmp_path_factory.mktemp("asked") / "corpus", list(corpora.chats(60)))


class Cut(Silent):
    """Ends a run in the middle of its second stage, as a crash does."""

    def step(self, stage: str, done: int, loss: float, by_task: dict[str, float]) -> None:
        if done == 4:
            raise MemoryError


def furthest(one: Result, output: Path) -> float:
    a, b = (load_file(checkpoint.folder(place, one.step) / "model.safetensors") for place in (one.output, output))
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in a)


# --- preferences -------------------------------------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    "mini_gemini": {"preset": "mini-gemini-tiny"},
    "ovis2": {"preset": "ovis2-tiny"},
    "ovis_u1": {"preset": "ovis-u1-tiny"},
    "omnigen": {
        "preset": "omnigen-tiny",
        "hidden_size": 64,
        "layers": 2,
        "heads": 2,
        "kv_heads": 2,
        "intermediate_size": 96,
    },
}


@pytest.mark.parametrize("model", MODELS)
def test_a_preference_loses_in_a_pack_what_it_loses_in_a_batch(model: str, asked: Path, tmp_path: Path) -> None:
    """The loss of each sample, and the gradients, with a model that has left its reference."""
    setup = opened(asked, tmp_path / "run", {"preference": {"beta": 0.5, "label_smoothing": 0.1}}, model=MODELS[model])
    stage = setup.run.stages[0]
    learner = Learner(setup.run, setup.model, torch.device("cpu"))
    learner.start_stage(0)
    learner.keep_reference()
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter += 0.6 * torch.randn(parameter.shape, generator=drawn) * parameter.abs().mean()
    planned = setup.plans[0].step(0)
    draws = {d.index: d for d in planned if d.pack == 0}
    examples = [setup.reader.planned(setup.plans[0], d, stage) for d in draws.values()][:-3]
    several = (Message("user", "<image> and <image>?"), Message("assistant", "Two."), Message("user", "Of what?"))
    told, shown = (*several, examples[0].messages[1]), examples[0].inputs + examples[1].inputs
    examples[0] = replace(examples[0], messages=told, inputs=shown)
    (pack,) = setup.batchers[0].training(examples, 0, stage, draws=draws)
    assert isinstance(pack, PackBatch) and len(pack.examples) == len(examples) > 3 and not pack.left_out
    assert len(pack.inputs.lengths) == 2 * len(pack.examples)
    batch = replace(setup.batchers[0].chat(pack.examples, rejected=True), own=(True,) * len(pack.examples))
    found = []
    for each in (pack, batch):
        learner.model.zero_grad()
        loss, losses, tokens = learner._loss(each, stage, Totals.of([each]))
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in learner.model.named_parameters() if p.grad is not None}
        found.append((losses.detach(), tokens, gradients, Totals.of([each])))
    (losses, tokens, slopes, totals), (alone, counts, expected, of_batch) = found
    assert float((alone - math.log(2)).abs().max()) > 0.005 and tokens is not None and torch.equal(tokens, counts)
    assert float((losses - alone).abs().max()) < 1e-5 and totals == of_batch
    largest = max(float(g.abs().max()) for g in expected.values())
    assert max(float((slopes[n] - g).abs().max()) for n, g in expected.items()) < 1e-5 * max(largest, 1)
    flops = StageFlops(setup.model.config, list(slopes), preference=True)
    if model == "ovis_u1":  # encodes the picture of both answers once
        assert 0.5 < flops.step([pack]) / flops.step([batch]) < 1
    else:
        assert flops.step([pack]) == pytest.approx(flops.step([batch]), rel=1e-9)
    assert flops.lengths(pack) == flops.lengths(batch)


def wordy(item: corpora.Made) -> corpora.Made:
    """A conversation about none, one or three pictures with a longer answer, and a worse one of another length."""
    random = generator("wordy", item.sample.key)
    shown = int(random.choice([0, 1, 3]))
    said = [" ".join(random.choice(["a", "sky", "two", "stone", "window"], random.integers(5, n))) for n in (30, 80)]
    question, answer = ({**turn, "content": said[0]} for turn in item.sample.messages)
    question["content"] = "<image>" * shown + "What is this?"
    pictures = item.sample.input_images * shown
    told = replace(item.sample, messages=(question, answer), rejected_response=said[1], input_images=pictures)
    return replace(item, sample=told)


@pytest.mark.parametrize("told", [True, False])
def test_packs_are_planned_with_both_answers(told: bool, tmp_path: Path) -> None:
    """Full where the manifest tells of the rejected answers; where it does not, with room for what they may take."""
    made = [wordy(item) for item in corpora.chats(200)]
    folder = corpora.write(tmp_path / "corpus", made)
    if not told:
        table = pq.read_table(folder / "manifest.parquet").drop_columns(["rejected_tokens"])
        pq.write_table(table, folder / "manifest.parquet", row_group_size=16)
    setup = opened(folder, tmp_path / "run", {"preference": {}, "pack": {"tokens": 4096, "packs": 2}, "resolution": 8})
    packs = [batch for step in range(8) for batch in setup.batches(0, step)]
    assert all(isinstance(b, PackBatch) and b.preferred for b in packs)
    assert all(sum(b.inputs.lengths) == b.tokens <= b.length == 4096 for b in packs if isinstance(b, PackBatch))
    assert np.mean([b.tokens / b.length for b in packs if isinstance(b, PackBatch)]) > (0.95 if told else 0.85)
    left = sum(len(b.left_out) for b in packs if isinstance(b, PackBatch))
    assert left <= 0.01 * sum(len(b.examples) for b in packs)
    planned = {draw.index: draw.tokens or 0 for step in range(8) for draw in setup.plans[0].step(step)}
    flops = StageFlops(setup.model.config, [], preference=True)
    real = {e.draw: n for b in packs for e, n in zip(b.examples, flops.lengths(b), strict=True)}
    off = [planned[draw] / n - 1 for draw, n in real.items()]
    assert np.abs(off).mean() < (0.03 if told else 0.3) and abs(np.mean(off)) < (0.01 if told else 0.1)


def test_a_pack_is_told_to_hold_half_as_many_preferences(asked: Path, tmp_path: Path) -> None:
    """By `--explain`, which knows no rejected answer and takes it for as long: both answers are computed and kept."""
    stages: list[dict[str, Any]] = [{}, {"preference": {}}]
    plain, preferred = (
        explain(parse_config(RunConfig, content(asked, tmp_path, stage), "test")).stages[0] for stage in stages
    )
    assert preferred.batch == pytest.approx(plain.batch / 2) and preferred.tokens == pytest.approx(plain.tokens)
    assert preferred.flops == pytest.approx(plain.flops * 4 / 3, rel=0.15)  # the reference's forward passes
    assert preferred.memory.activations == pytest.approx(plain.memory.activations)


def test_two_packed_stages_are_trained_cut_and_on_two_ranks(asked: Path, tmp_path: Path) -> None:
    """Mini-Gemini: answers, then preferences by adapters that the stage's end merges."""
    first = {"name": "answers", "resolution": 32, "lr": 0.002, "steps": 2, "mixture": {"describe": 1}}
    first |= {"pack": {"tokens": BUDGET, "packs": 3}, "train": ["projector", "mining", "llm"]}
    adapters = {"llm": {"lora": {"rank": 2, "dropout": 0.3, "targets": ["q_proj", "v_proj"]}}, "projector": {}}
    last = first | {"name": "preferences", "steps": 3, "preference": {"beta": 0.5}, "train": adapters}
    changes: dict[str, Any] = {"stages": [first, last], "checkpoint_every": 3}
    straight = run(asked, tmp_path / "straight", **changes)
    assert 0 < abs(straight.train_loss["describe"] - math.log(2)) < 0.2
    again = parse_config(RunConfig, content(asked, tmp_path / "cut", **changes), "test")
    with pytest.raises(MemoryError):
        train(again, progress=Cut())
    resumed = train(again)
    assert resumed.steps_now == 2 and furthest(straight, resumed.output) == 0
    told, said = start(content(asked, tmp_path / "two", **changes), "2")
    assert told[0]["codes"] == [0, 0], said
    assert consumed(tmp_path / "two") == consumed(straight.output)
    assert furthest(straight, tmp_path / "two") < 1e-4
    setup = replay.open_run(straight.output)
    for step, answers in ((1, 1), (4, 2)):
        batches, rows = replay.replay(setup, step)
        assert [(r.draw, r.key) for r in rows] == [
            (d, key) for at, d, key, *_ in consumed(straight.output) if at == step
        ]
        packs = [b for b in batches if isinstance(b, PackBatch)]
        assert len(packs) == 3 and np.mean([b.tokens for b in packs]) >= 0.9 * BUDGET
        lengths = [
            sum(b.inputs.lengths[i : i + answers]) for b in packs for i in range(0, len(b.inputs.lengths), answers)
        ]
        query = f"select draw, length from ledger where step = {step}"
        found = dict(ledger.opened([straight.output]).execute(query).fetchall())
        assert found == dict(zip([e.draw for b in packs for e in b.examples], lengths, strict=True))
