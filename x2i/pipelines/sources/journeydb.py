"""JourneyDB (`JourneyDB/JourneyDB`): pictures made by Midjourney, with their prompts and captions.

    data/train/imgs/000.tgz                               members 000/UUID.jpg
    data/train/train_anno_realease_repath.jsonl.tgz       (sic) a line each: img_path (./000/UUID.jpg), prompt,
                                                          Task1 {Style, Content …}, Task2 {Caption}, Task3 {…}

A unit is one archive of pictures; its annotations are picked out of the one file of all when it is read. That
file is read faster if it is unpacked once (train_anno_realease_repath.jsonl beside the .tgz).
"""

from __future__ import annotations

import posixpath
import re
import tarfile
from collections.abc import Collection, Iterator
from functools import cached_property
from typing import IO, Any, Literal

from pydantic import Field

from x2i.base.errors import RecipeError
from x2i.pipelines.sources._filed import FiledSource
from x2i.pipelines.sources._files import Root, why
from x2i.pipelines.sources._groups import Rows
from x2i.pipelines.sources._tar import BROKEN
from x2i.pipelines.sources._text import Malformed, parse_object, pick
from x2i.pipelines.sources.base import Problem, Row, SourceConfig, Unit

ENDINGS = (".tgz", ".tar.gz", ".tar")


class JourneyDBConfig(SourceConfig):
    """A split's folder."""

    kind: Literal["journeydb"] = "journeydb"
    path: str = Field(description="the split's folder, which holds imgs and the annotations: JourneyDB/data/train")
    annotations: str | None = Field(
        None,
        description="the annotations' file in that folder (.jsonl, or .jsonl.tgz); default: the one named *anno*repath*",
    )
    text: Literal["caption", "prompt"] = Field(
        "caption",
        description="the row's text: the model's caption (Task2), or the prompt that the picture was made from",
    )


class JourneyDB(FiledSource):
    """One row per picture, then one for each annotation whose picture is not in its archive."""

    kind = "journeydb"
    Config = JourneyDBConfig
    config: JourneyDBConfig
    endings = ENDINGS
    files = "archives of pictures"

    @property
    def listing(self) -> str | list[str]:
        """See `FiledSource.listing`."""
        return f"{self.config.path.rstrip('/')}/imgs/*"

    @cached_property
    def _folder(self) -> Root:
        return Root(self.config.path)

    def plan(self) -> Iterator[Unit]:
        """See `Source.plan`. A unit's `tar` and `annotations` are [path, size, version]."""
        files = self._find().files
        annotations = list(self._annotations())
        for file in files:
            yield Unit(self.name, {"tar": list(file), "annotations": annotations}, size=file.size or 0)

    def _annotations(self) -> tuple[Any, ...]:
        """The annotations' file. Raises RecipeError: there is none."""
        folder = self._folder
        try:
            if self.config.annotations:
                return folder.stat(self.config.annotations)
            named = [f for f in folder.glob("*anno*") if re.search(r"repath.*\.jsonl(\.tgz|\.tar\.gz)?$", f.path)]
            unpacked = [f for f in named if f.path.endswith(".jsonl")]
            return (unpacked or named)[0]
        except (OSError, IndexError):
            wanted = self.config.annotations or "*anno*repath*.jsonl.tgz"
            raise RecipeError(
                f"{self.config.path}: no annotations {wanted} here; name their file by `annotations`"
            ) from None

    def read(self, unit: Unit, only: Collection[int] | None = None) -> Iterator[Row]:
        """See `Source.read`."""
        path = unit.spec["tar"][0]
        rows = Rows(path, None, only)
        known = _Annotated(self._folder, unit.spec["annotations"][0], posixpath.basename(path).partition(".")[0])
        for stem, row in rows.read(self._root):
            if stem is not None:
                self._describe(row, known, stem)
            yield row
        for absent in sorted(known.records.keys() - rows.keys):
            record = known.records[absent]
            missing = Problem("missing_image", "annotated, but not in the archive")
            yield from rows.lost(f"{path}#{record['img_path']}", missing, record)
        for number, problem in known.faults:
            yield from rows.lost(f"{path}#(annotation {number})", problem, {})

    def _describe(self, row: Row, known: _Annotated, stem: str) -> None:
        record = known.records.get(stem)
        if record is None:
            row.problem = row.problem or known.failure
            return
        row.meta |= record
        task = record.get("Task2")
        caption = task.get("Caption") if isinstance(task, dict) else None
        try:
            row.text = pick({"caption": caption, "prompt": record.get("prompt")}, self.config.text)
        except Malformed as error:
            row.problem = row.problem or error.problem


class _Annotated:
    """The annotations of one archive's pictures, out of the file of all.

    Attributes:
        records: by the picture's stem.
        faults: lines that speak of this archive but are no records: their number, and the problem.
        failure: what kept the file from being read to its end.
    """

    def __init__(self, folder: Root, path: str, archive: str) -> None:
        self.records: dict[str, dict[str, Any]] = {}
        self.faults: list[tuple[int, Problem]] = []
        self.failure: Problem | None = None
        begins = re.compile(rb'"img_path"\s*:\s*"(?:\./)?' + re.escape(archive).encode() + b"/")
        try:
            with folder.open(path) as file:
                for number, line in enumerate(_lines(file, path), 1):
                    if begins.search(line):
                        self._add(number, line)
        except BROKEN as error:
            detail = why(error) if isinstance(error, OSError) else str(error)
            self.failure = Problem("unreadable", f"the annotations cannot be read to their end: {detail}")

    def _add(self, number: int, line: bytes) -> None:
        try:
            record = parse_object(line)
        except Malformed as error:
            self.faults.append((number, error.problem))
            return
        self.records[posixpath.splitext(posixpath.basename(record["img_path"]))[0]] = record


def _lines(file: IO[bytes], path: str) -> Iterator[bytes]:
    """The lines of a JSONL file, or of those in a tar, unpacked as they are read. Raises what BROKEN names."""
    if path.endswith(".jsonl"):
        yield from file
        return
    with tarfile.open(fileobj=file, mode="r|*") as tar:
        for info in tar:
            inner = (
                tar.extractfile(info) if info.isreg() and not posixpath.basename(info.name).startswith(".") else None
            )
            yield from inner or ()
