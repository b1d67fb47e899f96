"""A build from end to end: plan, annotate what is missing, select, assemble what is missing, publish.

Resume needs no state of its own: what is done is what is there. Ray is started only if there is
something to do, so that a second run takes seconds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from x2i.base.errors import RecipeError
from x2i.base.files import exclusive, remove_leftovers, write_text
from x2i.base.seeds import canonical_json
from x2i.corpus.lake import Column, Lake
from x2i.pipelines.engine import publish
from x2i.pipelines.engine.annotate import Journal, again
from x2i.pipelines.engine.pool import Job, Pool, ray_session
from x2i.pipelines.engine.progress import Progress, Quiet
from x2i.pipelines.engine.worker import Worker, journal_path
from x2i.pipelines.recipe import Plan
from x2i.pipelines.select.query import select
from x2i.pipelines.sources.base import Problem, Unit

log = logging.getLogger(__name__)


@dataclass
class Todo:
    """What of the annotation is missing: per annotator the units, and per unit the annotators."""

    units: list[Unit]
    missing: dict[str, list[str]] = field(default_factory=dict)  # unit id -> annotator names
    unread: set[str] = field(default_factory=set)  # units whose rows are not in the lake
    unreadable: int = 0  # units with rows that could not be read last time


@dataclass
class Result:
    """What a build did. Times in seconds; `computed` counts rows per annotator that were computed now."""

    corpus: str
    digest: str
    samples: int
    shards: int
    rows_in: int
    rows_out: int
    computed: dict[str, int]
    decoded: int
    groups_built: int
    units: int
    seconds: dict[str, float]

    @property
    def idle(self) -> bool:
        """Whether there was nothing to compute."""
        return not self.computed and not self.groups_built


def build(
    plan: Plan, workers: int | None = None, address: str | None = None, progress: Progress | None = None
) -> Result:
    """Build the corpus of a recipe. A second call computes only what is missing.

    Args:
        workers: Ray actors; None takes one per CPU.
        address: of a running Ray cluster; None starts Ray in this process.

    Raises:
        RecipeError: a source is not there, or the output folder holds something else.
        X2IError: the run failed; what was done is kept.
    """
    progress = progress or Quiet()
    lake, out = Lake(plan.recipe.lake), Path(plan.recipe.out)
    publish.refuse_strangers(out, plan.where)
    _fetch_weights(plan)
    seconds: dict[str, float] = {}
    with exclusive(out, "building a corpus"), contextlib.ExitStack() as stack:
        publish.recover(out)
        engine = _Engine(plan, workers, address, stack, seconds)
        with _timed(seconds, "plan"):
            units = plan_units(plan, lake, progress)
            todo = find_todo(plan, lake, units)
        with _timed(seconds, "annotate"):
            computed, decoded = _annotate(plan, lake, todo, engine, progress)
            _record(plan, lake, units)
        with _timed(seconds, "select"):
            progress.start("select", 1, "queries")
            staging = publish.Staging(out)
            select(plan, lake, _ids(plan, units), staging.verdicts)
            groups = staging.group(plan)
            progress.advance()
        with _timed(seconds, "assemble"):
            built = _assemble(plan, units, staging, groups, engine, progress)
        with _timed(seconds, "publish"):
            info = publish.publish(plan, lake, staging, groups, _ids(plan, units))
        progress.finish()
    counts = info["counts"]
    return Result(
        corpus=str(out),
        digest=info["digest"],
        samples=counts["samples"],
        shards=counts["shards"],
        rows_in=counts["rows_in"],
        rows_out=counts["rows_out"],
        computed=computed,
        decoded=decoded,
        groups_built=built,
        units=len(units),
        seconds={k: round(v, 3) for k, v in seconds.items()},
    )


def plan_units(plan: Plan, lake: Lake, progress: Progress) -> list[Unit]:
    """List the units of all sources, and write each source's plan to the lake, a line per unit."""
    units: list[Unit] = []
    progress.start("plan", len(plan.sources), "sources")
    for source in plan.sources:
        found = list(source.plan())
        units += found
        lines = [canonical_json({"unit": u.id, "source": u.source, "rows": u.rows, "spec": u.spec}) for u in found]
        text = "".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace").decode()
        write_text(lake.path / "plans" / f"{source.name}-{source.fingerprint[:16]}.jsonl", text)
        for kind, count in sorted(source.ignored().items()):
            progress.note(f"{source.name}: {count} files of kind {kind or '(none)'} are no images, and were left alone")
        progress.advance()
    return units


def find_todo(plan: Plan, lake: Lake, units: list[Unit]) -> Todo:
    """Compare the plan with what lies in the lake."""
    done = {a.name: lake.done(Column(a.name, a.fingerprint)) for a in plan.annotators}
    rows = {s.name: lake.done(Column("rows", s.fingerprint)) for s in plan.sources}
    todo = Todo(units)
    fingerprints = {s.name: s.fingerprint for s in plan.sources}
    for unit in units:
        if again(lake.file(Column("rows", fingerprints[unit.source]), unit.id)).exists():
            todo.unreadable += 1
            todo.missing[unit.id] = [a.name for a in plan.annotators]
            todo.unread.add(unit.id)
            continue
        names = [a.name for a in plan.annotators if unit.id not in done[a.name]]
        if names:
            todo.missing[unit.id] = names
        if unit.id not in rows[unit.source]:
            todo.unread.add(unit.id)
    return todo


