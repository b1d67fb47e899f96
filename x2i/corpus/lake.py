"""The lake: one Parquet file per annotator and unit, at a path that says what made it.

    LAKE/rows/<source fingerprint>/<unit>.parquet         what the source says of each row
    LAKE/<annotator>/<fingerprint>/annotator.json         name, version, parameters, weights, columns
    LAKE/<annotator>/<fingerprint>/<unit>.parquet         the columns, keyed by row_id
    LAKE/<annotator>/<fingerprint>/<unit>-<source>.parquet    the same, of annotators that read the rows' text
    LAKE/<annotator>/<fingerprint>/some         a mark: a `where` was in force, so files may lack rows of their units
    LAKE/plans/<source>-<fingerprint>.jsonl               the plan of units, a line each
    LAKE/recipes/<recipe>.json                            which fingerprints a recipe's last build read
    LAKE/benchmarks/<annotator's fingerprint>/<folder's digest>.parquet    what an annotator says of a benchmark's images
    LAKE/judgements/<fingerprint>.parquet                 what a judge said of names
    LAKE/forgotten.jsonl                                  images that no corpus of this lake may hold again

A file that is there is never computed again: "done" is a file's existence. An annotator with a `where` has
in its file the rows for which it held in any recipe so far, and is done when those for which it holds now are
among them; a recipe without the `where` wants all rows. Everything can be read with plain DuckDB, Polars or
pandas; `open` adds views named after the annotators, without the units of files that have changed since,
and without rows that another `where` let in.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from x2i.base.errors import X2IError
from x2i.base.sql import connect, damage, identifier

if TYPE_CHECKING:
    import duckdb

#: What every source's rows have; `meta` and the problem's `detail` are for people, `meta` is JSON.
ROWS = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("unit", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("location", pa.string(), nullable=False),
        pa.field("image_id", pa.string()),  # SHA-256 of the bytes; null where there are none
        pa.field("text", pa.string()),
        pa.field("meta", pa.string(), nullable=False),
        pa.field("inputs", pa.list_(pa.string()), nullable=False),  # image ids of a ready X2I row's inputs
        pa.field("problem", pa.string()),
        pa.field("problem_detail", pa.string()),
    ]
)

#: What every annotator's file has besides its own columns. `error` says why a row's values are null.
KEYS = [pa.field("row_id", pa.string(), nullable=False)]
ERRORS = [pa.field("error", pa.string()), pa.field("error_detail", pa.string())]

#: Folder names are this many digits of a fingerprint; the whole of it stands in annotator.json.
SHORT = 16


@dataclass(frozen=True)
class Column:
    """An annotator's columns in the lake: its name and the fingerprint that says what made them.

    `where` is the SQL that lets rows in (a view shows those alone). `texts`: the values depend on what a source
    says of its rows, and not on the unit's images alone, so that a file's name carries the source's fingerprint.
    """

    name: str
    fingerprint: str
    where: str | None = None
    texts: bool = False

    @property
    def folder(self) -> str:
        """Path of the columns below the lake."""
        return f"{self.name}/{self.fingerprint[:SHORT]}"


class Lake:
    """Paths of a lake, and SQL over it. Raises nothing until something is read."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def file(self, column: Column, unit: str, source: str = "") -> Path:
        """Where an annotator's values for one unit lie, or will lie. `source` is the fingerprint of the unit's source."""
        stem = f"{unit}-{source[:SHORT]}" if column.texts else unit
        return self.path / column.folder / f"{stem}.parquet"

    def done(self, column: Column) -> set[str]:
        """Stems of the files that are there already: ids of units (with the source's fingerprint where `texts`)."""
        folder = self.path / column.folder
        return {p.stem for p in folder.glob("*.parquet")} if folder.is_dir() else set()

    def some(self, column: Column) -> Path:
        """The mark that an annotator's files may lack rows of their units, because a `where` was in force."""
        return self.path / column.folder / "some"

    def record(self, recipe: str) -> Path:
        """The file that says what a recipe's last build read."""
        return self.path / "recipes" / f"{recipe}.json"

    def recipes(self) -> list[str]:
        """Names of the recipes that were built on this lake, the latest last."""
        found = sorted((self.path / "recipes").glob("*.json"), key=lambda p: (p.stat().st_mtime_ns, p.name))
        return [p.stem for p in found]

    def sql(self, query: str, recipe: str | None = None) -> duckdb.DuckDBPyRelation:
        """Run a DuckDB query over `rows` and one view per annotator, as the recipe's last build saw them."""
        return self.connect(recipe or self._latest).sql(query)

    @cached_property
    def _latest(self) -> str:
        if not self.recipes():
            raise X2IError(f"{self.path}: not a lake that a build has finished annotating (no recipes/*.json).")
        return self.recipes()[-1]

    def connect(self, recipe: str) -> duckdb.DuckDBPyConnection:
        """A DuckDB connection with the views of `recipe`."""
        try:
            record: dict[str, Any] = json.loads(self.record(recipe).read_text())
        except FileNotFoundError:
            raise X2IError(f"{self.path}: no recipe {recipe!r}; it has {', '.join(self.recipes()) or 'none'}") from None
        connection = connect()
        create_views(connection, self, record["units"], [Column(**c) for c in record["columns"]])
        return connection


