"""Starts the ranks of a run as a launcher does, once or one launch after the other; all share one import of torch.

python -m tests.trainer.ranks RUN.yaml COUNT[,STEP:RANK:kill|stop|full|nan|blind|dumb|unread|warn ...] ...

At the given step that rank kills itself, is asked to stop, finds the disk full at its next checkpoint, or loses what is
not a number; or it cannot see at its start what the run file names, or cannot show its model every third conversation.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch

from x2i.base.errors import RecipeError, Stopped, X2IError
from x2i.model import flow
from x2i.trainer import batch, checkpoint, learner, loader, onefile, session
from x2i.trainer.config import load_run
from x2i.trainer.run import train
from x2i.trainer.setup import Setup


def child(rank: int, size: int, port: int, run: str, events: list[str]) -> int:
    """One rank; returns its exit code."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    due = {int(s): what for s, r, what in (e.split(":") for e in events) if int(r) == rank}
    step, output = learner.Learner.step, load_run(run).output

    def stepped(self: Any, batches: Any, stage: Any, stage_step: int, global_step: int, totals: Any) -> Any:
        what = due.get(global_step)
        if what in ("kill", "full"):
            while not checkpoint.all_of(output):  # it is written while the training goes on
                time.sleep(0.01)
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        elif what == "full":
            _fill_disk()
        elif what == "nan":
            _spoil()
        return step(self, batches, stage, stage_step, global_step, totals)

    learner.Learner.step = stepped  # type: ignore[method-assign]
    if "blind" in due.values():
        session.Setup = _blind  # type: ignore[assignment,misc]
    if "dumb" in due.values():
        _hide()
    if "unread" in due.values():
        _lose()
    if "warn" in due.values():
        session.Setup = _warned  # type: ignore[assignment,misc]
    try:
        train(run)
    except Stopped:
        return 3
    except X2IError as error:
        print(f"rank {rank}: {error}", flush=True)  # noqa: T201
        return 1
    except BaseException:  # noqa: BLE001 - a forked process must not run its parent's code
        traceback.print_exc()
        return 2
    return 0


def _blind(*_: Any) -> Any:
    raise RecipeError("start: cannot be seen on this machine")


def _warned(*options: Any) -> Setup:
    logging.getLogger("x2i").warning("a hint for all")
    warnings.warn("a word of a library", stacklevel=1)
    return Setup(*options)


def _lose() -> None:
    """From the third step on no sample can be read."""
    exact, steps = loader.Loader._wait, iter((False, False, True))

    def waited(self: Any, *options: Any) -> Any:
        if next(steps):
            raise X2IError("the corpus is gone")
        return exact(self, *options)

    loader.Loader._wait = waited  # type: ignore[method-assign]


def _hide() -> None:
    """From now on every third conversation, by its key, is too long for the model."""
    exact = batch.Batcher._chat

    def shown(self: Any, examples: Any, *options: Any) -> Any:
        if any(int(e.key[:12], 16) % 3 == 0 for e in examples):
            raise X2IError("too long")
        return exact(self, examples, *options)

    batch.Batcher._chat = shown  # type: ignore[method-assign]


def _fill_disk() -> None:
    """From now on no byte of a checkpoint can be written."""
    import torch.distributed.checkpoint.filesystem as files

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint.fill = refuse
    files._write_item = refuse
    onefile.OneFile.write_data = refuse  # type: ignore[method-assign]


def _spoil() -> None:
    """From now on the first picture of each batch loses what is not a number."""
    exact = flow.squared_error

    def spoilt(*tensors: torch.Tensor) -> torch.Tensor:
        losses = exact(*tensors)
        return losses * torch.tensor([float("nan")] + [1.0] * (len(losses) - 1))

    flow.squared_error = spoilt


def launch(size: int, run: str, events: list[str], child: Callable[..., int] = child) -> list[int]:
    """Start them all and wait for them all: their exit codes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    pids = {}
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            code = child(rank, size, port, run, events)
            sys.stdout.flush()
            os._exit(code)
        pids[pid] = rank
    codes = {pids[pid]: os.waitstatus_to_exitcode(status) for pid, status in (os.wait() for _ in range(size))}
    return [codes[rank] for rank in range(size)]


def main() -> None:
    """One launch after the other; after each its exit codes, and the checkpoints that there are then."""
    run, output = sys.argv[1], load_run(sys.argv[1]).output
    for given in sys.argv[2:]:
        size, *events = given.split(",")
        codes = launch(int(size), run, events)
        told = {"codes": codes, "steps": [c.step for c in checkpoint.all_of(output)]}
        print(json.dumps(told), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
