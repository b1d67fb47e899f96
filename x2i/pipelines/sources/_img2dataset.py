"""Datasets of addresses after img2dataset has fetched them: its tars, or its Parquet files with images inside.

00000.tar      KEY.jpg, KEY.txt (the caption column), KEY.json (caption, url, key, status, width, sha256 …,
               and the columns named by --save_additional_columns)
00000.parquet  beside a tar: the same without images, a row for what could not be fetched as well;
               alone (--output_format parquet): the same with the images in a column `jpg`
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Collection, Iterator
from typing import Any

from pydantic import Field

from x2i.base.errors import RecipeError
from x2i.pipelines.sources import webdataset
from x2i.pipelines.sources._filed import FiledSource
from x2i.pipelines.sources._published import Tables
from x2i.pipelines.sources._text import Malformed
from x2i.pipelines.sources.base import Problem, Row, SourceConfig, Unit
from x2i.pipelines.sources.parquet import ParquetConfig

log = logging.getLogger(__name__)


class Img2DatasetConfig(SourceConfig):
    """What such sources share."""

    path: str | list[str] = Field(
        description="img2dataset's output: its folder, a pattern (grit/{00000..00099}.tar), or a list of these"
    )
    image_column: str = Field(
        "jpg", description="of --output_format parquet, the column of images: img2dataset's --encode_format, e.g. webp"
    )
    unit_rows: int = Field(1000, ge=1, description="of --output_format parquet, rows in a unit; a tar is one unit")


class Img2Dataset(FiledSource):
    """Rows as `webdataset` or `parquet` has them, completed by `describe`. Where there is a tar, tars are read."""

    config: Img2DatasetConfig
    endings = (*webdataset.ENDINGS, ".parquet")
    files = "shards of img2dataset (.tar or .parquet)"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._tars = webdataset.WebDataset(webdataset.WebDatasetConfig(path=config.path, name=self.name))
        parquet = ParquetConfig(
            path=config.path, name=self.name, image_column=config.image_column, unit_rows=config.unit_rows
        )
        self._tables = Tables(parquet)

    @abc.abstractmethod
    def describe(self, row: Row) -> Problem | None:
        """Set the row's text, complete its `meta`; the problem, if there is one. Raises Malformed."""

    def plan(self) -> Iterator[Unit]:
        """See `Source.plan`; units are those of the sources `webdataset` and `parquet`."""
        found = self._find()
        tars = {webdataset.stem(f.path) for f in found.files if f.path.lower().endswith(webdataset.ENDINGS)}
        tables = [f.path for f in found.files if f.path.lower().endswith(".parquet")]
        alone = [path for path in tables if tars and path[: -len(".parquet")] not in tars]
        if alone:
            log.warning(
                "%s: %d Parquet files have no tar beside them (%s …), so that their images are not here: copy those tars, "
                "or fetch them again",
                self.name,
                len(alone),
                alone[0],
            )
        inner = self._tars if tars else self._tables
        try:
            yield from inner.plan()
        except RecipeError as error:
            raise RecipeError(f"{error}. Addresses without images are fetched with img2dataset first") from None
        self._ignored = inner._ignored

    def read(self, unit: Unit, only: Collection[int] | None = None) -> Iterator[Row]:
        """See `Source.read`."""
        inner = self._tars if "tar" in unit.spec else self._tables
        for row in inner.read(unit, only):
            if row.meta.get("status", webdataset.SUCCESS) != webdataset.SUCCESS and row.data is None:
                row.problem = Problem("not_downloaded", str(row.meta.get("error_message") or row.meta["status"]))
            try:
                problem = self.describe(row)
            except Malformed as error:
                problem = error.problem
            row.problem = row.problem or problem
            yield row
