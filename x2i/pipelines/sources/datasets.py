"""Whatever `datasets.load_dataset` opens: hub ids, local files of many formats, streamed or not.

A dataset that is not streamed is downloaded and prepared by that library, in its own cache, before
the first unit is known. A streamed one is cut into the shards that it has.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from x2i.base.errors import RecipeError
from x2i.base.seeds import digest
from x2i.pipelines.sources._cells import Columns, Record, records
from x2i.pipelines.sources._files import Root, default_name
from x2i.pipelines.sources.base import Problem, Row, Source, SourceConfig, Unit

#: Indices within the unit, and their records, or the problem that they share.
_Records = tuple[list[int], list[Record | Problem] | Problem]

#: Rows taken out of a dataset at a time.
BATCH = 32


class DatasetsConfig(SourceConfig):
    """Arguments of `datasets.load_dataset`, and which columns are what."""

    kind: Literal["datasets"] = "datasets"
    path: str = Field(
        description="a hub id (osunlp/MagicBrush), a local folder, or a format: parquet, json, imagefolder …"
    )
    subset: str | None = Field(None, description="the dataset's configuration, what load_dataset calls `name`")
    split: str = Field("train", description="one split, e.g. train or train[:10%]; slices only without streaming")
    data_files: str | list[str] | dict[str, str | list[str]] | None = Field(
        None, description="files for a format, or within a hub repository, e.g. data/train-*.parquet"
    )
    data_dir: str | None = Field(None, description="folder for a format (imagefolder), or within a hub repository")
    revision: str | None = Field(
        None, description="commit, tag or branch of a hub repository; a commit stays what it is"
    )
    streaming: bool = Field(False, description="read without downloading first: a unit is then a shard of the dataset")
    image_column: str | None = Field(None, description="the column of images; default: the first that looks like it")
    text_column: str | None = Field(
        None, description="the column of texts; default: the first of caption, text, prompt"
    )
    root: str | None = Field(None, description="where relative paths in a column of plain strings start; default: here")
    unit_rows: int = Field(1000, ge=1, description="rows in a unit of a dataset that is not streamed")


class Datasets(Source):
    """Rows of one split in its own order. Images stay encoded as they are."""

    kind = "datasets"
    Config = DatasetsConfig
    config: DatasetsConfig

    def __init__(self, config: DatasetsConfig) -> None:
        super().__init__(config)
        self.name = config.name or default_name(self._title(config), self.kind)

    @staticmethod
    def _title(config: DatasetsConfig) -> str | list[str]:
        files = config.data_files
        return config.data_dir or (files if isinstance(files, str | list) else None) or config.path

    def _arguments(self) -> dict[str, Any]:
        c = self.config
        return {
            "path": c.path, "name": c.subset, "data_files": c.data_files, "data_dir": c.data_dir, "revision": c.revision,
        }  # fmt: skip

    @cached_property
    def _dataset(self) -> Any:
        """The split (a Dataset or an IterableDataset), its images undecoded. Raises RecipeError: it does not open."""
        import datasets

        with self._explained():
            dataset = datasets.load_dataset(
                **self._arguments(), split=self.config.split, streaming=self.config.streaming
            )
            if dataset.features is None:
                dataset = dataset._resolve_features()
        for name, feature in dataset.features.items():
            if isinstance(feature, datasets.Image):
                dataset = dataset.cast_column(name, datasets.Image(decode=False))
        return dataset

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # builders raise whatever they like: the message says its kind
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            where = ", ".join(f"{k}={v!r}" for k, v in self._arguments().items() if v is not None)
            raise RecipeError(f"load_dataset({where}): {type(error).__name__}: {error}{cause}") from error

    @cached_property
    def _columns(self) -> Columns:
        schema = self._dataset.features.arrow_schema
        return Columns.of(schema, self.config.image_column, self.config.text_column, self.config.path)

    def plan(self) -> Iterator[Unit]:
        """See `Source.plan`. A unit is rows [`start`, `end`), or shard `shard` of `shards`; `version` is the data's.

        A change in one of the dataset's files is a change of all its units.
        """
        dataset, _, version = self._dataset, self._columns, self._version()
        if self.config.streaming:
            shards = dataset.num_shards
            for shard in range(shards):
                yield Unit(self.name, {"shard": shard, "shards": shards, "version": version})
            return
        rows = len(dataset)
        if not rows:
            raise RecipeError(f"{self.config.path}: split {self.config.split!r} has no rows")
        for start in range(0, rows, self.config.unit_rows):
            end = min(start + self.config.unit_rows, rows)
            yield Unit(self.name, {"start": start, "end": end, "version": version}, rows=end - start)

    def _version(self) -> str:
        """Digest of what changes with the data: sizes and times of local files, the commit or ETag of others."""
        import datasets

        with self._explained():
            builder = datasets.load_dataset_builder(**self._arguments())
        files: list[Any] = [builder.hash, str(builder.config.version)]
        for split, listed in sorted((builder.config.data_files or {}).items()):
            for path, origin in zip(listed, listed.origin_metadata, strict=True):
                if os.path.isfile(path):
                    status = os.stat(path)
                    files.append([str(split), os.path.basename(path), status.st_size, status.st_mtime_ns])
                else:
                    files.append([str(split), path, list(origin)])
        return digest(files)[:32]

    def read(self, unit: Unit, only: Collection[int] | None = None) -> Iterator[Row]:
        """See `Source.read`."""
        reader = self._shard if self.config.streaming else self._range
        root = Root(self.config.root or ".")
        for indices, found in reader(unit, only):
            if isinstance(found, Problem):
                rows: Iterable[Row] = (Row(0, "", None, problem=found) for _ in indices)
            else:
                rows = self._columns.rows(found, root)
            for index, row in zip(indices, rows, strict=True):
                row.index, row.location = index, self._location(unit, index)
                yield row

    def _location(self, unit: Unit, index: int) -> str:
        spec = unit.spec
        if "shard" in spec:
            return f"{self.config.split}-{spec['shard']:05}-of-{spec['shards']:05}#{index}"
        return f"{self.config.split}#{spec['start'] + index}"

    def _range(self, unit: Unit, only: Collection[int] | None) -> Iterator[_Records]:
        start = unit.spec["start"]
        wanted = [i for i in range(unit.spec["end"] - start) if only is None or i in only]
        table = self._dataset.select_columns(self._columns.needed).with_format("arrow")
        for first in range(0, len(wanted), BATCH):
            indices = wanted[first : first + BATCH]
            try:
                found = table[[start + i for i in indices]]
                yield indices, records(found, list(range(found.num_rows)))
            except (pa.ArrowException, OSError, IndexError) as error:  # a cache that was cut or replaced
                yield indices, Problem("unreadable", f"{type(error).__name__}: {error}")

    def _shard(self, unit: Unit, only: Collection[int] | None) -> Iterator[_Records]:
        shard = self._dataset.shard(num_shards=unit.spec["shards"], index=unit.spec["shard"])
        batches = shard.select_columns(self._columns.needed).with_format("arrow").iter(batch_size=BATCH)
        index = 0
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:  # noqa: BLE001 - a stream may break in as many ways as there are formats and stores
                problem = Problem(
                    "unreadable", f"the stream breaks after {index} rows: {type(error).__name__}: {error}"
                )
                if only is None or index in only:
                    yield [index], problem
                return
            if batch is None:
                return
            chosen = [i for i in range(batch.num_rows) if only is None or index + i in only]
            yield [index + i for i in chosen], records(batch, chosen)
            index += batch.num_rows
