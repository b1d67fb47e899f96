"""What the commands share: the console, progress bars, JSON for machines, exit codes."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

#: For people: on stderr, so that stdout holds nothing but what was asked for with --json.
console = Console(stderr=True)


def set_up_logging(verbose: bool) -> None:
    """Warnings and worse (with `verbose`, everything) to the console."""
    from rich.logging import RichHandler

    handler = RichHandler(console=console, show_path=False, show_time=verbose)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", handlers=[handler])


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    Console(soft_wrap=True, highlight=False).print(json.dumps(value, indent=1, default=str), markup=False)


class Bars:
    """`x2i.pipelines.engine.progress.Progress`, drawn with rich."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: Any = None

    def start(self, stage: str, total: int, unit: str) -> None:
        """Begin a bar."""
        self.finish()
        self._task = self._progress.add_task(f"{stage} ({unit})", total=total)

    def advance(self, by: int = 1) -> None:
        """Move the bar."""
        if self._task is not None:
            self._progress.advance(self._task, by)

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(f"· {text}", markup=False, highlight=False)

    def finish(self) -> None:
        """Leave the bar as it is."""
        self._task = None


@contextlib.contextmanager
def bars(quiet: bool = False) -> Iterator[Bars]:
    """Progress bars for the length of a block; none with `quiet`."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=quiet) as progress:
        yield Bars(progress)


def table(title: str, *columns: str) -> Table:
    """An empty table in the house's style."""
    from rich.table import Table

    out = Table(title=title, title_justify="left", title_style="bold", header_style="bold", expand=False)
    for column in columns:
        out.add_column(column, overflow="fold")
    return out
