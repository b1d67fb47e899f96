"""The actor that does the work: it gets the name of a unit or a group, reads it itself, writes its own file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from x2i.base.errors import X2IError
from x2i.corpus.lake import Lake
from x2i.pipelines.engine.annotate import Journal, Tally, annotate_unit
from x2i.pipelines.engine.assemble import assemble_group
from x2i.pipelines.recipe import Recipe, make
from x2i.pipelines.sources.base import Problem, Unit


class Worker:
    """Made once per process; models are loaded when the first unit needs them, and stay."""

    def __init__(self, recipe: dict[str, Any], folder: str) -> None:
        if not Path(folder).is_dir():
            raise X2IError(f"{folder}: not to be seen from this machine; lake, corpus and sources must be shared")
        os.chdir(folder)  # a recipe's paths are relative to where the build was started
        self._plan = make(Recipe.model_validate(recipe))
        self._lake = Lake(self._plan.recipe.lake)
        self._sources = {s.name: s for s in self._plan.sources}
        self._annotators = {a.name: a for a in self._plan.annotators}
        self._ready: set[str] = set()

    def pid(self) -> int:
        """The process's id."""
        return os.getpid()

    def annotate(
        self, unit: Unit, names: list[str], write_rows: bool, skip: dict[int, Problem], careful: bool
    ) -> Tally:
        """Run the named annotators over one unit; see `annotate_unit`."""
        annotators = [self._annotators[n] for n in names]
        for annotator in annotators:
            if annotator.name not in self._ready:
                annotator.setup()
                self._ready.add(annotator.name)
        journal = Journal(journal_path(self._lake, unit)) if careful else None
        source = self._sources[unit.source]
        return annotate_unit(source, unit, annotators, self._lake, write_rows, skip, journal)

    def assemble(self, units: list[Unit], selected: str, group: int, folder: str) -> int:
        """Build one group: row group `group` of the file `selected`. Returns the number of rows."""
        with pq.ParquetFile(selected) as file:
            rows = file.read_row_group(group).to_pylist()
        assemble_group(self._plan, {u.id: u for u in units}, rows, Path(folder))
        return len(rows)


def journal_path(lake: Lake, unit: Unit) -> Path:
    """Where a second attempt at a unit notes the row in hand."""
    return lake.path / "journal" / unit.id
