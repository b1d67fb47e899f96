"""X2I records as OmniGen published them: JSONL beside folders of images.

    {"task_type": ..., "instruction": "... <img><|image_1|></img> ...", "input_images": [...], "output_image": ...}

Task types are kept as they are, typos too. Image files are not part of a unit's identity (nothing is
asked of 10^8 files when planning): change the record when its picture changes.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Collection, Iterator
from itertools import islice
from typing import Literal

from pydantic import Field

from x2i.pipelines.sources import _x2i
from x2i.pipelines.sources._filed import FiledSource
from x2i.pipelines.sources._files import File, Root, why
from x2i.pipelines.sources._text import Malformed, parse_object
from x2i.pipelines.sources.base import Problem, Row, SourceConfig, Unit

ENDINGS = (".jsonl", ".jsonl.txt", ".ndjson")


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


class X2IJsonl(FiledSource):
    """Records in the order of their lines. A unit is a run of lines; its identity is their content."""

    kind = "x2i_jsonl"
    Config = X2IJsonlConfig
    config: X2IJsonlConfig
    endings = ENDINGS
    files = "JSONL files"

    def plan(self) -> Iterator[Unit]:
        """See `Source.plan`.

        A unit's `file` is a path, its bytes are [`start`, `end`), `line` is the number of its first
        line (from 1), `sha256` the digest of its bytes: so a file that has grown has its last unit
        read again, and the new ones.
        """
        found = self._find()
        for file in found.files:
            try:
                yield from self._units(file)
            except OSError as error:
                yield Unit(self.name, {"file": file.path, "size": file.size, "problem": why(error)}, rows=1)

    def _units(self, file: File) -> Iterator[Unit]:
        start, line = 0, 1
        with self._root.open(file.path) as lines:
            while chunk := list(islice(lines, self.config.unit_rows)):
                data = b"".join(chunk)
                rows = sum(1 for record in chunk if record.strip())
                spec = {"file": file.path, "start": start, "end": start + len(data), "line": line}
                if rows:
                    yield Unit(self.name, spec | {"sha256": hashlib.sha256(data).hexdigest()}, rows=rows)
                start, line = start + len(data), line + len(chunk)

    def read(self, unit: Unit, only: Collection[int] | None = None) -> Iterator[Row]:
        """See `Source.read`."""
        spec = unit.spec
        if "problem" in spec:
            if only is None or 0 in only:
                yield Row(0, spec["file"], None, problem=Problem("unreadable", spec["problem"]))
            return
        try:
            data = self._root.read_range(spec["file"], spec["start"], spec["end"])
            failure = None if len(data) == spec["end"] - spec["start"] else "the file has become shorter"
        except OSError as error:
            failure = why(error)
        if failure:
            for index in range(unit.rows or 1):
                if only is None or index in only:
                    location = f"{spec['file']}#{spec['line']}+{index}"
                    yield Row(index, location, None, problem=Problem("unreadable", failure))
            return
        images = Root(self.config.images) if self.config.images else self._root.below(posixpath.dirname(spec["file"]))
        numbered = [(spec["line"] + i, line) for i, line in enumerate(data.split(b"\n")) if line.strip()]
        for index, (number, line) in enumerate(numbered):
            if only is None or index in only:
                row = Row(index, f"{spec['file']}#{number}", None)
                row.problem = _fill(row, line, images)
                yield row


def _fill(row: Row, line: bytes, images: Root) -> Problem | None:
    """Read a record and its images into the row; the problem, if there is one."""
    try:
        record = parse_object(line)
    except Malformed as error:
        return error.problem
    row.meta = {k: v for k, v in record.items() if k not in ("input_images", "output_image")}
    instruction = record.get("instruction")
    row.text = (instruction.strip() or None) if isinstance(instruction, str) else None
    inputs, output = record.get("input_images") or [], record.get("output_image")
    if not isinstance(inputs, list) or not all(isinstance(p, str) and p for p in inputs):
        return Problem("bad_metadata", "'input_images' is not a list of paths")
    problem = _x2i.check(record.get("task_type"), instruction, len(inputs))
    if output is not None and not isinstance(output, str):
        return problem or Problem("bad_metadata", "'output_image' is not a path")
    return _load(row, images, inputs, output) or problem


def _load(row: Row, images: Root, inputs: list[str], output: str | None) -> Problem | None:
    problems: list[Problem] = []
    paths = [*inputs, *([output] if output else [])]
    for number, (path, data) in enumerate(
        zip(paths, images.read_many(posixpath.normpath(p) if "://" not in p else p for p in paths), strict=True)
    ):
        if isinstance(data, OSError):
            reason = "missing_image" if isinstance(data, FileNotFoundError) else "unreadable"
            problems.append(Problem(reason, f"{path}: {why(data)}"))
        elif not data:
            problems.append(Problem("empty_file", f"{path} has no bytes"))
        elif number < len(inputs):
            row.inputs.append((path, data))
        else:
            row.data = data
    if not output:
        problems.append(Problem("no_output_image", "a record with no output image (an understanding task)"))
    return problems[0] if problems else None
