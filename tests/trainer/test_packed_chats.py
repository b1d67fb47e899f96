"""Packs of conversations in training: models that only write, cut, on two ranks, with adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.trainer import corpora
from tests.trainer.test_ranks import consumed, start
from x2i import corpus
from x2i.base.config import parse_config
from x2i.trainer import checkpoint
from x2i.trainer.batch import PackBatch
from x2i.trainer.config import RunConfig
from x2i.trainer.progress import Silent
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


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions about pictures, with answers and worse ones."""
    return corpora.write(tmp_path_factory.mktemp("asked") / "corpus", list(corpora.chats(60)))


class Cut(Silent):
    """Ends a run in the middle, as a crash does."""

    def step(self, stage: str, done: int, loss: float, by_task: dict[str, float]) -> None:
        if done == 3:
            raise MemoryError


def furthest(one: Result, output: Path) -> float:
    a, b = (load_file(checkpoint.folder(place, one.step) / "model.safetensors") for place in (one.output, output))
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def test_mini_gemini_is_trained_on_full_packs_cut_and_on_two_ranks(asked: Path, tmp_path: Path) -> None:
    straight = run(asked, tmp_path / "straight")
    setup = Setup(parse_config(RunConfig, content(asked, tmp_path / "x"), "test"), [corpus.open(asked)], None)
    packs = [batch for step in range(6) for batch in setup.batches(0, step)]
    assert all(isinstance(b, PackBatch) and len(b.examples) > 5 for b in packs)
    assert np.mean([b.tokens for b in packs if isinstance(b, PackBatch)]) >= 0.93 * BUDGET
    again = parse_config(RunConfig, content(asked, tmp_path / "cut"), "test")
    with pytest.raises(MemoryError):
        train(again, progress=Cut())
    resumed = train(again)
    assert resumed.steps_now == 2 and furthest(straight, resumed.output) == 0
    told, said = start(content(asked, tmp_path / "two"), "2")
    assert told[0]["codes"] == [0, 0], said
    assert consumed(tmp_path / "two") == consumed(straight.output)
    assert furthest(straight, tmp_path / "two") < 1e-4
