"""A build from end to end: plan, annotate what is missing, select, assemble what is missing, publish.

Resume needs no state of its own: what is done is what is there. Ray is started only if there is
something to do, so that a second run takes seconds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from x2i.base.errors import RecipeError, X2IError
from x2i.base.files import exclusive, remove_leftovers, write_text
from x2i.base.seeds import canonical_json
from x2i.base.sql import plainly
from x2i.base.weights import missing
from x2i.corpus.lake import Lake, mentioned
from x2i.pipelines.engine import publish
from x2i.pipelines.engine.groups import find_groups, has_groups
from x2i.pipelines.engine.pool import Job, through
from x2i.pipelines.engine.progress import Progress, Quiet
from x2i.pipelines.engine.resources import ASSEMBLE, Engine
from x2i.pipelines.engine.sweep import annotate
from x2i.pipelines.engine.todo import by_source
from x2i.pipelines.recipe import Plan
from x2i.pipelines.select.query import select
from x2i.pipelines.sources.base import Source, Unit

log = logging.getLogger(__name__)


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
    passes: int
    groups_built: int
    units: int
    seconds: dict[str, float]

    @property
    def idle(self) -> bool:
        """Whether there was nothing to compute."""
        return not self.computed and not self.groups_built


def build(
    plan: Plan,
    workers: int | None = None,
    address: str | None = None,
    progress: Progress | None = None,
    retry: bool = False,
) -> Result:
    """Build the corpus of a recipe. A second call computes only what is missing.

    Args:
        workers: Ray actors; None takes one per CPU.
        address: of a running Ray cluster; None starts Ray in this process.
        retry: annotate rows again that failed for a reason that may have passed (memory, a server).

    Raises:
        RecipeError: a source is not there, or the output folder holds something else.
        X2IError: the run failed; what was done is kept.
    """
    progress = progress or Quiet()
    lake, out = Lake(plan.recipe.lake), Path(plan.recipe.out)
    publish.refuse_strangers(out, plan.where)
    fetch_weights(plan)
    seconds: dict[str, float] = {}
    with plainly(), exclusive(out, "building a corpus"), contextlib.ExitStack() as stack:
        publish.recover(out)
        engine = Engine(plan, workers, address, stack, seconds)
        with _timed(seconds, "plan"):
            units = plan_units(plan, lake, progress)
        with _timed(seconds, "annotate"):
            done = annotate(plan, lake, units, engine, progress, retry)
            record(plan, lake, units)
        with _timed(seconds, "select"):
            progress.start("select", 1, "queries")
            staging = publish.Staging(out)
            run = through(lambda jobs: engine.run(ASSEMBLE, frozenset(), jobs, lambda job: job))
            select(plan, lake, by_source(plan, units), staging.verdicts, run)
            known = {u.id: u for u in units}
            found = (
                find_groups(plan, lake, by_source(plan, units), staging.verdicts, known) if has_groups(plan) else None
            )
            groups = staging.group(plan, found)
            progress.advance()
        with _timed(seconds, "assemble"):
            built = _assemble(plan, units, staging, groups, engine, progress)
        with _timed(seconds, "publish"):
            info = publish.publish(plan, lake, staging, groups, by_source(plan, units))
        progress.finish()
    counts = info["counts"]
    return Result(
        corpus=str(out),
        digest=info["digest"],
        samples=counts["samples"],
        shards=counts["shards"],
        rows_in=counts["rows_in"],
        rows_out=counts["rows_out"],
        computed=done.rows,
        decoded=done.decoded,
        passes=done.passes,
        groups_built=built,
        units=len(units),
        seconds={k: round(v, 3) for k, v in seconds.items()},
    )


def plan_units(plan: Plan, lake: Lake | None, progress: Progress) -> list[Unit]:
    """List the units of all sources, and write each source's plan to the lake (if one is given), a line per unit.

    Raises:
        RecipeError: a source cannot be listed; names the recipe, the source and the reason.
    """
    units: list[Unit] = []
    progress.start("plan", len(plan.sources), "sources")
    for number, source in enumerate(plan.sources):
        try:
            found = list(source.plan())
        except RecipeError as error:
            raise RecipeError(f"{plan.where}: sources.{number} ({source.kind}): {error}") from None
        units += found
        if lake is not None:
            _write_plan(source, found, lake)
        for kind, count in sorted(source.ignored().items()):
            progress.note(f"{source.name}: {count} files of kind {kind or '(none)'} are no images, and were left alone")
        progress.advance()
    return units


def _write_plan(source: Source, found: list[Unit], lake: Lake) -> None:
    lines = [canonical_json({"unit": u.id, "source": u.source, "rows": u.rows, "spec": u.spec}) for u in found]
    text = "".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace").decode()
    write_text(lake.path / "plans" / f"{source.name}-{source.fingerprint[:16]}.jsonl", text)


def fetch_weights(plan: Plan) -> None:
    """Make every annotator's weights lie on this machine, or say which cannot be had, and what would run without.

    Raises:
        X2IError: some cannot be had; names each annotator, its weights, what is known of them, and the remedy.
    """
    gone: list[tuple[str, str]] = []
    remedies: list[str] = []
    for annotator in plan.annotators:
        try:
            lacking = missing((annotator.name, w) for w in annotator.weights())
        except X2IError as error:
            gone.append((annotator.name, str(error)))
            continue
        for one in lacking:
            try:
                one.weights.fetch()
            except X2IError as error:
                gone.append((annotator.name, f"{str(one).partition(': ')[2]}"))
                remedies.append(one.weights.remedy)
                log.info("%s", error)
    if gone:
        raise X2IError(_without_weights(plan, gone, remedies))


def _without_weights(plan: Plan, gone: list[tuple[str, str]], remedies: list[str]) -> str:
    names = {name for name, _ in gone}
    without = set(names)
    for annotator in plan.annotators:  # each comes after those that it needs
        needed = {a.name for a in annotator.upstream} | set(mentioned(annotator.config.where or "", without))
        if needed & without:
            without.add(annotator.name)
    lines = [f"{plan.where}: weights of {len(names)} annotators cannot be had, so nothing was started:"]
    lines += [f"  {name}: {said}" for name, said in gone]
    if without - names:
        lines.append(f"  {', '.join(sorted(without - names))}: wait for these")
    lines += [f"- {remedy}" for remedy in dict.fromkeys(remedies)]
    rest = ", ".join(a.name for a in plan.annotators if a.name not in without)
    return "\n".join(
        [*lines, f"Without them these would run: {rest}. Get the weights, or take the others out of the recipe."]
    )


def record(plan: Plan, lake: Lake, units: list[Unit]) -> None:
    """Note in the lake what this recipe reads of it, for `open_lake`."""
    columns = [asdict(c) for c in plan.columns()]
    read = {"recipe": plan.recipe.name, "columns": columns, "units": by_source(plan, units)}
    write_text(lake.record(plan.recipe.name), json.dumps(read, indent=1) + "\n")


def _assemble(
    plan: Plan, units: list[Unit], staging: publish.Staging, groups: publish.Groups, engine: Engine, progress: Progress
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
    for _ in engine.run(ASSEMBLE, frozenset(), jobs, lambda job: job):
        progress.advance()
    return len(jobs)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
