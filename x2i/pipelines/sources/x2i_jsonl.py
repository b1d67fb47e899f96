"""X2I records as OmniGen published them: JSONL beside folders of images.

    {"task_type": ..., "instruction": "... <img><|image_1|></img> ...", "input_images": [...], "output_image": ...}

Task types are kept as they are, typos too. Conversations are read as ms-swift has them:

    {"messages": [...], "images": [...], "objects": {...}, "rejected_response": ...}

The last of their pictures is the row's; they have no text, so set `select.require_text: false`. Image files are not part
of a unit's identity (nothing is asked of 10^8 files when planning): change the record when its picture changes.
"""

from __future__ import annotations

import posixpath
from typing import Any, Literal

from pydantic import Field

from x2i.pipelines.sources import _x2i
from x2i.pipelines.sources._files import Root
from x2i.pipelines.sources._published import LINES, RecordSource, load
from x2i.pipelines.sources.base import Problem, Row, SourceConfig


class X2IJsonlConfig(SourceConfig):
    """JSONL files of X2I records, and the images that they name."""

    kind: Literal["x2i_jsonl"] = "x2i_jsonl"
    path: str | list[str] = Field(
        description="the records: a path or fsspec URL, a pattern (X2I/*.jsonl), a folder, or a list of these"
    )
    images: str | None = Field(
        None, description="where the records' image paths start, e.g. X2I/images; default: the folder of the JSONL file"
    )
    unit_rows: int = Field(500, ge=1, description="records in a unit")


class X2IJsonl(RecordSource):
    """Records in the order of their lines."""

    kind = "x2i_jsonl"
    version = 3  # conversations
    Config = X2IJsonlConfig
    config: X2IJsonlConfig
    endings = LINES
    files = "JSONL files"

    def fill(self, row: Row, record: dict[str, Any], part: int, file: str) -> Problem | None:
        """See `RecordSource.fill`."""
        said = _x2i.parsed(record)
        row.meta, row.text = said.meta, said.text
        images = Root(self.config.images) if self.config.images else self._root.below(posixpath.dirname(file))
        return load(row, images, said.inputs, said.output) or said.problem
