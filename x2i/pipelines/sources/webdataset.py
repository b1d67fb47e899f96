"""WebDataset tars: plain ones, img2dataset's with a Parquet file beside each, and X2I corpora.

Members that follow each other and share a key (the name up to the first dot of its last part) are one
sample, as the webdataset library has it. Which of its members is the row's image:
- `KEY.output.png` where there is a `KEY.json` and no plain image: an X2I sample. Its `KEY.input_N.*` are
  the row's inputs, its instruction the text;
- else the first with a plain extension (`KEY.jpg`); further images are named in `meta.other_images`;
- else every `KEY.part.jpg` is a row of its own (keys with dots in them, such as `v1.5_003.jpg`).
Text comes from `KEY.txt` (or `KEY.part.txt`), else from `KEY.json` under `text_key`. The JSON object goes to `meta`.

A key that comes again is a row again; its location then ends in `@2`. A sample that has a text but
no image is a row with the problem `missing_image`; one that has neither (`.cls`, `.mp4` …) is no row.
Where a tar is cut or damaged, what comes before is used, and one row says what happened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import Literal

from pydantic import Field

from x2i.pipelines.sources._filed import FiledSource
from x2i.pipelines.sources._groups import Rows
from x2i.pipelines.sources._text import jsonable
from x2i.pipelines.sources.base import Problem, Row, SourceConfig, Unit

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

#: What img2dataset writes into the column `status` of an image that is in the tar.
SUCCESS = "success"


class WebDatasetConfig(SourceConfig):
    """Tars in the layout of WebDataset."""

    kind: Literal["webdataset"] = "webdataset"
    path: str | list[str] = Field(
        description="tars: a path or fsspec URL, a pattern (laion/{00000..00099}.tar, s3://b/cc12m/*.tar), a folder, "
        "or a list of these"
    )
    text_key: str | None = Field(
        None, description="key of KEY.json that holds the text, e.g. alt; default: the first of caption, text, prompt"
    )


class WebDataset(FiledSource):
    """One tar is one unit. A remote one is copied to the temporary folder while it is read."""

    kind = "webdataset"
    Config = WebDatasetConfig
    config: WebDatasetConfig
    endings = ENDINGS
    files = "tars"

    def plan(self) -> Iterator[Unit]:
        """See `Source.plan`. A unit's `tar`, and `table` beside it, are [path, size, version]."""
        found = self._find()
        tables = found.root.stat_many([stem(f.path) + ".parquet" for f in found.files])
        self._ignored -= Counter(parquet=sum(t in found.others for t in tables))
        for file, table in zip(found.files, tables, strict=True):
            yield Unit(self.name, {"tar": list(file)} | ({"table": list(table)} if table else {}), size=file.size or 0)

    def read(self, unit: Unit, only: Collection[int] | None = None) -> Iterator[Row]:
        """See `Source.read`. First what the tar holds, then what is wrong with it, then what should be in it."""
        path = unit.spec["tar"][0]
        rows = Rows(path, self.config.text_key, only)
        yield from (row for _, row in rows.read(self._root))
        if "table" in unit.spec:
            yield from self._missing(unit.spec["table"][0], rows)

    def _missing(self, table: str, rows: Rows) -> Iterator[Row]:
        """Rows for what img2dataset's table lists and the tar does not hold."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with self._root.open(table) as file:
                listed = pq.read_table(file)
        except (pa.ArrowException, OSError) as error:
            yield from rows.lost(table, Problem("bad_parquet", str(error)), {})
            return
        if not {"key", "status"} <= set(listed.column_names):
            return  # a table of something else
        for record in listed.to_pylist():
            key = str(record["key"])
            problem = Problem("missing_from_tar", "the table says that this image is in the tar")
            if record["status"] != SUCCESS:
                problem = Problem("not_downloaded", str(record.get("error_message") or record["status"]))
            elif key in rows.keys:
                continue
            yield from rows.lost(f"{rows.path}#{key}", problem, jsonable(record))


def stem(path: str) -> str:
    """A tar's path without its ending."""
    return next((path[: -len(e)] for e in ENDINGS if path.lower().endswith(e)), path)
