"""Pairs that are lines of JSON and name their pictures, in folders or in (split) archives. A unit is a run of lines."""

from __future__ import annotations

import abc
import logging
import posixpath
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field

from x2i.base.errors import RecipeError
from x2i.base.seeds import digest
from x2i.pipelines.sources._files import File, Root, why
from x2i.pipelines.sources._pairs import Draft
from x2i.pipelines.sources._pairs_store import Store
from x2i.pipelines.sources._published import LINES, Records, below
from x2i.pipelines.sources._split_tar import PLACES, archives
from x2i.pipelines.sources._text import Malformed, parse_object
from x2i.pipelines.sources.base import Problem, Row, SourceConfig, Unit

log = logging.getLogger(__name__)

#: Archives of more gigabytes deserve `unpack`: every unit would unpack them anew.
LARGE = 20


class LinesConfig(SourceConfig):
    """What the configuration of pairs in JSON lines has."""

    path: str | list[str] = Field(
        description="the records: a path or fsspec URL, a pattern (annotations/split_*.jsonl), a folder, or a list of these"
    )
    images: str | None = Field(
        None, description="where the records' image paths start, if it is not the published place"
    )
    archives: list[str] = Field(
        list(PLACES),
        description="the archives among the images, split ones too: patterns below `images`, e.g. [pix2pix/images.tar.gz.*]; "
        "default: up to two folders deep; [] if all are unpacked",
    )
    unpack: str | None = Field(
        None,
        description="a folder where each archive is unpacked once, e.g. /scratch/x2i; default: every unit unpacks what it "
        "needs, which large archives make slow",
    )
    drop: str = Field(
        "", description="the beginning of the records' image paths that the images do not have, e.g. /share/data/X2I/"
    )
    unit_rows: int = Field(500, ge=1, description="records in a unit")


class PairLines(Records):
    """Records in the order of their lines; each makes one row, or several if `turns` says so.

    A unit's identity is its records' content and the archives' names, sizes and times.
    """

    turns: ClassVar[bool] = False
    place: ClassVar[str] = ""  # of the images, seen from a file of records
    Config: ClassVar[type[SourceConfig]] = LinesConfig
    config: LinesConfig
    endings = LINES
    files = "JSONL files"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._stores: dict[str, Store] = {}

    @property
    def fingerprint(self) -> str:
        """See `Source.fingerprint`. Where archives are unpacked changes no row."""
        return digest("source/1", self.kind, self.version, self.config.model_dump(mode="json", exclude={"unpack"}))

    def plan(self) -> Iterator[Unit]:
        """See `Source.plan`."""
        self._stores.clear()  # a plan looks anew
        yield from super().plan()

    @abc.abstractmethod
    def drafts(self, record: dict[str, Any], location: str) -> Iterator[Draft]:
        """The rows of one record, the first of which may have its location. Raises Malformed."""

    def _units(self, file: File) -> Iterator[Unit]:
        store = self._store(file.path)
        packed = digest("archives/1", [a.identity() for a in store.archives]) if store.archives else None
        for unit in super()._units(file):
            spec = unit.spec | ({"archives": packed} if packed else {})
            yield Unit(unit.source, spec, rows=None if self.turns else unit.rows)

    def _folder(self, path: str) -> str:
        return self.config.images or posixpath.normpath(posixpath.join(posixpath.dirname(path), self.place))

    def _store(self, path: str) -> Store:
        folder = self._folder(path)
        if folder not in self._stores:
            root = Root(folder) if self.config.images else _from(self._root, folder)
            try:
                found = archives(root, self.config.archives)
            except OSError as error:
                raise RecipeError(
                    f"{root.url}: archives: cannot be listed ({why(error)}); if there are none, set archives: []"
                ) from None
            size = sum(a.size for a in found) // 10**9
            if size > LARGE and not self.config.unpack:
                log.warning("%s: %d GB of archives, which every unit unpacks anew: set `unpack`", self.name, size)
            self._stores[folder] = Store(root, found, self.config.unpack)
        return self._stores[folder]

    def read(self, unit: Unit, only: Collection[int] | None = None) -> Iterator[Row]:
        """See `Source.read`. What is wanted of an archive is read in one go."""
        spec = unit.spec
        drafts = list(self._drafts(unit))
        wanted = [i for i in range(len(drafts)) if only is None or i in only]
        if "problem" in spec or not wanted:
            yield from (drafts[i].row(i, _nothing) for i in wanted)
            return
        try:
            store = self._store(spec["file"])
        except RecipeError as error:  # it was fine when the plan was made
            lost = Problem("unreadable", str(error))
            yield from (replace(drafts[i], problem=lost, inputs=[], mask=None).row(i, lambda _: lost) for i in wanted)
            return
        with store.reading(p for i in wanted for p in drafts[i].paths()) as get:
            for i in wanted:
                yield drafts[i].row(i, get)

    def _drafts(self, unit: Unit) -> Iterator[Draft]:
        try:
            pieces = self.pieces(unit)
        except Malformed as error:
            yield from (Draft(self.lost(unit, i), problem=error.problem) for i in range(unit.rows or 1))
            return
        for piece in pieces:
            location = f"{unit.spec['file']}#{piece.number}"
            try:
                yield from self.drafts(parse_object(piece.data), location)
            except Malformed as error:
                yield Draft(location, problem=error.problem)

    def path(self, given: str) -> str:
        """A record's path below the images."""
        return below(given.removeprefix(self.config.drop))


def _nothing(path: str) -> Problem:
    return Problem("missing_image", path)


def _from(root: Root, folder: str) -> Root:
    """The root that a folder is, which may be above (`../images`)."""
    inside = root.below("")
    while folder.startswith("../"):
        inside.path, folder = posixpath.dirname(inside.path), folder[3:]
    return inside.below("" if folder == "." else folder)
