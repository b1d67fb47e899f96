"""What ranks hold in memory while models are built, written and read: `python -m tests.trainer.memory COUNT RUN.yaml ...`.

The ranks are forked by this process. Each builds, writes and reads the model of one run after the other, and prints of
each by how many bytes its peak has grown: `built`, `written`, `read`. (The first one loads libraries, too.) What is
written lies in the run's output as step-000001.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import sys
import traceback

import torch

from tests.trainer.ranks import launch
from x2i import corpus
from x2i.model import registry
from x2i.trainer import checkpoint, parallel
from x2i.trainer.config import RunConfig, load_run
from x2i.trainer.learner import Learner
from x2i.trainer.saver import Copies, Saver
from x2i.trainer.setup import Setup
from x2i.trainer.world import World


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(rank: int, size: int, port: int, _: str, runs: list[str]) -> int:
    """One rank; returns its exit code."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        world = World()
        for path in runs:
            grown = _measure(load_run(path), world)
            told = json.dumps({"run": path, "rank": rank, **grown})
            sys.stdout.write(f"{told}\n")
            sys.stdout.flush()
        world.close()
    except BaseException:  # noqa: BLE001 - a forked process must not run its parent's code
        traceback.print_exc()
        return 2
    return 0


def _measure(run: RunConfig, world: World) -> dict[str, int]:
    corpora = [corpus.open(place) for place in run.corpora]
    peaks = [_peak()]
    setup = Setup(run, corpora, None, "cpu", world.share(run.compute.shards))
    learner = Learner(run, setup.model, setup.device, world, setup.build_like)
    setup.fill()
    setup.begin()
    peaks.append(_peak())

    target, saver = checkpoint.folder(run.output, 1), Saver(world)
    state = parallel.untied(setup.model.state_dict(), learner.tied)
    saver.save(target, {checkpoint.TRAINER: {"step": 1}}, {checkpoint.MODEL: Copies().of(state)}, None, lambda: None)
    saver.wait()
    peaks.append(_peak())

    before = {name: parallel.local(tensor).clone() for name, tensor in setup.model.state_dict().items()}
    for parameter in setup.model.parameters():
        parallel.local(parameter.detach()).zero_()
    peaks[2] = max(peaks[2], _peak())
    setup.load(target)
    peaks.append(_peak())
    assert all(torch.equal(before[n], parallel.local(t)) for n, t in setup.model.state_dict().items())
    grown = (now - then for then, now in itertools.pairwise(peaks))
    return dict(zip(("built", "written", "read"), grown, strict=True))


def main() -> None:
    """Start the ranks: 0 if all went well."""
    torch.set_num_threads(1)
    size, *runs = sys.argv[1:]
    registry.build(registry.preset("omnigen-tiny"))  # libraries that all need
    sys.exit(any(launch(int(size), "", runs, child)))


if __name__ == "__main__":
    main()
