"""What a source is: it cuts what it finds into units, and yields the rows of a unit.

A *unit* is a bounded, deterministic run of rows: its id is a digest of what it reads (names, sizes,
modification times), so that unchanged input is never annotated twice and changed input always is.
A *row* is one image with its text. A row that cannot be had (a file that is missing, a broken tar)
is a row all the same: it carries a `Problem`, and ends in quarantine with that reason.
"""

from __future__ import annotations

import abc
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import Field

from x2i.base.config import Config
from x2i.base.seeds import digest

#: What counts as an image by its name. Content is checked later, from its header.
IMAGE_EXTENSIONS = frozenset(
    [
        "jpg",
        "jpeg",
        "jpe",
        "jfif",
        "png",
        "webp",
        "gif",
        "bmp",
        "dib",
        "tif",
        "tiff",
        "avif",
        "heic",
        "heif",
        "jp2",
        "j2k",
        "ppm",
        "pgm",
        "pbm",
        "pnm",
        "tga",
        "ico",
    ]
)


@dataclass(frozen=True)
class Problem:
    """Why a row cannot be used. `reason` is a short snake_case word, `detail` a sentence for a person."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Unit:
    """A run of rows. `spec` is what `Source.read` needs to read it again: JSON types only."""

    source: str
    spec: dict[str, Any]
    rows: int | None = None  # if known without reading
    id: str = ""
    size: int = field(default=0, compare=False)  # bytes, if known without reading: long units are begun first

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", self.id or digest("unit/1", self.source, self.spec)[:24])


@dataclass
class Row:
    """One image and what its source says of it.

    `index` counts from 0 within the unit, with no gaps, whatever the row's condition.
    `location` names the row within its source for a person and for ever: a path relative to the source's
    root, `shard.tar#member`, `part.parquet#12`; it is unique in the source and free of absolute paths.
    `meta` is everything else that the source says (JSON types). `inputs` are further images of a row
    that is already an X2I sample: (location, bytes) in the order of the placeholders. `mask` is the file of a picture
    that is white where an edit changed something, where the source has one.
    """

    index: int
    location: str
    data: bytes | None
    text: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    inputs: list[tuple[str, bytes]] = field(default_factory=list)
    mask: bytes | None = None
    problem: Problem | None = None


class SourceConfig(Config):
    """What every source's configuration has."""

    kind: str
    name: str = Field("", description="the source's name in columns and reports; default: from its path")


class Source(abc.ABC):
    """One kind of source. A subclass lives in a file of its own in this folder and is found by `kind`.

    `version` goes up whenever the same input would yield other rows: units are then read again.
    Sources are built from their configuration alone, on the driver and in workers: keep them light,
    import heavy libraries inside methods.
    """

    kind: ClassVar[str]
    version: ClassVar[int] = 1
    Config: ClassVar[type[SourceConfig]]

    def __init__(self, config: Any) -> None:
        self.config = config
        self.name: str = config.name

    @property
    def fingerprint(self) -> str:
        """Digest of kind, version and configuration: where this source's rows lie in the lake."""
        return digest("source/1", self.kind, self.version, self.config.model_dump(mode="json"))

    @abc.abstractmethod
    def plan(self) -> Iterator[Unit]:
        """List the units, in a fixed order, without reading image bytes.

        Raises:
            RecipeError: the source is not there or holds nothing; says which path, and what was expected.
        """

    @abc.abstractmethod
    def read(self, unit: Unit, only: Collection[int] | None = None) -> Iterator[Row]:
        """Yield the unit's rows in order; with `only`, just the rows of these indices.

        Never raises for bad data: a row that cannot be had is yielded with its `problem`.
        """

    def ignored(self) -> dict[str, int]:
        """Files that are there but are no rows, counted by extension (after `plan`)."""
        return {}


MissingText = Literal["quarantine", "keep"]
