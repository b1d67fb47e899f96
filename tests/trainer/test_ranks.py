"""Several ranks train as one does: the same samples, the same noise, the same weights but for rounding."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from torch import nn

from tests.trainer import corpora
from x2i import corpus
from x2i.base.config import parse_config
from x2i.base.errors import RecipeError
from x2i.trainer import checkpoint, ledger
from x2i.trainer.config import RunConfig
from x2i.trainer.mixture import plan_of, table_of
from x2i.trainer.run import train
from x2i.trainer.shares import Shares

#: A step cannot be divided evenly by 2 or 4, and its kinds even less.
STAGES: list[dict[str, Any]] = [
    {
        "name": "first",
        "resolution": 8,
        "batch": 7,
        "micro_batch": 2,
        "lr": 0.004,
        "steps": 6,
        "mixture": {"deblur": 1, "describe": 1, "text_to_image": 1},
        "condition_dropout": 0.2,
        "min_crop": 0.5,
    },
    {
        "name": "second",
        "resolution": 16,
        "batch": 8,
        "lr": 0.004,
        "steps": 6,
        "schedule": "cosine",
        "mixture": {"colorize": 2, "describe": 1},
        "weight_decay": 0.01,
    },
]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures to draw, and questions about them."""
    made = [*corpora.samples(24), *corpora.chats(24)]
    return corpora.write(tmp_path_factory.mktemp("ranks") / "corpus", made)


def content(mixed: Path, output: Path, **changes: Any) -> dict[str, Any]:
    found = corpora.run_content(mixed, output, stages=STAGES, vae={"kind": "pixels", "factor": 2}, keep=9, **changes)
    found["model"]["layers"] = 2
    return found


