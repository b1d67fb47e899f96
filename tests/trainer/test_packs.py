"""Packs in training: full, exact whatever the number of ranks, and each sample learned as in a batch of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer import corpora
from tests.trainer.test_ranks import consumed, start
from x2i import corpus
from x2i.base.config import parse_config
from x2i.base.errors import RecipeError
from x2i.base.seeds import generator
from x2i.model import flow
from x2i.model.base import Chat, Request
from x2i.model.omnigen.model import OmniGen
from x2i.trainer import checkpoint, ledger, replay
from x2i.trainer.batch import PackBatch
from x2i.trainer.config import RunConfig
from x2i.trainer.learner import Learner
from x2i.trainer.progress import Silent
from x2i.trainer.run import Result, train
from x2i.trainer.setup import Setup
from x2i.trainer.speed import guessed, measure

BUDGET = 4096


def content(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    stage = {"lr": 0.004, "condition_dropout": 0.2, "min_crop": 0.5, "pack": {"tokens": BUDGET, "packs": 2}}
    mixture = {"text_to_image": 1, "deblur": 1, "describe": 1}
    stages = [
        {**stage, "name": "low", "resolution": 8, "steps": 3, "buckets": [[8, 8], [12, 8]], "mixture": mixture},
        {**stage, "name": "high", "resolution": 12, "steps": 5, "mixture": {"colorize": 2, "describe": 1}},
    ]
    found = corpora.run_content(folder, output, stages=stages, vae={"kind": "pixels", "factor": 2}, keep=9)
    return found | {"checkpoint_every": 2, "preview": {"per_task": 0}} | changes


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures to draw, half of them wide, and questions about them."""
    drawn = list(corpora.samples(36))
    made = [*drawn[:54], *corpora.widened(drawn[54:]), *corpora.chats(36)]
    return corpora.write(tmp_path_factory.mktemp("packs") / "corpus", made)


