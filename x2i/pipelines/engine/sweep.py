"""Annotation: pass after pass, until every annotator has seen the rows that the recipe lets through to it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from x2i.base.errors import X2IError
from x2i.base.files import remove_leftovers, write_text
from x2i.corpus.lake import Lake
from x2i.pipelines.annotators.base import Annotator
from x2i.pipelines.engine.annotate import Journal, Tally
from x2i.pipelines.engine.pool import Job, Revive
from x2i.pipelines.engine.progress import Progress
from x2i.pipelines.engine.todo import Kind, Pass, Todo, failed, find_todo, passes, unreadable, write_empty
from x2i.pipelines.engine.worker import Place, journal_path
from x2i.pipelines.recipe import Plan
from x2i.pipelines.sources.base import Problem, Unit

#: Unfinished files in the lake that nobody has written to for so many seconds are a killed worker's.
OLD = 6 * 3600


class Runner(Protocol):
    """Works off jobs. `x2i.pipelines.engine.resources.Engine` does it with Ray actors."""

    def kind(self, annotator: Annotator) -> Kind:
        """CPUs and GPUs that a worker takes which runs this annotator here."""

    def run(self, kind: Kind, models: frozenset[str], jobs: list[Job], revive: Revive) -> Iterator[tuple[Job, Any]]:
        """Yield each job with its result, as they end; `models` are the annotators that load weights."""


@dataclass
class Annotated:
    """What was computed now: rows per annotator, images decoded, passes made; and every unit's tally."""

    rows: dict[str, int] = field(default_factory=dict)
    decoded: int = 0
    passes: int = 0
    tallies: list[Tally] = field(default_factory=list)

    def add(self, tally: Tally) -> None:
        """Count one unit."""
        for name, count in tally.annotated.items():
            self.rows[name] = self.rows.get(name, 0) + count
        self.decoded += tally.decoded
        self.tallies.append(tally)


def annotate(
    plan: Plan, lake: Lake, units: Sequence[Unit], runner: Runner, progress: Progress, retry: bool = False
) -> Annotated:
    """Run what is missing, pass after pass. What is in the lake already is not computed again.

    Args:
        retry: ask rows again whose annotation failed for a reason that may have passed.

    Raises:
        X2IError: weights cannot be had, or a worker failed; what was done is kept.
    """
    _describe(plan, lake)
    again = unreadable(plan, lake, units)
    if again:
        progress.note(f"annotate: {len(again)} units again, some of whose files could not be read last time")
    repeat = {name: set(again) for name in ["rows", *(a.name for a in plan.annotators)]}
    rows_again = failed(plan, lake, units) if retry else {}
    done = Annotated()
    todo = find_todo(plan, lake, units, repeat, rows_again)
    _say(todo, units, progress)
    stuck = 0
    while not todo.done or any(todo.visited.values()):
        write_empty(plan, lake, units, todo)
        before = (todo.missing, todo.unread, todo.waiting)
        if todo.missing or todo.unread:
            sweep, jobs = _next(plan, units, todo, passes(plan, runner.kind), runner)
            done.passes += 1
            progress.start(f"annotate ({', '.join(sweep.annotators)})", len(jobs), "units")
            for job, tally in runner.run(sweep.kind, _models(plan, sweep), jobs, _Reviver(lake)):
                done.add(tally)
                unit, names, rows, *_ = job.arguments
                for name in [*names, *(["rows"] if rows else [])]:
                    repeat[name].discard(unit.id)
                    rows_again.get(name, {}).pop(unit.id, None)
                progress.advance()
        todo = find_todo(plan, lake, units, repeat, rows_again)
        stuck = stuck + 1 if before == (todo.missing, todo.unread, todo.waiting) else 0
        if stuck > 2:
            raise X2IError("annotation does not get on: is another build removing files from this lake?")
    return done


def _describe(plan: Plan, lake: Lake) -> None:
    for annotator in plan.annotators:
        column = plan.column(annotator)
        path = lake.path / column.folder / "annotator.json"
        if not path.exists():
            description = {"fingerprint": annotator.fingerprint, **annotator.description()}
            write_text(path, json.dumps(description, indent=2, sort_keys=True) + "\n")
        if column.where is not None:
            lake.some(column).touch()
        remove_leftovers(path.parent, OLD)


def _say(todo: Todo, units: Sequence[Unit], progress: Progress) -> None:
    work = todo.missing.keys() | todo.unread
    if todo.done:
        progress.note(f"annotate: nothing to do, {len(units)} units are in the lake already")
    elif len(work) < len(units) and not todo.waiting:
        progress.note(f"annotate: {len(units) - len(work)} of {len(units)} units are in the lake already")


def _next(plan: Plan, units: Sequence[Unit], todo: Todo, planned: list[Pass], runner: Runner) -> tuple[Pass, list[Job]]:
    """The first pass that has something to do, and its jobs. Rows are written by the first of all."""
    for sweep in planned:
        first = sweep is planned[0]
        place = Place(max(1, int(sweep.kind[0])), overlap=sweep.kind[1] > 0)
        jobs = []
        for unit in units:
            missing = todo.missing.get(unit.id, {})
            wanted = {n: missing[n] for n in sweep.annotators if n in missing}
            read = first and unit.id in todo.unread
            if wanted or read:
                jobs.append(Job("annotate", (unit, wanted, read, {}, False, place)))
        if jobs:  # the longest first, so that none is left alone at the end
            return sweep, sorted(jobs, key=lambda job: -job.arguments[0].size)
    raise AssertionError("something is missing, and no pass makes it")


def _models(plan: Plan, sweep: Pass) -> frozenset[str]:
    return frozenset(a.name for a in plan.annotators if a.name in sweep.annotators and a.weights())


class _Reviver:
    """After a death, take rows one at a time; after the next, leave out the row that was in hand."""

    def __init__(self, lake: Lake) -> None:
        self._lake = lake
        self._blamed: dict[str, dict[int, Problem]] = {}

    def __call__(self, job: Job) -> Job:
        unit, wanted, write_rows, _, careful, place = job.arguments
        journal = Journal(journal_path(self._lake, unit))
        row = journal.read()
        skip = self._blamed.setdefault(unit.id, {})
        if not careful:
            journal.remove()  # of a run that was killed: it says nothing of this one's death
        elif row is not None:
            skip[row] = Problem("worker_died", "the process that worked on this row died twice")
        return Job(job.method, (unit, wanted, write_rows, dict(skip), True, place), job.deaths)
