"""The actor that does the work: it gets the name of a unit or a group, reads it itself, writes its own file."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from x2i.base.errors import X2IError
from x2i.corpus.lake import Column, Lake
from x2i.pipelines.annotators.base import Annotator
from x2i.pipelines.engine.annotate import Journal, Tally, Want, annotate_unit
from x2i.pipelines.engine.assemble import assemble_group
from x2i.pipelines.recipe import Plan, Recipe, make
from x2i.pipelines.sources.base import Problem, Unit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """What a worker may use: `threads` to decode in, and whether to decode while the annotators work (on a GPU)."""

    threads: int = 1
    overlap: bool = False


class Worker:
    """Made once per process; models are loaded when the first unit needs them, and stay."""

    def __init__(self, recipe: dict[str, Any], folder: str, gpus: float = 0.0) -> None:
        if not gpus:  # before torch is imported: what was not asked for must not be taken
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if not Path(folder).is_dir():
            raise X2IError(f"{folder}: not to be seen from this machine; lake, corpus and sources must be shared")
        os.chdir(folder)  # a recipe's paths are relative to where the build was started
        self._take(make(Recipe.model_validate(recipe)))

    @classmethod
    def of(cls, plan: Plan) -> Worker:
        """A worker in this process, for a plan that is made already."""
        worker = cls.__new__(cls)
        worker._take(plan)
        return worker

    def _take(self, plan: Plan) -> None:
        self._plan = plan
        self._lake = Lake(self._plan.recipe.lake)
        self._sources = {s.name: s for s in self._plan.sources}
        self._annotators = {a.name: a for a in self._plan.annotators}
        self._ready: set[str] = set()
        self._columns: dict[str, Column] = {}

    def pid(self) -> int:
        """The process's id."""
        return os.getpid()

    def annotate(
        self,
        unit: Unit,
        wanted: dict[str, frozenset[int] | None],
        write_rows: bool,
        skip: dict[int, Problem],
        careful: bool,
        place: Place = Place(),
    ) -> Tally:
        """Run the named annotators over one unit, or over some rows of it; see `annotate_unit`."""
        wants = [Want(self.set_up(n), self._column(n), only) for n, only in wanted.items()]
        journal = Journal(journal_path(self._lake, unit)) if careful else None
        read = {r.partition(".")[0] for w in wants for r in w.annotator.reads} - {"rows"}
        return annotate_unit(
            self._sources[unit.source],
            unit,
            wants,
            self._lake,
            write_rows,
            skip,
            journal,
            {name: self._column(name) for name in read},
            place.threads,
            place.overlap,
        )

    def set_up(self, name: str) -> Annotator:
        """The annotator of this name, its models loaded."""
        annotator = self._annotators[name]
        if name not in self._ready:
            if annotator.weights():
                keep_memory()
            annotator.setup()
            self._ready.add(name)
        return annotator

    def _column(self, name: str) -> Column:
        if name not in self._columns:
            self._columns[name] = self._plan.column(self._annotators[name])
        return self._columns[name]

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function gives that needs nothing of the plan."""
        return function(*arguments)

    def assemble(self, units: list[Unit], selected: str, group: int, folder: str) -> int:
        """Build one group: row group `group` of the file `selected`. Returns the number of rows."""
        with pq.ParquetFile(selected) as file:
            rows = file.read_row_group(group).to_pylist()
        assemble_group(self._plan, {u.id: u for u in units}, rows, Path(folder))
        return len(rows)


def keep_memory() -> None:
    """Let glibc keep what is freed, up to 1 GiB: models free and ask for the same large blocks at every call.

    Handing them back to the kernel and faulting them in anew took 40 % of a small network's time on a CPU.
    """
    try:
        libc = ctypes.CDLL(None)
        for parameter, value in ((-3, 2**30), (-1, 2**30)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(parameter, value)
    except (OSError, AttributeError):  # another C library
        log.debug("mallopt is not to be had")


def journal_path(lake: Lake, unit: Unit) -> Path:
    """Where a second attempt at a unit notes the row in hand."""
    return lake.path / "journal" / unit.id
