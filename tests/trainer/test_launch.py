"""What a launcher on a cluster needs of a run: to be stopped without a signal, and one reason why it failed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path

import pytest

from tests.trainer import corpora
from x2i.base.config import parse_config
from x2i.base.errors import Stopped
from x2i.trainer import checkpoint
from x2i.trainer.config import RunConfig
from x2i.trainer.launch import _Mailbox
from x2i.trainer.run import train


def test_a_run_that_is_asked_to_stop_writes_a_checkpoint_and_can_go_on(tmp_path: Path) -> None:
    made = corpora.write(tmp_path / "corpus", list(corpora.samples(20)))
    run = parse_config(RunConfig, corpora.run_content(made, tmp_path / "run"), "test")
    asked: Iterator[int] = chain([0, signal.SIGTERM], repeat(0))
    with pytest.raises(Stopped) as stopped:
        train(run, ask=lambda: next(asked))
    assert stopped.value.args == (signal.SIGTERM,)
    assert [c.step for c in checkpoint.all_of(run.output)] == [2]
    assert train(run).steps_now == run.total_steps - 2


def test_the_rank_that_failed_is_heard_before_those_that_failed_with_it() -> None:
    mailbox = _Mailbox()
    mailbox.fail(0, "rank 0 has lost contact with another one", elsewhere=True)
    assert mailbox.failure() == "rank 0 has lost contact with another one"
    mailbox.fail(1, "the disk is full", elsewhere=False)
    assert mailbox.failure() == "the disk is full"
    mailbox.finish({})
    assert mailbox.failure() is None
