"""Groups of rows that make samples together: asked of the task families once the selection stands.

A group belongs to one row, its anchor; what its other rows hold travels with the anchor's row, so that whoever
builds that row needs nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from x2i.base.seeds import canonical_json
from x2i.base.sql import connect, identifier, literal
from x2i.corpus.lake import Lake, create_views
from x2i.pipelines.engine.chosen import GROUPED, read_rows
from x2i.pipelines.recipe import Plan
from x2i.pipelines.sources.base import Unit
from x2i.pipelines.tasks.base import Task

if TYPE_CHECKING:
    import duckdb

#: A column beside the annotators', under a name that no annotator can have: the order of the rows.
PLACE = "x2i place"

GROUPS = pa.schema(
    [
        pa.field("place", pa.int64(), nullable=False),
        pa.field("row_id", pa.string(), nullable=False),  # the anchor
        pa.field("task", pa.string(), nullable=False),
        pa.field("task_type", pa.string(), nullable=False),
        pa.field("about", pa.string(), nullable=False),  # JSON
        pa.field("others", pa.list_(pa.string()), nullable=False),
    ]
)


def has_groups(plan: Plan) -> bool:
    """Whether any task of the recipe looks at more than one row at a time."""
    return any(_groups(task) for task in plan.tasks)


def _groups(task: Task) -> bool:
    return type(task).groups is not Task.groups


def find_groups(
    plan: Plan, lake: Lake, units: dict[str, list[str]], verdicts: Path, known: Mapping[str, Unit] | None = None
) -> pa.Table:
    """The groups of all tasks, as `GROUPS` says, in the tasks' order.

    Args:
        units: unit ids by source fingerprint. verdicts: of `x2i.pipelines.select.query.select`.
        known: the units by id, for tasks that look at pictures while they group (`Task.pictures`).

    Raises:
        ValueError: a task groups rows that were not kept, or under a task type that it does not have.
    """
    connection = connect()
    connection.execute("create schema lake; set schema = 'lake'")
    create_views(connection, lake, units, plan.columns())
    connection.execute("set schema = 'main'")
    connection.execute(f"set variable lake = {literal(lake.path)}")
    for task in plan.tasks:
        task.pictures = partial(_pictures, plan, known, verdicts) if known is not None else None
    connection.execute(f"create view kept as select * from read_parquet({literal(verdicts)}) where kept")
    table = pa.Table.from_batches(_tables(plan, connection), GROUPS)
    connection.register("found", table)
    strange = connection.sql(
        """select task, id from (select task, unnest(list_append(others, row_id)) as id from found)
        where id not in (select row_id from kept) limit 1"""
    ).fetchall()
    connection.close()
    if strange:
        raise ValueError(f"task {strange[0][0]}: a group with the row {strange[0][1]}, which is not among those kept")
    return table


def _pictures(plan: Plan, units: Mapping[str, Unit], verdicts: Path, ids: Sequence[str]) -> dict[str, bytes]:
    """The files of some kept rows by row id, as their sources give them; those that cannot be had are left out."""
    connection = connect()
    found = connection.sql(
        f'select row_id, unit, "index" from read_parquet({literal(verdicts)}) where row_id in $ids order by unit, "index"',
        params={"ids": list(ids)},
    ).to_arrow_table()
    connection.close()
    read = read_rows(plan, dict(units), found.to_pylist())
    return {row["row_id"]: got.data for row, got in read if got.data is not None and got.problem is None}


def _tables(plan: Plan, connection: duckdb.DuckDBPyConnection) -> Iterator[pa.RecordBatch]:
    """The groups of all tasks, some thousand at a time: as Python objects they take twenty times the memory."""
    place = 0
    for task in plan.tasks:
        types = set(task.task_types())
        groups = iter(task.groups(connection, plan.recipe.seed) if _groups(task) else ())
        while some := list(islice(groups, 10_000)):
            strange = {g.task_type for g in some} - types
            if strange:
                raise ValueError(f"task {task.name}: groups of the types {sorted(strange)}; it has {sorted(types)}")
            columns = [
                range(place, place + len(some)),
                [g.anchor for g in some],
                [task.name] * len(some),
                [g.task_type for g in some],
                [canonical_json(g.about) for g in some],
                [list(g.others) for g in some],
            ]
            yield pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, GROUPS, strict=True)], schema=GROUPS)
            place += len(some)


def join_groups(connection: duckdb.DuckDBPyConnection, plan: Plan, found: pa.Table, rows: str) -> str:
    """A query like `rows`, with the column `GROUPED`: of each anchor, its groups with their other rows, whole.

    Args:
        found: as `find_groups` gives them. rows: a query for the rows that stay, which has their order as `PLACE`.
    """
    connection.register("x2i found", found)
    values = ", ".join(["row_id", "source", "unit", "index", "location", "image_id", "text", "meta", "image"])
    values += "".join(f", {identifier(a.name)}" for a in plan.annotators if a.name != "image")
    return f"""
        with "x2i chosen" as ({rows}),
        "x2i members" as (
            select g.place, m.nth, o from "x2i found" g, unnest(g.others) with ordinality as m(id, nth)
            join (select {values} from "x2i chosen") o on o.row_id = m.id
        ),
        "x2i gathered" as (select place, list(o order by nth) as others from "x2i members" group by place),
        "x2i anchors" as (
            select g.row_id, list(struct_pack(task := g.task, task_type := g.task_type, about := g.about,
                                              others := coalesce(h.others, [])) order by g.place) as "{GROUPED}"
            from "x2i found" g left join "x2i gathered" h using (place) group by g.row_id
        )
        select c.* exclude ("{PLACE}"), a."{GROUPED}" from "x2i chosen" c left join "x2i anchors" a using (row_id)
        order by c."{PLACE}\""""
