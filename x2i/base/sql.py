"""DuckDB as this house uses it: one way to connect, and quoting."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import duckdb


def connect() -> duckdb.DuckDBPyConnection:
    """A connection to an empty database in memory. The order of rows is kept, nothing is drawn on the screen."""
    import duckdb

    connection = duckdb.connect()
    connection.execute("set preserve_insertion_order = true")
    connection.execute("set enable_progress_bar = false")
    # DuckDB 2.0.0 ends with an internal error where this meets a struct column, an order and a limit
    connection.execute("set disabled_optimizers = 'late_materialization'")
    return connection


def identifier(*parts: str) -> str:
    """A quoted, dotted name of SQL."""
    return ".".join('"' + part.replace('"', '""') + '"' for part in parts)


def literal(text: object) -> str:
    """A string literal of SQL."""
    return "'" + str(text).replace("'", "''") + "'"
