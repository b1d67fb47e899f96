"""What a build would do, and what it would cost: what is cached, what is missing, and a sample of rows taken all the way.

The sample's rows go through the same code as a build's, in this process and in a folder of their own: nothing
is written to the lake. Intervals are of 95 %: Wilson's for shares, Student's t over calls for times.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from x2i.base.errors import X2IError
from x2i.base.seeds import generator
from x2i.base.sql import connect, literal, plainly
from x2i.base.weights import missing
from x2i.corpus.lake import Column, Lake, count_rows, mentioned, read_table
from x2i.pipelines.annotators.base import Annotator
from x2i.pipelines.engine import publish
from x2i.pipelines.engine.assemble import PART, assemble_group
from x2i.pipelines.engine.groups import find_groups, has_groups
from x2i.pipelines.engine.inline import Inline
from x2i.pipelines.engine.intervals import Interval, mean_of, share_of
from x2i.pipelines.engine.progress import Quiet
from x2i.pipelines.engine.resources import demand
from x2i.pipelines.engine.sweep import Annotated, annotate
from x2i.pipelines.engine.todo import Todo, by_source, find_todo, unreadable
from x2i.pipelines.recipe import Dedup, Plan
from x2i.pipelines.select.query import select
from x2i.pipelines.sources.base import Row, Source, Unit

#: Calls of an annotator that the sample is cut into, so that their times have a spread.
CALLS = 8


@dataclass
class Step:
    """One annotator: rows there and rows to run (None: it cannot be told), and what a row of it costs."""

    name: str
    where: str | None
    gpus: float
    unavailable: str | None = None  # why it cannot run here
    remedy: str | None = None
    cached: int | None = None
    to_run: Interval | None = None
    seconds_per_row: Interval | None = None
    bytes_per_row: float | None = None


@dataclass
class Estimate:
    """What `x2i plan` shows. `kept` is the share of rows that stay, before duplicates are removed."""

    rows: int | None  # None: a source does not say how many rows it has before it is read
    units: int
    units_to_read: int
    steps: list[Step] = field(default_factory=list)
    sample: int = 0
    reading: Interval | None = None  # seconds a row from bytes to pixels
    kept: Interval | None = None
    not_judged: list[str] = field(default_factory=list)  # conditions that need an annotator that cannot run
    samples_per_row: float | None = None  # X2I samples of a kept row
    corpus_bytes: Interval | None = None
    assembly: Interval | None = None  # seconds
    on_gpu: bool = False  # whether annotators that ask for GPUs had one for the sample
    decodes: int = 0  # images of the sample that would be decoded, passes counted each

    @property
    def seconds(self) -> Interval | None:
        """Of one worker's work over all that is to run, without the start of Ray and of models."""
        steps = [s.to_run.times(s.seconds_per_row) for s in self.steps if s.to_run and s.seconds_per_row]
        total: Interval | None = None
        for part in [*steps, *([self.assembly] if self.assembly else []), *self._reading()]:
            total = part if total is None else total.plus(part)
        return total

    @property
    def gpu_seconds(self) -> Interval | None:
        """Of the annotators that ask for GPUs, times the share of one that each takes; None if it was not measured on one."""
        steps = [s for s in self.steps if s.gpus and s.to_run and s.seconds_per_row and self.on_gpu]
        total = Interval(0, 0, 0)
        for s in steps:
            assert s.to_run is not None
            assert s.seconds_per_row is not None
            total = total.plus(s.to_run.times(s.seconds_per_row).times(s.gpus))
        return total if steps else None

    def _reading(self) -> list[Interval]:
        most = max((s.to_run for s in self.steps if s.to_run), key=lambda i: i.value, default=None)
        return [most.times(self.reading)] if most and self.reading and most.value else []


