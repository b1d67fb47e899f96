"""Open a corpus: iterate, look up by key, slice by task, ask in SQL.

from x2i import corpus
c = corpus.open("runs/quickstart/corpus")
c.sql("select task_type, count(*) from samples group by all")
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from x2i.base.errors import X2IError
from x2i.base.sql import connect
from x2i.corpus.sample import Picture, Sample

if TYPE_CHECKING:
    import duckdb

#: Version of the layout on disk; a reader refuses a newer one.
FORMAT = 1

INFO, MANIFEST, SELECTION, CARD, RECIPE = (
    "corpus.json",
    "manifest.parquet",
    "selection.parquet",
    "README.md",
    "recipe.yaml",
)


class Corpus:
    """A corpus on disk, or the part of it that one task makes up. Cheap to open: nothing is read but JSON.

    Attributes:
        path: the folder or fsspec URL, as given.
        info: the content of `corpus.json`.
    """

    def __init__(self, path: str | Path, task: str | None = None) -> None:
        self.path = Path(path) if "://" not in str(path) else str(path)
        self.task_type = task
        try:
            self._fs, self._root = fsspec.core.url_to_fs(str(path))
        except (ImportError, ValueError) as error:  # a library that is not installed, a protocol that there is not
            raise X2IError(f"{path}: {error}") from None
        try:
            self.info: dict[str, Any] = json.loads(self._fs.cat_file(self._at(INFO)))
        except (FileNotFoundError, NotADirectoryError):
            raise X2IError(f"{path}: not a corpus (no {INFO}). `x2i build RECIPE` makes one.") from None
        except json.JSONDecodeError as error:
            raise X2IError(f"{self._at(INFO)}: damaged: {error}. Build the corpus again.") from None
        except Exception as error:  # noqa: BLE001 - each filesystem raises what its library does, as aiohttp's errors
            raise X2IError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None
        if self.info.get("format", 0) > FORMAT:
            raise X2IError(f"{path}: written by a newer x2i (format {self.info['format']}); this one reads {FORMAT}.")

    @property
    def digest(self) -> str:
        """The corpus's identity: equal digests mean equal shards and equal manifests."""
        return str(self.info["digest"])

    @cached_property
    def manifest(self) -> pa.Table:
        """The manifest's rows (`x2i.corpus.manifest.SCHEMA`), of this task if it is a slice."""
        with self._fs.open(self._at(MANIFEST)) as file:
            table = pq.read_table(file)
        return table if self.task_type is None else table.filter(pc.field("task_type") == self.task_type)

    def open_manifest(self, **options: Any) -> pq.ParquetFile:
        """The manifest's file, to be read in parts; `options` are `pyarrow.parquet.ParquetFile`'s. Raises X2IError."""
        try:
            file = self.path / MANIFEST if isinstance(self.path, Path) else self._fs.open(self._at(MANIFEST))
            return pq.ParquetFile(file, **options)
        except FileNotFoundError:
            raise X2IError(f"{self._at(MANIFEST)}: no such file. Build the corpus again.") from None
        except Exception as error:  # noqa: BLE001 - each filesystem raises what its library does, as aiohttp's errors
            raise X2IError(f"{self._at(MANIFEST)}: cannot be read: {error}") from None

    @cached_property
    def selection(self) -> pa.Table:
        """Every row that the sources held, with its verdict: kept, or the reason for which it fell."""
        with self._fs.open(self._at(SELECTION)) as file:
            return pq.read_table(file)

    @property
    def tasks(self) -> list[str]:
        """The task types that occur, sorted."""
        return sorted(pc.unique(self.manifest["task_type"]).to_pylist())

    def task(self, task_type: str) -> Corpus:
        """The slice of one task. Raises KeyError if the corpus has none of it."""
        if task_type not in self.tasks:
            raise KeyError(f"no task {task_type!r} in {self.path}; it has {', '.join(self.tasks)}")
        return Corpus(self.path, task_type)

    def __len__(self) -> int:
        return int(self.manifest.num_rows)

    def __iter__(self) -> Iterator[Sample]:
        """Samples in the order of the shards, each shard opened once."""
        for batch in self.manifest.to_batches():
            for row in batch.to_pylist():
                yield self.read(row)

    def __getitem__(self, key: str) -> Sample:
        return self.read(self.row(key))

    def row(self, key: str) -> dict[str, Any]:
        """The manifest's row of `key`. Raises KeyError, with the nearest key if there is one."""
        found = self.manifest.filter(pc.field("key") == key).to_pylist()
        if not found:
            near = [k for k in self.manifest["key"].to_pylist() if k.startswith(key)][:3] if key else []
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise KeyError(f"no sample {key!r} in {self.path}{hint}")
        return found[0]

    def trace(self, key: str) -> dict[str, Any]:
        """A sample's lineage, from its source to its place in a shard; `key` may be a unique beginning of one."""
        from x2i.corpus.trace import trace

        return trace(self.path, key)

    def sql(self, query: str) -> duckdb.DuckDBPyRelation:
        """Run a DuckDB query over the views `samples` (the manifest) and `selection` (all rows, with verdicts)."""
        return self._connection.sql(query)

    @cached_property
    def _connection(self) -> duckdb.DuckDBPyConnection:
        import duckdb

        connection = connect()
        where = "" if self.task_type is None else " where task_type = ?"
        for view, name in (("samples", MANIFEST), ("selection", SELECTION)):
            if isinstance(self.path, Path):
                relation = connection.read_parquet(str(self.path / name))
            else:
                relation = connection.from_arrow(self.manifest if view == "samples" else self.selection)
            if where and view == "samples":
                relation = relation.filter(
                    duckdb.ColumnExpression("task_type") == duckdb.ConstantExpression(self.task_type)
                )
            relation.create_view(view)
        return connection

    def read(self, row: dict[str, Any]) -> Sample:
        """The sample of one row of the manifest (as `row` or `sql` give it). Raises OSError if its shard is damaged."""
        blob = self._fs.cat_file(self._at(row["shard"]), row["offset"], row["offset"] + row["size"])
        data = {
            m["suffix"]: blob[m["offset"] - row["offset"] : m["offset"] - row["offset"] + m["size"]]
            for m in row["members"]
        }
        record = json.loads(data["json"])

        def picture(name: str, size: dict[str, int]) -> Picture:
            suffix = name.removeprefix(row["key"] + ".")
            return Picture(data[suffix], suffix.rpartition(".")[2], size["width"], size["height"])

        return Sample(
            key=row["key"],
            task_type=record["task_type"],
            instruction=record["instruction"],
            input_images=tuple(picture(n, s) for n, s in zip(record["input_images"], row["input_sizes"], strict=True)),
            output_image=picture(record["output_image"], row["output_size"]) if "output_image" in record else None,
            messages=tuple(record.get("messages", ())),
            provenance=record["provenance"],
            objects=record.get("objects", {}),
            mask=picture(record["mask"], row["output_size"]) if "mask" in record else None,
            rejected_response=record.get("rejected_response"),
        )

    def _at(self, name: str) -> str:
        return posixpath.join(self._root, name)

    def __repr__(self) -> str:
        part = f", task={self.task_type!r}" if self.task_type else ""
        return f"Corpus({str(self.path)!r}{part}, samples={self.info['counts']['samples']}, digest={self.digest[:12]})"
