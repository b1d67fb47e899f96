"""The same jobs in this process, without Ray: for estimates from a few rows, and for tests. Builds run on Ray."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from x2i.pipelines.annotators.base import Annotator
from x2i.pipelines.engine.pool import Job, Revive
from x2i.pipelines.engine.resources import demand
from x2i.pipelines.engine.todo import Kind
from x2i.pipelines.engine.worker import Place, Worker
from x2i.pipelines.recipe import Plan


class Inline:
    """Works off jobs one after another. Models are loaded once, and stay.

    Args:
        gpus: whether annotators may have the GPU that this process sees.
    """

    def __init__(self, plan: Plan, gpus: bool = False) -> None:
        self._worker = Worker.of(plan)
        self._gpus = gpus

    def set_up(self, annotator: Annotator) -> None:
        """Load an annotator's models. Raises X2IError if they cannot be had."""
        self._worker.set_up(annotator.name)

    def kind(self, annotator: Annotator) -> Kind:
        """What it asks for, without a GPU if there is none."""
        cpus, gpus = demand(annotator)
        return cpus, gpus if self._gpus else 0.0

    def run(self, kind: Kind, models: frozenset[str], jobs: list[Job], revive: Revive) -> Iterator[tuple[Job, Any]]:
        """Yield each job with its result."""
        for job in jobs:
            arguments = [replace(a, overlap=False) if isinstance(a, Place) else a for a in job.arguments]
            yield job, getattr(self._worker, job.method)(*arguments)
