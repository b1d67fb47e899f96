"""The ledger: which samples a run has consumed, step by step, and what each of them lost.

RUN/ledger/FIRST-LAST.parquet    one row per sample and step, in the steps' order

A file is written with each checkpoint, whole or not at all, and holds the steps since the one before. A run that goes on
from a checkpoint first removes what lies beyond it, so that every step is told once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from x2i.base.errors import X2IError
from x2i.base.files import atomic, remove
from x2i.base.sql import connect

if TYPE_CHECKING:
    import duckdb

FOLDER = "ledger"
SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),  # from 1, over all stages
        pa.field("stage", pa.dictionary(pa.int16(), pa.string()), nullable=False),
        pa.field("draw", pa.int64(), nullable=False),  # number of the draw in its stage, from 0
        pa.field("corpus", pa.int16(), nullable=False),  # its place in the run's corpora
        pa.field("key", pa.string(), nullable=False),
        pa.field("task", pa.dictionary(pa.int16(), pa.string()), nullable=False),
        pa.field("source", pa.dictionary(pa.int16(), pa.string()), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("loss", pa.float32(), nullable=False),
        pa.field("t", pa.float32()),  # of pictures: the timestep; null of conversations
        pa.field("tokens", pa.int32()),  # of conversations: tokens that were learned
        pa.field("length", pa.int32()),  # tokens of the sample, text and pictures
        pa.field("replaced", pa.string()),  # why the sample that was planned gave way to this one
    ]
)
_NAME = re.compile(r"(\d{8})-(\d{8})\.parquet")


@dataclass(frozen=True)
class Entry:
    """One sample of one step; the fields are `SCHEMA`'s."""

    step: int
    stage: str
    draw: int
    corpus: int
    key: str
    task: str
    source: str
    image_id: str
    loss: float
    t: float | None = None
    tokens: int | None = None
    length: int | None = None
    replaced: str | None = None


class Ledger:
    """Collects entries, and writes them when it is told to."""

    def __init__(self, run: Path, step: int, until: int) -> None:
        """Begin, or go on after `step`: what is told of later steps up to `until` is removed."""
        self._folder = run / FOLDER
        self._done = step
        self._entries: list[Entry] = []
        for file, first, _ in files_of(run):
            if step < first <= until:
                remove(file)

    def add(self, entries: Iterable[Entry]) -> None:
        """Note the samples of a step."""
        self._entries += entries

    def flush(self, step: int) -> None:
        """Write what was added, up to `step`."""
        if step == self._done:
            return
        columns = {name: [getattr(e, name) for e in self._entries] for name in SCHEMA.names}
        self._folder.mkdir(parents=True, exist_ok=True)
        with atomic(self._folder / f"{self._done + 1:08d}-{step:08d}.parquet") as temporary:
            pq.write_table(pa.table(columns, SCHEMA), temporary, compression="zstd")
        self._entries, self._done = [], step


def files_of(run: Path) -> list[tuple[Path, int, int]]:
    """The ledger's files with their first and last step, in order."""
    folder = run / FOLDER
    found = ((p, _NAME.fullmatch(p.name)) for p in folder.iterdir()) if folder.is_dir() else ()
    return sorted(((p, int(m[1]), int(m[2])) for p, m in found if m), key=lambda f: f[1])


def opened(runs: Sequence[Path]) -> duckdb.DuckDBPyConnection:
    """A connection with the view `ledger` over these runs' files; `run` is the folder, as it was given.

    Raises:
        X2IError: none of them has a ledger, or a file of it is damaged.
    """
    import duckdb

    files = {str(file): str(run) for run in runs for file, _, _ in files_of(run)}
    if not files:
        raise X2IError(f"{', '.join(map(str, runs))}: no ledger here (no {FOLDER}/FIRST-LAST.parquet): was it trained?")
    connection = connect()
    names = pa.table({"file": list(files), "run": list(files.values())})
    connection.register("runs", names)
    listed = ", ".join("'" + f.replace("'", "''") + "'" for f in files)
    try:
        connection.execute(
            f"create view ledger as select runs.run, l.* exclude (filename) "
            f"from read_parquet([{listed}], filename = true, union_by_name = true) l join runs on runs.file = l.filename"
        )
    except duckdb.Error as error:
        told = str(error).partition("\n")[0]
        raise X2IError(
            f"{', '.join(map(str, runs))}: the ledger is damaged ({told}): remove the file to read the rest"
        ) from None
    return connection