def read_table(path: Path, columns: list[str] | None = None, schema: pa.Schema | None = None) -> pa.Table:
    """One file of a lake. Raises X2IError if it is damaged."""
    with _damaged(path):
        return pq.read_table(path, columns=columns, schema=schema)


def count_rows(path: Path) -> int:
    """How many rows one file of a lake has. Raises X2IError if it is damaged."""
    with _damaged(path):
        return int(pq.read_metadata(path).num_rows)


@contextlib.contextmanager
def _damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except pa.ArrowInvalid as error:
        raise X2IError(damage(path, error)) from None


def create_views(
    connection: duckdb.DuckDBPyConnection, lake: Lake, units: dict[str, list[str]], columns: list[Column]
) -> None:
    """Create `rows` and one view per column over exactly the files of these units.

    Args:
        units: unit ids by the rows' fingerprint (the source's).
        columns: the annotators to show, each after those that its `where` names; each view has `row_id` and is to
            be joined on it. Rows for which an annotator's `where` does not hold are not in its view.
    """
    rows = [str(lake.file(Column("rows", source), unit)) for source, ids in units.items() for unit in ids]
    connection.read_parquet(rows).create_view("rows")
    for column in columns:
        files = [str(lake.file(column, unit, source)) for source, ids in units.items() for unit in ids]
        if column.where is None:
            connection.read_parquet(files).create_view(column.name)
        else:
            connection.read_parquet(files).create_view(f"{column.name} (all)")
            before = [c.name for c in columns[: columns.index(column)]]
            connection.execute(
                f"""create view {identifier(column.name)} as select * from {identifier(f"{column.name} (all)")}
                where row_id in ({passing(column.where, before)})"""
            )


def passing(where: str, names: list[str], columns: str = "rows.row_id") -> str:
    """A query for the rows for which a condition holds; it joins those of the annotators `names` that it mentions."""
    joins = "".join(f" left join {identifier(name)} using (row_id)" for name in mentioned(where, names))
    return f"select {columns} from rows{joins} where coalesce(({where}\n), false)"


def mentioned(sql: str, names: Iterable[str]) -> list[str]:
    """Which of the annotators `names` an SQL condition mentions as `name.column`, in their order."""
    bare = re.sub(r"'(?:[^']|'')*'|--[^\n]*|/\*.*?\*/", " ", sql, flags=re.DOTALL)
    found = {(m[1] or m[2]).lower() for m in re.finditer(r'(?:"([^"]+)"|\b([A-Za-z_]\w*))\s*\.', bare)}
    return [name for name in names if name.lower() in found]


def open_lake(path: str | Path) -> Lake:
    """Open a lake for reading. Raises X2IError if the folder is not there."""
    if not Path(path).is_dir():
        raise X2IError(f"{path}: no such lake. The recipe's key `lake` says where a build puts it.")
    return Lake(path)
