"""What annotators may read of a unit: values that others have put in the lake, or have just made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

from x2i.base.errors import X2IError
from x2i.corpus.lake import Column, Lake, read_table
from x2i.pipelines.annotators.base import Annotator, Item
from x2i.pipelines.sources.base import Problem


class Known:
    """The columns of one unit that the given annotators read, by row id.

    Args:
        columns: where the values of each annotator lie that any of `annotators` reads, by its name.
    """

    def __init__(
        self, lake: Lake, unit: str, source: str, annotators: Sequence[Annotator], columns: Mapping[str, Column]
    ) -> None:
        self._read: dict[str, set[str]] = {}
        for read in (r for a in annotators for r in a.reads):
            name, _, column = read.partition(".")
            if name != "rows":
                self._read.setdefault(name, set()).add(column)
        self._tables: dict[str, list[pa.Table]] = {name: [] for name in self._read}
        self._at: dict[str, dict[str, tuple[int, int]]] = {name: {} for name in self._read}  # row id -> table, row
        for name, wanted in self._read.items():
            path = lake.file(columns[name], unit, source) if name in columns else None
            if path is not None and path.exists():
                self.add(name, read_table(path, columns=["row_id", *sorted(wanted), "error", "error_detail"]))

    def add(self, name: str, table: pa.Table) -> None:
        """Values that were made just now; they take the place of older ones."""
        if name in self._read:
            number = len(self._tables[name])
            self._tables[name].append(table.select(["row_id", *sorted(self._read[name]), "error", "error_detail"]))
            self._at[name] |= {row_id: (number, i) for i, row_id in enumerate(table["row_id"].to_pylist())}

    def columns(
        self, annotator: Annotator, row_ids: Sequence[str], items: Sequence[Item]
    ) -> tuple[pa.Table, list[Problem | None]]:
        """What an annotator reads of these rows, and for each row the problem that kept an annotator before it."""
        out: dict[str, pa.Array | pa.ChunkedArray] = {}
        problems: list[Problem | None] = [None] * len(row_ids)
        for read in annotator.reads:
            name, _, column = read.partition(".")
            if name == "rows":
                out[read] = pa.array([getattr(item, column) for item in items], pa.string())
                continue
            table = self._take(annotator, name, row_ids)
            out[read] = table[column]
            for i, (reason, detail) in enumerate(
                zip(table["error"].to_pylist(), table["error_detail"].to_pylist(), strict=True)
            ):
                if reason is not None and problems[i] is None:
                    problems[i] = Problem(reason, detail)
        # a table without columns has no rows: then there is nothing to read, and a batch does not look
        return pa.table(out if out else {"": pa.nulls(len(row_ids))}), problems

    def _take(self, annotator: Annotator, name: str, row_ids: Sequence[str]) -> pa.Table:
        tables, places = self._tables[name], self._at[name]
        starts = [0]
        for table in tables:
            starts.append(starts[-1] + table.num_rows)
        try:
            at = [starts[number] + i for number, i in (places[row_id] for row_id in row_ids)]
        except KeyError:
            raise X2IError(
                f"annotator {annotator.name} reads {name}, which has no values for some rows of this unit. "
                "If another build writes to this lake, wait for it; then run the same command again."
            ) from None
        if not tables:
            raise X2IError(f"annotator {annotator.name} reads {name}, which has no file for this unit: build again")
        return pa.concat_tables(tables).take(pa.array(at, pa.int64()))