@pytest.fixture(scope="module")
def straight(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one rank, without interruption."""
    output = tmp_path_factory.mktemp("straight") / "run"
    train(parse_config(RunConfig, content(mixed, output), "test"))
    return output


def start(run: dict[str, Any], *launches: str) -> tuple[list[dict[str, Any]], str]:
    """Of each launch the exit codes and the checkpoints' steps; and what all of them said."""
    path = Path(run["output"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(run))
    command = [sys.executable, "-m", "tests.trainer.ranks", str(path), *launches]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    said = done.stdout + done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"codes"')]
    assert len(told) == len(launches), said
    return told, said


def consumed(output: Path) -> list[tuple[Any, ...]]:
    query = "select step, draw, key, round(t, 6), tokens from ledger order by step, draw"
    return ledger.opened([output]).execute(query).fetchall()


def differences(one: Path, other: Path) -> float:
    worst = 0.0
    for step in (6, 12):
        for name in (checkpoint.MODEL, checkpoint.EMA):
            a, b = (load_file(checkpoint.folder(run, step) / name) for run in (one, other))
            assert a.keys() == b.keys()
            worst = max(worst, *(float((a[n] - b[n]).abs().max()) for n in a))
    return worst


def test_samples_of_200_steps_are_the_same_on_1_2_4_and_8_ranks(mixed: Path) -> None:
    run = parse_config(RunConfig, content(mixed, Path("unused")), "test")
    table = table_of([corpus.open(mixed)], run.stages, run.held_out)
    for stage in run.stages:
        plan = plan_of(table, stage, run.seed)
        for step in range(200):
            draws = plan.step(step)
            for size in (1, 2, 4, 8):
                ranks = [Shares(rank, size, table.chats) for rank in range(size)]
                owned = [rank.owned(draws) for rank in ranks]
                assert sorted(i for part in owned for i in part) == [d.index for d in draws]
                # as many rows of each kind, or the ranks would wait for each other for ever
                taken = [rank.take(draws) for rank in ranks]
                assert len({(len(t), sum(d.task in table.chats for d in t)) for t in taken}) == 1


def test_a_run_cut_on_2_ranks_and_continued_on_4_is_that_of_one(mixed: Path, straight: Path, tmp_path: Path) -> None:
    told, said = start(content(mixed, tmp_path / "run"), "2,4:1:kill", "4,6:3:stop", "1")
    killed, stopped, finished = told
    assert killed["codes"] == [1, -9] and killed["steps"] == [3], said
    assert stopped["codes"] == [3, 3, 3, 3] and stopped["steps"][-1] == 8, said
    assert finished["codes"] == [0] and finished["steps"][-1] == 12, said
    assert consumed(tmp_path / "run") == consumed(straight)
    assert differences(tmp_path / "run", straight) < 1e-4
    found, other = (checkpoint.find(r).info["held_out"] for r in (tmp_path / "run", straight))
    assert found["colorize"]["loss"] == pytest.approx(other["colorize"]["loss"], abs=1e-4)
    assert set(found["colorize"]["by_time"]) == {"t_0.00_0.25", "t_0.25_0.50", "t_0.50_0.75", "t_0.75_1.00"}


def test_a_full_disk_or_a_broken_loss_on_one_rank_stops_all(mixed: Path, straight: Path, tmp_path: Path) -> None:
    run = content(mixed, tmp_path / "run", checkpoint_every=2)
    told, said = start(run, "2,3:1:full", "2,4:1:nan", "2")
    full, broken, finished = told
    assert full["codes"] == [1, 1] and full["steps"] == [2], said
    assert "cannot be written" in said and "No space left" in said
    assert broken["codes"] == [1, 1] and broken["steps"][-1] == 4, said
    assert said.count("the loss is not finite") == 2  # both know, and nobody waits
    assert said.count("; samples: ") == 1  # but it is said once
    assert finished["codes"] == [0, 0], said
    assert consumed(tmp_path / "run") == consumed(straight)
    assert differences(tmp_path / "run", straight) < 1e-4
    assert not list((tmp_path / "run").rglob(".*.tmp"))


def test_a_rank_that_cannot_begin_says_why_and_none_waits(mixed: Path, tmp_path: Path) -> None:
    told, said = start(content(mixed, tmp_path / "run"), "3,0:1:blind")
    assert told[0]["codes"] == [1, 1, 1], said
    assert said.count("rank 1 cannot begin: its message says why") == 2
    assert said.count("start: cannot be seen on this machine") == 1


def test_a_rank_that_cannot_read_says_why_and_all_stop_in_order(mixed: Path, tmp_path: Path) -> None:
    told, said = start(content(mixed, tmp_path / "run"), "2,0:0:warn,0:1:warn,0:1:unread")
    assert told[0]["codes"] == [1, 1], said
    assert said.count("rank 1: the corpus is gone") == 1
    assert said.count("rank 0: another rank cannot read or prepare its samples: its message says why") == 1
    assert said.count("a hint for all") == 1 and said.count("UserWarning: a word of a library") == 1


def test_a_rank_whose_conversations_cannot_be_shown_does_not_end_the_run(mixed: Path, tmp_path: Path) -> None:
    stage = {**STAGES[0], "batch": 6, "steps": 4, "mixture": {"describe": 2, "deblur": 1}}
    runs = [content(mixed, tmp_path / name) | {"stages": [stage]} for name in ("one", "three")]
    alone, said = start(runs[0], "1,0:0:dumb")
    assert alone[0]["codes"] == [0], said
    told, said = start(runs[1], "3,0:0:dumb,0:1:dumb,0:2:dumb")
    assert told[0]["codes"] == [0, 0, 0], said
    assert consumed(tmp_path / "three") == consumed(tmp_path / "one")
    (one, other) = (load_file(checkpoint.folder(tmp_path / name, 4) / checkpoint.MODEL) for name in ("one", "three"))
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-4


def test_accumulation_changes_nothing_but_rounding(mixed: Path, straight: Path, tmp_path: Path) -> None:
    run = content(mixed, tmp_path / "run")
    run["stages"] = [{**stage, "micro_batch": size} for stage, size in zip(STAGES, (3, 1), strict=True)]
    train(parse_config(RunConfig, run, "test"))
    assert consumed(tmp_path / "run") == consumed(straight)
    assert differences(tmp_path / "run", straight) < 1e-4


def test_recomputed_activations_give_the_same_weights(mixed: Path, straight: Path, tmp_path: Path) -> None:
    run = content(mixed, tmp_path / "run", compute={"checkpointing": True})
    train(parse_config(RunConfig, run, "test"))
    assert differences(tmp_path / "run", straight) < 1e-5


def test_shards_that_do_not_divide_the_ranks_are_refused(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"compute\.shards: 2 does not divide the 1 ranks"):
        train(parse_config(RunConfig, content(mixed, tmp_path / "run", compute={"shards": 2}), "test"))


def test_compiled_blocks_give_the_same_weights(
    mixed: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, exact = [], nn.Module.compile

    def traced(self: nn.Module, **_: Any) -> None:
        compiled.append(self)
        exact(self, backend="aot_eager")  # the whole way but for the code that is made of it, which takes a minute

    monkeypatch.setattr(nn.Module, "compile", traced)
    run = content(mixed, tmp_path / "run", compute={"compile": True, "checkpointing": True})
    train(parse_config(RunConfig, run, "test"))
    assert len(compiled) == 2
    assert consumed(tmp_path / "run") == consumed(straight)
    assert differences(tmp_path / "run", straight) < 1e-4
