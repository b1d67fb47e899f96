"""Ray, started when it is first asked for, and pools of workers with the resources that annotators declare."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

from x2i.base.cluster import ray_session
from x2i.base.errors import RecipeError
from x2i.pipelines.annotators.base import Annotator
from x2i.pipelines.engine.pool import Job, Pool, Revive
from x2i.pipelines.engine.todo import Kind
from x2i.pipelines.engine.worker import Worker
from x2i.pipelines.recipe import Plan

#: What a worker takes that assembles shards.
ASSEMBLE: Kind = (1.0, 0.0)


class Engine:
    """Starts Ray and pools of workers when they are first asked for, and gives a pool back when another is.

    Args:
        workers: how many at most; None takes one per CPU.
        address: of a running cluster; None starts Ray in this process.
        stack: closes Ray.
        seconds: where the time of Ray's start is put.
    """

    def __init__(
        self,
        plan: Plan,
        workers: int | None,
        address: str | None,
        stack: contextlib.ExitStack,
        seconds: dict[str, float],
    ) -> None:
        if workers is not None and workers < 1:
            raise RecipeError(f"--workers {workers}: at least one is needed")
        self._plan, self._workers, self._address = plan, workers, address
        self._stack, self._seconds = stack, seconds
        self._size = 0
        self._pool: tuple[Kind, frozenset[str], Pool] | None = None
        self._nodes: list[dict[str, float]] = []

    def kind(self, annotator: Annotator) -> Kind:
        """CPUs and GPUs that a worker takes which runs this annotator here: no GPU where the cluster has none."""
        self._start()
        cpus, gpus = demand(annotator)
        most = max((n.get("CPU", 0.0) for n in self._nodes), default=1.0)
        has_gpu = any(n.get("GPU", 0.0) > 0 for n in self._nodes)
        return min(cpus, most or cpus), gpus if has_gpu else 0.0

    def run(self, kind: Kind, models: frozenset[str], jobs: list[Job], revive: Revive) -> Iterator[tuple[Job, Any]]:
        """Work off jobs with a pool of this kind; workers that hold models which these jobs do not need are given back."""
        self._start()
        import ray  # after the session's settings, which Ray reads once, on import

        if self._pool is not None and (self._pool[0] != kind or (models and not self._pool[1] <= models)):
            self._pool = None  # its actors end, and with them the memory that their models took
        if self._pool is None:
            recipe = self._plan.recipe.model_dump(mode="json")
            actor = ray.remote(Worker).options(num_cpus=kind[0], num_gpus=kind[1], max_restarts=0)
            self._pool = (kind, models, Pool(lambda: actor.remote(recipe, os.getcwd(), kind[1]), self._places(kind)))
        self._pool = (kind, self._pool[1] | models, self._pool[2])
        yield from self._pool[2].run(jobs, revive)

    def _places(self, kind: Kind) -> int:
        """How many workers of a kind the cluster has room for."""
        cpus, gpus = kind
        room = 0
        for node in self._nodes:
            fits = node.get("CPU", 0.0) / cpus
            room += int(min(fits, node.get("GPU", 0.0) / gpus) if gpus else fits)
        return max(1, min(self._size, room))

    def _start(self) -> None:
        if self._size:
            return
        began = time.perf_counter()
        self._size = self._stack.enter_context(ray_session(self._workers, self._address))
        self._stack.callback(lambda: setattr(self, "_pool", None))
        import ray

        self._nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
        self._seconds["start_ray"] = self._seconds.get("start_ray", 0.0) + time.perf_counter() - began


def demand(annotator: Annotator) -> Kind:
    """What an annotator asks for, wherever it runs: CPUs and GPUs of one worker."""
    config = annotator.config
    cpus = config.cpus if config.cpus is not None else annotator.cpus
    gpus = config.gpus if config.gpus is not None else annotator.gpus
    return float(cpus), 0.0 if getattr(config, "device", "auto") == "cpu" else float(gpus)