@pytest.fixture(scope="module")
def straight(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return train(parse_config(RunConfig, content(mixed, tmp_path_factory.mktemp("packed") / "run"), "test"))


@pytest.fixture(scope="module")
def setup(straight: Result) -> Setup:
    return replay.open_run(straight.output)


def test_packs_are_full_of_real_tokens_and_hold_what_was_planned(setup: Setup) -> None:
    for place in (0, 1):
        plan = setup.plans[place]
        made: list[PackBatch] = []
        for step in range(12):
            batches = setup.batches(place, step)
            planned = sorted(d.index for d in plan.step(step))
            assert sorted(e.draw for b in batches for e in (*b.examples, *b.left_out)) == planned
            made += batches
        assert np.mean([b.tokens for b in made]) >= 0.99 * BUDGET
        assert max(b.tokens for b in made) <= BUDGET
        assert not any(b.left_out for b in made)
    sizes = {e.output.shape for b in setup.batches(0, 0) for e in b.examples if e.output is not None}
    assert sizes == {(8, 8, 3), (8, 12, 3)}  # side by side in one pack


@pytest.mark.parametrize("change", [{"max_text_tokens": 40}, {"plain_captions": True}])
def test_packs_are_full_whatever_the_model_is_shown_of_texts(change: dict[str, Any], tmp_path: Path) -> None:
    made = [wordy(item, 200 if place % 5 else 7000) for place, item in enumerate(corpora.chats(36))]
    run = content(corpora.write(tmp_path / "corpus", made), tmp_path / "run")
    stage = run["stages"][0] | {"chat_resolution": 8, "buckets": [], "mixture": {"describe": 1}, "steps": 1}
    of_run = {k: v for k, v in change.items() if k == "max_text_tokens"}
    run |= of_run | {"stages": [stage | {k: v for k, v in change.items() if k not in of_run}], "held_out": 0}
    config = parse_config(RunConfig, run, "test")
    setup = Setup(config, [corpus.open(path) for path in config.corpora], None)
    packs = [batch for step in range(4) for batch in setup.batches(0, step) if isinstance(batch, PackBatch)]
    assert np.mean([b.tokens for b in packs]) >= 0.93 * BUDGET
    assert sum(len(b.left_out) for b in packs) <= 0.01 * sum(len(b.examples) for b in packs)
    told: list[str] = []
    train(config, progress=Noting(told))
    long = [note for note in told if "do not fit into a pack" in note]
    assert len(long) == (0 if of_run else 1) and all("of describe" in note for note in long)


class Noting(Silent):
    """Keeps what it is told."""

    def __init__(self, told: list[str]) -> None:
        self._told = told

    def note(self, message: str) -> None:
        self._told.append(message)


def wordy(item: corpora.Made, most: int) -> corpora.Made:
    """A conversation with a longer answer, of up to so many words."""
    random = generator("wordy", item.sample.key)
    words = random.choice(["left", "window", "a", "sky", "the", "of", "stone", "two", "light", "under"], most)
    question, answer = item.sample.messages
    longer = {**answer, "content": " ".join([str(answer["content"]), *words[: int(random.integers(most // 2, most))]])}
    return replace(item, sample=replace(item.sample, messages=(question, longer)))


def test_a_sample_is_learned_in_a_pack_as_alone(setup: Setup) -> None:
    learner = Learner(setup.run, setup.model, torch.device("cpu"))
    learner.model.eval()
    processor = setup.processors[0]
    made = [batch for step in range(3) for batch in setup.batches(0, step)]
    batch = next(b for b in made if any(b.dropped) and len(b.dropped) < len(b.examples))
    drawn, sums, counts = (found.detach() for found in learner.pack_losses(batch))
    chats = 0
    for place, example in enumerate(batch.examples):
        if example.output is None:
            inputs = processor.chats([Chat(example.messages, example.inputs)], labels=True)
            alone, count = (found.detach() for found in learner.model.next_token(inputs))
            assert int(count) == int(counts[chats]) and float(alone) == pytest.approx(float(sums[chats]), abs=1e-3)
            chats += 1
            continue
        inputs = processor.requests([Request(example.instruction, example.inputs)], [batch.dropped[place]])
        noise, data, t = batch.noise[place][None], batch.data[place][None], batch.t[place : place + 1]
        velocity = learner.model(flow.interpolate(noise, data, t), t, inputs).detach()
        assert float(flow.squared_error(velocity, noise, data)) == pytest.approx(float(drawn[place]), abs=1e-4)


def test_packs_are_the_same_on_two_ranks_after_a_cut(mixed: Path, straight: Result, tmp_path: Path) -> None:
    told, said = start(content(mixed, tmp_path / "run"), "2,4:0:stop", "2")
    assert [t["codes"] for t in told] == [[3, 3], [0, 0]] and told[0]["steps"][-1] == 6, said
    assert consumed(tmp_path / "run") == consumed(straight.output)
    one, other = (checkpoint.load_model(p).model.state_dict() for p in (straight.checkpoint, tmp_path / "run"))
    assert max(float((one[n] - other[n]).abs().max()) for n in one) < 1e-4


def test_a_packed_step_is_replayed_as_it_was_trained(straight: Result, setup: Setup) -> None:
    told = consumed(straight.output)
    for step in (8, 2):
        batches, rows = replay.replay(setup, step)
        assert [(r.draw, r.key) for r in rows] == [(draw, key) for at, draw, key, *_ in told if at == step]
        assert len(replay.picture_rows(setup, batches)) == len(rows)
        query = f"select draw, length from ledger where step = {step}"
        found = dict(ledger.opened([straight.output]).execute(query).fetchall())
        assert found == {e.draw: n for b in batches for e, n in zip(b.examples, b.inputs.lengths, strict=True)}


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {"pack": {"tokens": 64, "packs": 1}, "resolution": 64, "buckets": []},
            r"stages\.low\.pack: no sample of \w+ fits into",
        ),
        (
            {"mixture": {"deblurr": 1}},
            r"stages\.low\.mixture: .* no training samples of deblurr; they have .*deblur",
        ),
        ({"batch": 4}, "batch"),
    ],
)
def test_packs_that_cannot_be_made_are_refused(
    mixed: Path, tmp_path: Path, stage: dict[str, Any], message: str
) -> None:
    run = content(mixed, tmp_path / "run")
    run["stages"][0] |= stage
    with pytest.raises(RecipeError, match=message):
        train(parse_config(RunConfig, run, "test"))


def test_a_model_that_takes_no_packs_is_refused(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OmniGen, "packs", False)
    with pytest.raises(RecipeError, match=r"stages\.0\.pack: omnigen is trained on batches"):
        train(parse_config(RunConfig, content(mixed, tmp_path / "run"), "test"))


def test_the_loader_is_timed_with_the_packs_that_are_trained(
    mixed: Path, straight: Result, setup: Setup, tmp_path: Path
) -> None:
    """By the run's own tokenizer, once there is a checkpoint; before, by a guess that says so."""
    config = parse_config(RunConfig, content(mixed, straight.output), "test")
    stage = config.stages[-1]
    real = sum(len(setup.plans[-1].step(step)) for step in range(2))
    assert {found.samples for found in measure(config, stage.name, 2)} == {real} and not guessed(config)
    fresh = parse_config(RunConfig, content(mixed, tmp_path / "fresh"), "test")
    assert guessed(fresh) and measure(fresh, stage.name, 1)[0].samples != real / 2
