"""DuckDB as this house uses it: one way to connect, and quoting."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from x2i.base.errors import X2IError

if TYPE_CHECKING:
    import duckdb

#: The buckets of `aspect(width, height)`, in SQL wherever this house runs it. (`16:9` would be a number in YAML.)
ASPECTS = ("9x21", "9x16", "2x3", "3x4", "4x5", "1x1", "5x4", "4x3", "3x2", "16x9", "21x9")


def connect() -> duckdb.DuckDBPyConnection:
    """A connection to an empty database in memory. The order of rows is kept, nothing is drawn on the screen."""
    import duckdb

    connection = duckdb.connect()
    connection.execute("set preserve_insertion_order = true")
    connection.execute("set enable_progress_bar = false")
    # DuckDB 2.0.0 ends with an internal error where this meets a struct column, an order and a limit
    connection.execute("set disabled_optimizers = 'late_materialization'")
    connection.execute(f"create temp macro aspect(width, height) as {_aspect()}")
    return connection


def _aspect() -> str:
    """SQL for the bucket whose ratio is the nearest by its logarithm; null where there is no size."""
    ratios = [int(w) / int(h) for w, h in (name.split("x") for name in ASPECTS)]
    ends = [math.sqrt(a * b) for a, b in itertools.pairwise(ratios)]
    cases = " ".join(f"when width < {end!r}e0 * height then '{name}'" for name, end in zip(ASPECTS, ends, strict=False))
    return f"case when width > 0 and height > 0 then case {cases} else '{ASPECTS[-1]}' end end"


def identifier(*parts: str) -> str:
    """A quoted, dotted name of SQL."""
    return ".".join('"' + part.replace('"', '""') + '"' for part in parts)


def literal(text: object) -> str:
    """A string literal of SQL."""
    return "'" + str(text).replace("'", "''") + "'"


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Raise what DuckDB says of files that it cannot read or write as X2IError, with what to do about it."""
    import duckdb

    try:
        yield
    except (duckdb.IOException, duckdb.InvalidInputException, duckdb.SerializationException) as error:
        said = str(error).splitlines()[0].partition(": ")[2] or str(error)
        if inner := re.search(r'"exception_message":("(?:[^"\\]|\\.)*")', said):
            said = json.loads(inner[1])
        if damaged := re.search(r"'([^']+\.parquet)'", said):
            raise X2IError(damage(damaged[1], said)) from None
        if "parquet" not in said and isinstance(error, duckdb.InvalidInputException):
            raise
        raise X2IError(f"{said}\nWhat is done is kept: mend the cause, and run the same command again.") from None


def damage(path: object, said: object) -> str:
    """What to say of a file of a lake that cannot be read."""
    return f"{path}: cannot be read ({said}). Remove it: the next build makes it again."


def brief(error: Exception) -> str:
    """The first two lines of what DuckDB says of an expression, but for its guesses, which know no recipe."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Candidate ")]
    return " ".join(lines[:2])


def stumbles(key: str, expression: str, error: Exception) -> str:
    """What to say of an expression that is sound, but not for every value that it meets."""
    said = next(iter(str(error).splitlines()), "")
    return f"{key}: {expression!r}: {said}. Where a value may not convert, try_cast(... as ...) gives null"