@plainly()
def estimate(plan: Plan, units: Sequence[Unit], sample: int = 16) -> Estimate:
    """Compare a recipe with its lake, and take `sample` rows through it (0: none).

    Raises nothing for weights that are not here: their annotators, and those that need them, are named.
    """
    lake = Lake(plan.recipe.lake)
    steps, able = _steps(plan)
    inner = replace(plan, annotators=able)
    todo = find_todo(inner, lake, units, {a.name: unreadable(plan, lake, units) for a in able})
    rows = _rows(plan, lake, units)
    out = Estimate(None if None in rows.values() else sum(n or 0 for n in rows.values()), len(units), len(todo.unread))
    out.steps = steps
    for step in steps:
        if step.unavailable is None:
            _count(step, inner, lake, units, rows, todo)
    if sample and units:
        with tempfile.TemporaryDirectory() as folder:
            _sample(out, inner, units, rows, sample, Path(folder))
    return out


def _steps(plan: Plan) -> tuple[list[Step], list[Annotator]]:
    """A step per annotator, and the annotators that can run here."""
    steps, able = [], []
    lost: set[str] = set()
    for annotator in plan.annotators:
        step = Step(annotator.name, plan.where_of(annotator), demand(annotator)[1])
        try:
            gone = missing((annotator.name, w) for w in annotator.weights())
        except X2IError as error:
            step.unavailable = str(error)
        else:
            if gone:
                step.unavailable = "not here: " + "; ".join(str(g).partition(": ")[2] for g in gone)
                step.remedy = gone[0].weights.remedy
        needed = {a.name for a in annotator.upstream} | set(mentioned(annotator.config.where or "", lost))
        if step.unavailable is None and needed & lost:
            step.unavailable = f"waits for {', '.join(sorted(needed & lost))}"
        if step.unavailable is None:
            able.append(annotator)
        else:
            lost.add(annotator.name)
        steps.append(step)
    return steps, able


def _rows(plan: Plan, lake: Lake, units: Sequence[Unit]) -> dict[str, int | None]:
    """Rows of each unit: from the lake if it was read, else as the source says."""
    sources = {s.name: s.fingerprint for s in plan.sources}
    out: dict[str, int | None] = {}
    for unit in units:
        path = lake.file(Column("rows", sources[unit.source]), unit.id)
        out[unit.id] = count_rows(path) if path.exists() else unit.rows
    return out


def _count(step: Step, plan: Plan, lake: Lake, units: Sequence[Unit], rows: dict[str, int | None], todo: Todo) -> None:
    annotator = next(a for a in plan.annotators if a.name == step.name)
    column, sources = plan.column(annotator), {s.name: s.fingerprint for s in plan.sources}
    done = lake.done(column)
    there = [lake.file(column, u.id, sources[u.source]) for u in units]
    step.cached = sum(count_rows(p) for p in there if p.stem in done)
    if step.name in todo.waiting:
        return  # a share of the rows, which the sample tells
    counts = []
    for unit in units:
        wanted = todo.missing.get(unit.id, {})
        if step.name in wanted:
            some = wanted[step.name]
            counts.append(rows[unit.id] if some is None else len(some))
    if None not in counts:
        exact = float(sum(c or 0 for c in counts))
        step.to_run = Interval(exact, exact, exact)