def _ids(plan: Plan, units: list[Unit]) -> dict[str, list[str]]:
    ids: dict[str, list[str]] = {s.fingerprint: [] for s in plan.sources}
    by_name = {s.name: s.fingerprint for s in plan.sources}
    for unit in units:
        ids[by_name[unit.source]].append(unit.id)
    return ids


def _fetch_weights(plan: Plan) -> None:
    for annotator in plan.annotators:
        for weights in annotator.weights():
            weights.fetch()


class _Engine:
    """Starts Ray and the pool of workers when they are first asked for, and not before."""

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
        self._pools: dict[tuple[float, float], Pool] = {}

    def pool(self, cpus: float, gpus: float) -> Pool:
        """The pool of workers with these resources. Pools with others are given back."""
        if not self._size:
            with _timed(self._seconds, "start_ray"):
                self._size = self._stack.enter_context(ray_session(self._workers, self._address))
            self._stack.callback(self._pools.clear)
        import ray  # after the session's settings, which Ray reads once, on import

        if (cpus, gpus) not in self._pools:
            self._pools.clear()
            recipe = self._plan.recipe.model_dump(mode="json")
            actor = ray.remote(Worker).options(num_cpus=cpus, num_gpus=gpus, max_restarts=0)
            self._pools[cpus, gpus] = Pool(lambda: actor.remote(recipe, os.getcwd()), self._size)
        return self._pools[cpus, gpus]


def _annotate(plan: Plan, lake: Lake, todo: Todo, engine: _Engine, progress: Progress) -> tuple[dict[str, int], int]:
    for annotator in plan.annotators:
        path = lake.path / Column(annotator.name, annotator.fingerprint).folder / "annotator.json"
        if not path.exists():
            description = {"fingerprint": annotator.fingerprint, **annotator.description()}
            write_text(path, json.dumps(description, indent=2, sort_keys=True) + "\n")
    work = [u for u in todo.units if u.id in todo.missing or u.id in todo.unread]
    if not work:
        progress.note(f"annotate: nothing to do, {len(todo.units)} units are in the lake already")
        return {}, 0
    skipped = len(todo.units) - len(work)
    if todo.unreadable:
        progress.note(f"annotate: {todo.unreadable} units again, some of whose files could not be read last time")
    if skipped:
        progress.note(f"annotate: {skipped} of {len(todo.units)} units are in the lake already")
    computed: dict[str, int] = {}
    decoded = 0
    blamed: dict[str, dict[int, Problem]] = {}

    def revive(job: Job) -> Job:
        """After a death, take rows one at a time; after the next, leave out the row that was in hand."""
        unit, names, write_rows, _, _ = job.arguments
        row = Journal(journal_path(lake, unit)).read()
        skip = blamed.setdefault(unit.id, {})
        if row is not None:
            skip[row] = Problem("worker_died", "the process that worked on this row died twice")
        return Job(job.method, (unit, names, write_rows, dict(skip), True), job.deaths)

    # annotators with the same resources share a worker, and decode each image once
    kinds = sorted({(a.cpus, a.gpus) for a in plan.annotators})
    progress.start("annotate", len(work), "units")
    for cpus, gpus in kinds:
        mine = {a.name for a in plan.annotators if (a.cpus, a.gpus) == (cpus, gpus)}
        jobs = []
        for unit in work:
            names = [n for n in todo.missing.get(unit.id, []) if n in mine]
            read = unit.id in todo.unread and (cpus, gpus) == kinds[0]
            if names or read:
                jobs.append(Job("annotate", (unit, names, read, {}, False)))
        if not jobs:
            continue
        for _, tally in engine.pool(cpus, gpus).run(jobs, revive):
            for name, count in tally.annotated.items():
                computed[name] = computed.get(name, 0) + count
            decoded += tally.decoded
            progress.advance()
    return computed, decoded


def _record(plan: Plan, lake: Lake, units: list[Unit]) -> None:
    columns = [asdict(Column(a.name, a.fingerprint)) for a in plan.annotators]
    record = {"recipe": plan.recipe.name, "columns": columns, "units": _ids(plan, units)}
    write_text(lake.record(plan.recipe.name), json.dumps(record, indent=1) + "\n")


def _assemble(
    plan: Plan, units: list[Unit], staging: publish.Staging, groups: publish.Groups, engine: _Engine, progress: Progress
) -> int:
    remove_leftovers(staging.folder)
    by_id = {u.id: u for u in units}
    jobs = []
    for number, unit_ids in enumerate(groups.units):
        folder = groups.folder(number)
        if not groups.reused and not folder.exists():
            jobs.append(Job("assemble", ([by_id[u] for u in unit_ids], str(groups.rows), number, str(folder))))
    if not groups.units:
        progress.note("assemble: no row stayed, the corpus is empty; the funnel says why")
        return 0
    if not jobs:
        progress.note("assemble: nothing to do, the samples are there already")
        return 0
    if len(jobs) < len(groups.units):
        progress.note(f"assemble: {len(groups.units) - len(jobs)} of {len(groups.units)} groups are there already")
    progress.start("assemble", len(jobs), "groups")
    for _ in engine.pool(1, 0).run(jobs, lambda job: job):
        progress.advance()
    return len(jobs)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
