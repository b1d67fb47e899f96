"""What of the annotation is missing, and in which passes it is made.

A *pass* is a sweep over units in which annotators with equal resources share workers, and each image is
decoded once. An annotator is in a later pass than those whose values its `where` needs (the driver asks the
lake which rows those let through), and than those that it reads and that have other resources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from x2i.base.errors import RecipeError
from x2i.base.files import atomic, in_turn
from x2i.base.sql import connect, literal, stumbles
from x2i.corpus.lake import ERRORS, KEYS, Column, Lake, create_views, mentioned, passing
from x2i.pipelines.annotators.base import Annotator
from x2i.pipelines.engine.annotate import again
from x2i.pipelines.recipe import Plan
from x2i.pipelines.sources.base import Unit

#: Rows of a unit that an annotator has not seen: their indices, or None for all of them.
Rows = frozenset[int] | None

#: Reasons of errors that may pass: memory, a worker's death, a server's mood.
PASSING = ("out_of_memory", "annotator_failed", "worker_died")

#: Tables of a query beside the annotators', under names that no annotator can have.
SEEN, AGAIN = "x2i seen", "x2i again"

#: CPUs and GPUs that one worker takes.
Kind = tuple[float, float]


@dataclass
class Todo:
    """What is missing. `waiting` are annotators of which it cannot be told before others have run."""

    missing: dict[str, dict[str, Rows]] = field(default_factory=dict)  # unit -> annotator -> rows
    unread: set[str] = field(default_factory=set)  # units whose rows are not in the lake
    waiting: list[str] = field(default_factory=list)
    visited: dict[str, list[str]] = field(default_factory=dict)  # annotator -> units of which it is to see no row

    def add(self, unit: str, annotator: str, rows: Rows) -> None:
        """An annotator has not seen these rows of a unit."""
        self.missing.setdefault(unit, {})[annotator] = rows

    @property
    def done(self) -> bool:
        """Whether nothing is missing."""
        return not self.missing and not self.unread and not self.waiting


def unreadable(plan: Plan, lake: Lake, units: Sequence[Unit]) -> set[str]:
    """Units with rows that could not be read last time: they are annotated again."""
    sources = {s.name: s.fingerprint for s in plan.sources}
    return {u.id for u in units if again(lake.file(Column("rows", sources[u.source]), u.id)).exists()}


def failed(plan: Plan, lake: Lake, units: Sequence[Unit]) -> dict[str, dict[str, Rows]]:
    """Rows whose annotation failed for reasons that another run may not meet, by annotator and unit."""
    sources = {s.name: s.fingerprint for s in plan.sources}
    reasons = ", ".join(literal(r) for r in PASSING)
    out: dict[str, dict[str, Rows]] = {}
    with connect() as connection:
        for annotator in plan.annotators:
            column = plan.column(annotator)
            paths = {u.id: lake.file(column, u.id, sources[u.source]) for u in units}
            files = {u.id: lake.file(Column("rows", sources[u.source]), u.id) for u in units}
            there = [u for u, path in paths.items() if path.exists() and files[u].exists()]
            if there:
                asked = f"error in ({reasons})" + (
                    f" or coalesce(({annotator.retry}), false)" if annotator.retry else ""
                )
                connection.read_parquet([str(paths[u]) for u in there]).create_view("annotated", replace=True)
                connection.read_parquet([str(files[u]) for u in there]).create_view("rows", replace=True)
                found = connection.sql(
                    f"""select unit, list("index") from rows where row_id in
                    (select row_id from annotated where {asked}) group by unit"""
                ).fetchall()
                out[annotator.name] = {unit: frozenset(indices) for unit, indices in found}
            for above in annotator.upstream:  # what it made of a failure is out of date when that is mended
                mine = out.setdefault(annotator.name, {})
                for unit, rows in out.get(above.name, {}).items():
                    if unit in there:
                        mine[unit] = (mine.get(unit) or frozenset()) | (rows or frozenset())
    return out


def find_todo(
    plan: Plan,
    lake: Lake,
    units: Sequence[Unit],
    repeat: dict[str, set[str]] | None = None,
    retry: dict[str, dict[str, Rows]] | None = None,
) -> Todo:
    """Compare what the recipe wants with what lies in the lake.

    Args:
        repeat: units that an annotator (or `rows`) is to see again, by its name, though they are in the lake.
        retry: the same for single rows of units.

    Raises:
        X2IError: an annotator's weights cannot be had, so that its fingerprint is not known.
    """
    repeat = repeat or {}
    todo = Todo()
    sources = {s.name: s.fingerprint for s in plan.sources}
    for fingerprint in set(sources.values()):
        done = lake.done(Column("rows", fingerprint)) - repeat.get("rows", set())
        todo.unread |= {u.id for u in units if sources[u.source] == fingerprint and u.id not in done}
    unfinished: set[str] = set()
    for annotator in plan.annotators:
        column = plan.column(annotator)
        needed = [a.name for a in annotator.upstream] + mentioned(column.where or "", [a.name for a in plan.annotators])
        if column.where is not None and (todo.unread or unfinished & set(needed)):
            todo.waiting.append(annotator.name)
            unfinished.add(annotator.name)
            continue
        done = lake.done(column)
        files = {u.id: lake.file(column, u.id, sources[u.source]).stem in done for u in units}
        there = {u for u, is_there in files.items() if is_there}
        again: dict[str, Rows] = {
            **(retry or {}).get(annotator.name, {}),
            **dict.fromkeys(repeat.get(annotator.name, ())),
        }
        rows: dict[str, Rows]
        if column.where is None:
            rows = {u: None for u in files if u not in there}
            if there and lake.some(column).exists():  # a recipe with a `where` may have left rows out
                if there & todo.unread:
                    todo.waiting.append(annotator.name)
                read = [u for u in units if u.id in there - todo.unread]
                rows |= _unseen(plan, lake, read, annotator, there, {})
            for unit in again.keys() & files.keys():
                seen, more = rows.get(unit, frozenset()), again[unit]
                rows[unit] = None if seen is None or more is None else seen | more
        else:
            rows = _unseen(plan, lake, units, annotator, there, again)
            todo.visited[annotator.name] = [u for u in files if u not in there and u not in rows]
        for unit, indices in rows.items():
            todo.add(unit, annotator.name, indices)
        if rows or todo.visited.get(annotator.name) or annotator.name in todo.waiting:
            unfinished.add(annotator.name)
    return todo


def _unseen(
    plan: Plan,
    lake: Lake,
    units: Sequence[Unit],
    annotator: Annotator,
    there: set[str],
    again: dict[str, Rows],
) -> dict[str, Rows]:
    """The rows that an annotator's `where` lets through and that are not in its files, by unit.

    Args:
        there: units of which it has files.
        again: by unit, rows that are wanted again if the `where` lets them through.
    """
    import duckdb

    if not units:
        return {}
    column = plan.column(annotator)
    where = column.where or "true"
    columns = [plan.column(a) for a in _named(plan, where)]
    sources = {s.name: s.fingerprint for s in plan.sources}
    with connect() as connection:
        create_views(connection, lake, by_source(plan, units), columns)
        files = [str(lake.file(column, u.id, sources[u.source])) for u in units if u.id in there]
        if files:
            connection.read_parquet(files).project("row_id").create_view(SEEN)
        else:
            connection.register(SEEN, pa.table({"row_id": pa.array([], pa.string())}))
        some = [(unit, index) for unit, rows in again.items() for index in (rows if rows is not None else [None])]
        connection.register(
            AGAIN,
            pa.table(
                {
                    "unit": pa.array([u for u, _ in some], pa.string()),
                    "index": pa.array([i for _, i in some], pa.int32()),
                }
            ),
        )
        query = passing(where, [c.name for c in columns], 'rows.row_id, rows.unit, rows."index"')
        asked = f"""select unit, list("index") from ({query}) p
            where row_id not in (select row_id from "{SEEN}")
            or exists (select 1 from "{AGAIN}" a where a.unit = p.unit and coalesce(a."index", p."index") = p."index")
            group by unit"""
        try:
            found = connection.sql(asked).fetchall()
        except duckdb.DataError as error:
            key = f"{plan.where}: annotators.{annotator.name}.where"
            raise RecipeError(stumbles(key, where, error)) from None
    return {unit: frozenset(indices) for unit, indices in found}


def _named(plan: Plan, where: str) -> list[Annotator]:
    """The annotators that a condition names, and those that their conditions name, each after those."""
    names = [a.name for a in plan.annotators]
    found: set[str] = set()
    waiting = mentioned(where, names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += mentioned(plan.where_of(plan.annotators[names.index(name)]) or "", names)
    return [a for a in plan.annotators if a.name in found]


def write_empty(plan: Plan, lake: Lake, units: Iterable[Unit], todo: Todo) -> None:
    """Write files without rows where an annotator is to see none of a unit, so that its view has all units."""
    sources = {s.name: s.fingerprint for s in plan.sources}
    by_id = {u.id: u for u in units}
    for annotator in plan.annotators:
        for unit in todo.visited.get(annotator.name, ()):
            path = lake.file(plan.column(annotator), unit, sources[by_id[unit].source])
            with in_turn(path.parent):
                if path.exists():  # another recipe's build was here since
                    continue
                with atomic(path) as temporary:
                    pq.write_table(pa.schema([*KEYS, *annotator.columns, *ERRORS]).empty_table(), temporary)


def by_source(plan: Plan, units: Iterable[Unit]) -> dict[str, list[str]]:
    """Unit ids by the fingerprint of their source, in the order of the plan."""
    ids: dict[str, list[str]] = {s.fingerprint: [] for s in plan.sources}
    names = {s.name: s.fingerprint for s in plan.sources}
    for unit in units:
        ids[names[unit.source]].append(unit.id)
    return ids


@dataclass(frozen=True)
class Pass:
    """Annotators that share workers of one kind, each after those that it reads."""

    kind: Kind
    annotators: tuple[str, ...]


def passes(plan: Plan, kind: Callable[[Annotator], Kind]) -> list[Pass]:
    """The sweeps over units that a recipe's annotators need, in their order."""
    stage: dict[str, int] = {}
    names = [a.name for a in plan.annotators]
    by_name = {a.name: a for a in plan.annotators}
    for annotator in plan.annotators:
        where = mentioned(plan.where_of(annotator) or "", names)
        shared = [0 if kind(a) == kind(annotator) else 1 for a in annotator.upstream]
        stage[annotator.name] = max(
            [
                0 if plan.where_of(annotator) is None else 1,
                *(stage[n] + 1 for n in where),
                *(stage[a.name] + later for a, later in zip(annotator.upstream, shared, strict=True)),
            ]
        )
    keys = sorted({(stage[n], kind(by_name[n])) for n in names}, key=lambda k: (k[0], k[1][1], k[1][0]))
    return [Pass(k, tuple(n for n in names if (stage[n], kind(by_name[n])) == (s, k))) for s, k in keys]
