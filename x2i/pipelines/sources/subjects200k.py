"""Subjects200K (`Yuanshi/Subjects200K`, of OminiControl): two pictures of one subject in one composite.

Parquet: image (1056 x 528: tiles of 512, a border of 8 around each), collection, quality_assessment
{compositeStructure, objectConsistency, imageQuality}, description {item, description_0, description_1, category,
description_valid}. Its third collection, a repository of its own, has tiles of 1024, and a column raw_json.

A tile must be encoded anew: losslessly, as PNG, which `meta.reencoded` says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

from pydantic import Field

from x2i.corpus.sample import placeholder
from x2i.pipelines.images import BadImage, decode, encode, read_header
from x2i.pipelines.sources._filed import FiledSource
from x2i.pipelines.sources._published import Tables
from x2i.pipelines.sources._text import pick
from x2i.pipelines.sources.base import Problem, Row, SourceConfig, Unit
from x2i.pipelines.sources.parquet import ParquetConfig

TASK = "subject_driven"
SIDES = ("left", "right")
SCORES = ("compositeStructure", "objectConsistency", "imageQuality")

#: What sides of tiles are multiples of; what is over in half a composite is its border.
TILE = 512


class Subjects200KConfig(SourceConfig):
    """The dataset's Parquet files."""

    kind: Literal["subjects200k"] = "subjects200k"
    path: str | list[str] = Field(description="the files: Subjects200K/data, data/train-*.parquet, or a list of these")
    outputs: Literal["both", "left", "right"] = Field(
        "both", description="which tile is a row's output, the other being its input; both: two rows per composite"
    )
    min_quality: int = Field(
        5, ge=0, le=5, description="the least that each of the three scores may be; 0: rows without scores, too"
    )
    collections: list[str] = Field([], description="collections to keep, e.g. [collection_2]; default: all")
    unit_rows: int = Field(500, ge=1, description="composites in a unit, about")


class Subjects200K(FiledSource):
    """Rows of subject-driven pairs. Units are those of `parquet`; row 2i is composite i with the left tile as output."""

    kind = "subjects200k"
    Config = Subjects200KConfig
    config: Subjects200KConfig
    endings = (".parquet",)
    files = "Parquet files"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._sides = SIDES if config.outputs == "both" else (config.outputs,)

    @cached_property
    def _tables(self) -> Tables:
        config = self.config
        return Tables(ParquetConfig(path=config.path, name=self.name, image_column="image", unit_rows=config.unit_rows))

    def plan(self) -> Iterator[Unit]:
        """See `Source.plan`."""
        for unit in self._tables.plan():
            rows = unit.rows if unit.rows is None or "problem" in unit.spec else unit.rows * len(self._sides)
            yield Unit(self.name, unit.spec, rows=rows, size=unit.size)
        self._ignored = self._tables._ignored

    def read(self, unit: Unit, only: Collection[int] | None = None) -> Iterator[Row]:
        """See `Source.read`."""
        if "problem" in unit.spec:
            yield from self._tables.read(unit, only)
            return
        many = len(self._sides)
        composites = None if only is None else {i // many for i in only}
        for row in self._tables.read(replace(unit, rows=unit.rows and unit.rows // many), composites):
            wanted = [n for n in range(many) if only is None or row.index * many + n in only]
            yield from self._pairs(row, wanted)

    def _pairs(self, composite: Row, wanted: list[int]) -> Iterator[Row]:
        problem = composite.problem or self._unwanted(composite.meta)
        tiles: dict[str, bytes] = {}
        if problem is None and composite.data is not None:
            try:
                tiles = _tiles(composite.data)
            except BadImage as bad:
                problem = Problem(bad.reason, bad.detail)
        for n in wanted:
            side = self._sides[n]
            row = Row(composite.index * len(self._sides) + n, f"{composite.location}.{side}", None, problem=problem)
            row.meta = {**composite.meta, "task_type": TASK, "output": side}
            item, text = _described(composite.meta, side)
            if text:
                row.text = row.meta["instruction"] = f"{text} Show the same {item} as in {placeholder(1)}."
            if tiles:
                other = SIDES[1 - SIDES.index(side)]
                row.data, row.inputs = tiles[side], [(f"{composite.location}.{other}", tiles[other])]
                row.meta["reencoded"] = "PNG, losslessly: a tile cut out of the composite"
            yield row

    def _unwanted(self, meta: dict[str, Any]) -> Problem | None:
        """Why the recipe does not want a composite, if it does not."""
        if self.config.collections and meta.get("collection") not in self.config.collections:
            return Problem("other_collection", f"it is of {meta.get('collection')}")
        if not self.config.min_quality:
            return None
        given = meta.get("quality_assessment")
        scores = {k: given.get(k) if isinstance(given, dict) else None for k in SCORES}
        if all(s is not None and s >= self.config.min_quality for s in scores.values()):
            return None
        return Problem("low_quality", ", ".join(f"{k} {v}" for k, v in scores.items()))


def _tiles(data: bytes) -> dict[str, bytes]:
    """The composite's tiles as PNG. Raises BadImage: it cannot be decoded, or is no composite."""
    header = read_header(data)
    half, side = header.width // 2, min(header.width // 2, header.height) // TILE * TILE
    if not side or header.width % 2 or (half - side) % 2 or half != header.height or half - side >= TILE // 4:
        raise BadImage("not_a_composite", f"{header.width} x {header.height}, expected 1056 x 528 or alike")
    pixels = decode(data, header)
    border = (half - side) // 2
    starts = {"left": border, "right": half + border}
    return {k: encode(pixels[border : border + side, x : x + side], "png") for k, x in starts.items()}


def _described(meta: dict[str, Any], side: str) -> tuple[str, str | None]:
    """What the subject is, and the description of the tile on this side, if there is one."""
    given = meta.get("description")
    description = given if isinstance(given, dict) else {}
    item = re.sub(r"^(an?|the)\s+", "", pick(description, "item") or "subject", flags=re.IGNORECASE)
    text = pick(description, f"description_{SIDES.index(side)}")
    if text is None and isinstance(
        meta.get("raw_json"), str
    ):  # as the third collection has it where the others are null
        try:
            raw = json.loads(meta["raw_json"])
            text = pick(raw["image_descriptions"]["descriptive_style"], f"{side}_image")
        except (ValueError, KeyError, TypeError, AttributeError):
            text = None
    return item, text
