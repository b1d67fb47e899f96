"""Pairs that a list file names: `seeds.json`, `train_pairs.txt`, … above folders of pictures. A unit is a run of entries."""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cached_property
from typing import Any, ClassVar

from pydantic import Field

from x2i.base.errors import RecipeError
from x2i.base.seeds import digest
from x2i.pipelines.sources._cells import checked
from x2i.pipelines.sources._files import File, Root, default_name, why
from x2i.pipelines.sources._pairs import Draft, PairTable, TableConfig
from x2i.pipelines.sources._text import Malformed
from x2i.pipelines.sources.base import Problem, Row, Source, SourceConfig, Unit

#: Rows whose pictures are read together: several at a time, where they come over a network.
BATCH = 16

#: Parses a list file's name and content to its entries (JSON types). Raises Malformed.
Parse = Callable[[str, bytes], list[Any]]

#: Makes a row of a root, the list's name, the entry's number and the entry.
Make = Callable[[Root, str, int, Any], Draft]


class Lists:
    """The entries of list files below a root, as units and rows. A unit's identity is its entries' content."""

    def __init__(self, source: str, root: Root, unit_rows: int, parse: Parse, make: Make) -> None:
        self.root = root
        self._source, self._unit_rows, self._parse, self._make = source, unit_rows, parse, make
        self._entries: dict[str, list[Any]] = {}

    def there(self, names: Iterable[str]) -> list[File]:
        """Those of the list files that there are."""
        return [f for f in self.root.stat_many(list(names)) if f]

    def plan(self, names: Iterable[str]) -> Iterator[Unit]:
        """The units of these lists. Their `first` is an entry's number, from 0."""
        for name in names:
            self._entries.pop(name, None)  # a plan looks anew
            try:
                entries = self._of(name)
            except Malformed as error:
                yield Unit(
                    self._source, {"list": name, "problem": [error.problem.reason, error.problem.detail]}, rows=1
                )
                continue
            for first in range(0, len(entries), self._unit_rows):
                part = entries[first : first + self._unit_rows]
                yield Unit(self._source, {"list": name, "first": first, "entries": digest(part)}, rows=len(part))

    def read(self, unit: Unit, only: Collection[int] | None) -> Iterator[Row]:
        """The unit's rows. If the list has changed since the plan, each is a problem."""
        name, rows = unit.spec["list"], unit.rows or 1
        wanted = [i for i in range(rows) if only is None or i in only]
        problem = Problem(*unit.spec["problem"]) if "problem" in unit.spec else None
        entries: list[Any] = []
        if problem is None:
            first = unit.spec["first"]
            try:
                entries = self._of(name)[first : first + rows]
                changed = digest(entries) != unit.spec["entries"]
                problem = Problem("unreadable", f"{name} has changed since the plan") if changed else None
            except Malformed as error:
                problem = error.problem
        if problem is not None:
            yield from (Row(i, f"{name}#+{i}" if i else name, None, problem=problem) for i in wanted)
            return
        for start in range(0, len(wanted), BATCH):
            some = wanted[start : start + BATCH]
            drafts = [self._make(self.root, name, first + i, entries[i]) for i in some]
            paths = list(dict.fromkeys(p for d in drafts for p in d.paths()))
            found = dict(zip(paths, map(checked, self.root.read_many(paths)), strict=True))
            yield from (d.row(i, found.__getitem__) for d, i in zip(drafts, some, strict=True))

    def _of(self, name: str) -> list[Any]:
        if name not in self._entries:
            try:
                data = self.root.read(name)
            except OSError as error:
                raise Malformed("unreadable", f"{name}: {why(error)}") from None
            self._entries[name] = self._parse(name, data)
        return self._entries[name]


class ListConfig(SourceConfig):
    """What the configuration of pairs in a folder with lists has."""

    path: str = Field(description="the dataset's folder, or an fsspec URL of it; zip://::FILE.zip reads a packed one")
    unit_rows: int = Field(500, ge=1, description="entries in a unit")


class PairLists(Source):
    """A folder with one or more list files, `lists`, whose entries name the pictures below it."""

    config: ListConfig
    lists: ClassVar[tuple[str, ...]]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.name = config.name or default_name(config.path, self.kind)

    @abc.abstractmethod
    def entries(self, name: str, data: bytes) -> list[Any]:
        """A list file's entries (JSON types). Raises Malformed."""

    @abc.abstractmethod
    def draft(self, root: Root, name: str, number: int, entry: Any) -> Draft:
        """The row of an entry."""

    @cached_property
    def _lists(self) -> Lists:
        return Lists(self.name, Root(self.config.path), self.config.unit_rows, self.entries, self.draft)

    def plan(self) -> Iterator[Unit]:
        """See `Source.plan`."""
        found = [f.path for f in self._lists.there(self.lists)]
        if not found:
            raise RecipeError(f"{self.config.path}: not the layout of {self.kind}: no {' or '.join(self.lists)} here")
        yield from self._lists.plan(found)

    def read(self, unit: Unit, only: Collection[int] | None = None) -> Iterator[Row]:
        """See `Source.read`."""
        return self._lists.read(unit, only)


class PairTableOrList(PairTable):
    """Pairs that are published twice over: as Parquet files, and as a folder with the list file `list_file`."""

    Config: ClassVar[type[SourceConfig]] = TableConfig
    list_file: ClassVar[str]

    @abc.abstractmethod
    def entries(self, name: str, data: bytes) -> list[Any]:
        """See `PairLists.entries`."""

    @abc.abstractmethod
    def draft(self, root: Root, name: str, number: int, entry: Any) -> Draft:
        """See `PairLists.draft`."""

    @cached_property
    def _lists(self) -> Lists | None:
        """The lists of the folder that the path is, or of the list file's; none if the path is a list of paths."""
        path = self.config.path
        if not isinstance(path, str):
            return None
        folder = path[: -len(self.list_file)].rstrip("/") or "." if path.endswith(self.list_file) else path
        return Lists(self.name, Root(folder), self.config.unit_rows, self.entries, self.draft)

    def plan(self) -> Iterator[Unit]:
        """See `Source.plan`."""
        listed = self._lists is not None and self._lists.there([self.list_file])
        return self._lists.plan([self.list_file]) if self._lists and listed else super().plan()

    def read(self, unit: Unit, only: Collection[int] | None = None) -> Iterator[Row]:
        """See `Source.read`."""
        return self._lists.read(unit, only) if self._lists and "list" in unit.spec else super().read(unit, only)