def _sample(
    out: Estimate, plan: Plan, units: Sequence[Unit], rows: dict[str, int | None], size: int, folder: Path
) -> None:
    chosen = _choose(plan, units, rows, size)
    recipe = plan.recipe.model_copy(update={"lake": str(folder / "lake"), "out": str(folder / "out")})
    small = replace(plan, recipe=recipe, sources=[Few(s, chosen) for s in plan.sources])
    some = [u for u in units if u.id in chosen]
    lake, runner = Lake(folder / "lake"), Inline(small)
    for annotator in small.annotators:
        try:
            runner.set_up(annotator)
            annotator.fits = max(1, size // CALLS)
        except X2IError as error:
            step = next(s for s in out.steps if s.name == annotator.name)
            step.unavailable, step.to_run = str(error), None
    if lost := {s.name for s in out.steps if s.unavailable}:
        small = _without(small, lost, out)
        runner = Inline(small)
    done = annotate(small, lake, some, runner, Quiet())
    _judge(out, small, lake, some, folder)
    sampled = sum(count_rows(lake.file(Column("rows", f), u)) for f, us in by_source(small, some).items() for u in us)
    out.sample, out.decodes = sampled, done.decoded
    out.on_gpu = any(demand(a)[1] for a in small.annotators) and _has_gpu()
    out.reading = _per_row([(t.rows, t.reading) for t in done.tallies if t.decoded])
    for annotator in small.annotators:
        step = next(s for s in out.steps if s.name == annotator.name)
        _cost(step, small, lake, some, annotator, done, sampled)
        if step.to_run is None and out.rows is not None:
            share = (
                share_of(_seen(small, lake, some, annotator), sampled)
                if step.where or plan.where_of(annotator)
                else None
            )
            cached = float(step.cached or 0)
            whole = (
                share.times(float(out.rows)) if share else Interval(float(out.rows), float(out.rows), float(out.rows))
            )
            step.to_run = Interval(*(max(0.0, v - cached) for v in (whole.value, whole.low, whole.high)))
    _assembly(out, small, some, lake, folder)
    for annotator in small.annotators:
        annotator.fits = None


def _has_gpu() -> bool:
    import torch  # loaded already by the annotators that ask for one

    return bool(torch.cuda.is_available())


def _without(plan: Plan, lost: set[str], out: Estimate) -> Plan:
    able = []
    for annotator in plan.annotators:
        needed = {a.name for a in annotator.upstream} | set(mentioned(annotator.config.where or "", lost))
        if annotator.name in lost or needed & lost:
            lost.add(annotator.name)
            step = next(s for s in out.steps if s.name == annotator.name)
            step.unavailable = step.unavailable or f"waits for {', '.join(sorted(needed & lost))}"
            step.to_run = None
        else:
            able.append(annotator)
    return replace(plan, annotators=able)


def _choose(plan: Plan, units: Sequence[Unit], rows: dict[str, int | None], size: int) -> dict[str, frozenset[int]]:
    """Rows by unit: drawn by the recipe's content, so that a second look sees the same ones."""
    rng = generator("plan/1", plan.recipe.name, [u.id for u in units], size)
    order = [units[i] for i in rng.permutation(len(units))[: max(1, min(len(units), -(-size // 2)))]]
    each = -(-size // len(order))
    out: dict[str, frozenset[int]] = {}
    left = size
    for unit in order:
        there = rows[unit.id]
        take = min(each, left) if there is None else min(each, left, there)
        if take > 0:
            # a source that does not know its length is read from the start
            picked = range(take) if there is None else (int(i) for i in rng.choice(there, take, replace=False))
            out[unit.id] = frozenset(picked)
        left -= take
    return out


class Few(Source):
    """Some rows of another source's units, under its name and fingerprint."""

    kind = "few"

    def __init__(self, source: Source, chosen: dict[str, frozenset[int]]) -> None:
        super().__init__(source.config)
        self._source, self._chosen = source, chosen

    @property
    def fingerprint(self) -> str:
        return self._source.fingerprint

    def plan(self) -> Iterator[Unit]:
        return (u for u in self._source.plan() if u.id in self._chosen)

    def read(self, unit: Unit, only: Collection[int] | None = None) -> Iterator[Row]:
        chosen = self._chosen[unit.id]
        return self._source.read(unit, chosen if only is None else chosen & frozenset(only))


def _judge(out: Estimate, plan: Plan, lake: Lake, units: Sequence[Unit], folder: Path) -> None:
    """The share of the sample that the recipe's conditions let stay; duplicates need the whole, and are left out."""
    names = [s.name for s in out.steps if s.unavailable]
    where = {n: c for n, c in plan.recipe.select.where.items() if not mentioned(c, names)}
    out.not_judged = [n for n in plan.recipe.select.where if n not in where]
    best = [b for b in plan.recipe.select.dedup.best if not mentioned(b, names)]
    selection = plan.recipe.select.model_copy(
        update={"where": where, "dedup": Dedup(exact=False, perceptual=None, best=best)}
    )
    asked = replace(plan, recipe=plan.recipe.model_copy(update={"select": selection}))
    select(asked, lake, by_source(plan, units), folder / "verdicts.parquet")
    with connect() as connection:
        found = connection.sql(
            f"select count(*), count(*) filter (where kept) from {literal(folder / 'verdicts.parquet')}"
        )
        ((total, kept),) = found.fetchall()
    out.kept = share_of(kept, total)


def _assembly(out: Estimate, plan: Plan, units: Sequence[Unit], lake: Lake, folder: Path) -> None:
    """Build the samples of the sample's kept rows: how many, how large, how long."""
    lost = {s.name for s in out.steps if s.unavailable}
    tasks = [t for t in plan.tasks if not lost & {r.partition(".")[0] for r in t.reads}]
    if not tasks or out.kept is None or not out.kept.value:
        return
    scores = [s for s in plan.recipe.output.scores or [] if s.partition(".")[0] not in lost]
    output = plan.recipe.output.model_copy(update={"scores": scores, "shard_samples": 10**9})
    plan = replace(plan, tasks=tasks, recipe=plan.recipe.model_copy(update={"output": output}))
    staging = publish.Staging(Path(plan.recipe.out))
    (folder / "verdicts.parquet").rename(staging.verdicts)
    known = {u.id: u for u in units}
    found = find_groups(plan, lake, by_source(plan, units), staging.verdicts, known) if has_groups(plan) else None
    groups = staging.group(plan, found)
    per_row: list[int] = []
    count = 0
    began = time.perf_counter()
    with pq.ParquetFile(groups.rows) as file:
        for number in range(len(groups.units)):
            rows = file.read_row_group(number).to_pylist()
            assemble_group(plan, {u.id: u for u in units}, rows, groups.folder(number))
            part = pq.read_table(groups.folder(number) / PART, columns=["row_id", "size"])
            sizes = part.group_by("row_id").aggregate([("size", "sum")])["size_sum"].to_pylist()
            per_row += [*sizes, *[0] * (len(rows) - len(sizes))]
            count += part.num_rows
    seconds = (time.perf_counter() - began) / max(1, len(per_row))
    out.samples_per_row = count / max(1, len(per_row))
    if out.rows is not None:
        kept = out.kept.times(float(out.rows))
        out.assembly = kept.times(seconds)
        out.corpus_bytes = kept.times(mean_of([float(b) for b in per_row]))


def _seen(plan: Plan, lake: Lake, units: Sequence[Unit], annotator: Annotator) -> int:
    sources = {s.name: s.fingerprint for s in plan.sources}
    column = plan.column(annotator)
    return sum(count_rows(lake.file(column, u.id, sources[u.source])) for u in units)


def _cost(
    step: Step, plan: Plan, lake: Lake, units: Sequence[Unit], annotator: Annotator, done: Annotated, sampled: int
) -> None:
    calls = [c for t in done.tallies for c in t.calls.get(annotator.name, [])]
    step.seconds_per_row = _per_row(calls[1:] if len(calls) > 2 else calls)  # the first one warms up
    sources = {s.name: s.fingerprint for s in plan.sources}
    column = plan.column(annotator)
    tables = [read_table(lake.file(column, u.id, sources[u.source])) for u in units]
    whole = pa.concat_tables(tables)
    if whole.num_rows:
        step.bytes_per_row = (_stored(whole) - _stored(whole.slice(0, 0))) / whole.num_rows


def _stored(table: pa.Table) -> int:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.tell()


def _per_row(calls: list[tuple[int, float]]) -> Interval | None:
    """Seconds a row, over calls (rows, seconds)."""
    rates = [seconds / rows for rows, seconds in calls if rows]
    if not rates:
        return None
    rows = np.array([n for n, _ in calls if n], float)
    mean = float(sum(s for _, s in calls) / rows.sum())
    spread = mean_of(rates)
    return Interval(mean, max(0.0, mean - (spread.value - spread.low)), mean + (spread.high - spread.value))
