"""SynCD (`nupurkmr9/syncd`): groups of generated pictures of the same object in several scenes.

    *metadata*.json    a list of {filenames[], prompts[], dino_scores (n x n, upper triangle), aesthetics_scores{stem}}
    .../NAME.jpg, .../masks/NAME.jpg

Each picture of a group is the output of one row; others of the group are its inputs. File names are looked
for below the metadata file's folder, first as they stand, then without their leading folders.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import Any, Literal, TypeGuard

from pydantic import Field

from x2i.corpus.sample import placeholder
from x2i.pipelines.sources._files import Root
from x2i.pipelines.sources._published import RecordSource, load
from x2i.pipelines.sources._text import Malformed, parse_object, pick
from x2i.pipelines.sources.base import Problem, Row, SourceConfig

TASK = "subject_driven"


class SynCDConfig(SourceConfig):
    """The dataset as its unzip.sh leaves it."""

    kind: Literal["syncd"] = "syncd"
    path: str = Field(description="the folder of the metadata files, e.g. syncd")
    references: int = Field(1, ge=1, le=3, description="input pictures of a row, at most (a group has two or three)")
    min_similarity: float | None = Field(
        None, ge=-1, le=1, description="least DINO score of input and output, e.g. 0.7; null: as published"
    )
    max_similarity: float = Field(0.98, ge=-1, le=1, description="greatest DINO score: beyond it they are copies")
    min_aesthetics: float | None = Field(None, description="least aesthetics score of each picture, e.g. 6")
    unit_rows: int = Field(500, ge=1, description="groups in a unit")


class SynCD(RecordSource):
    """One row per picture of a group."""

    kind = "syncd"
    Config = SynCDConfig
    config: SynCDConfig
    files = "*metadata*.json of SynCD"

    @property
    def listing(self) -> str | list[str]:
        """See `FiledSource.listing`."""
        return f"{self.config.path.rstrip('/')}/*metadata*.json"

    def count(self, data: bytes) -> int:
        """See `RecordSource.count`."""
        try:
            names = parse_object(data).get("filenames")
        except Malformed:
            return 1
        return max(len(names), 1) if isinstance(names, list) else 1

    def fill(self, row: Row, record: dict[str, Any], part: int, file: str) -> Problem | None:
        """See `RecordSource.fill`."""
        row.meta = dict(record)
        names, prompts = record.get("filenames"), record.get("prompts")
        if not _strings(names) or not isinstance(prompts, list) or len(prompts) != len(names):
            return Problem("bad_metadata", "'filenames' and 'prompts' are not two lists of one length")
        others = [(part + i) % len(names) for i in range(1, len(names))]
        chosen, problem = self._chosen(record, part, others)
        row.meta |= {"task_type": TASK, "output": part, "inputs": chosen}
        if prompt := pick({"prompt": prompts[part]}, "prompt"):
            marks = " and ".join(placeholder(n + 1) for n in range(max(len(chosen), 1)))
            row.text = row.meta["instruction"] = f"{prompt} The object is the one in {marks}."
        return problem or self._load(row, names, part, chosen, file)

    def _chosen(self, record: dict[str, Any], part: int, others: list[int]) -> tuple[list[int], Problem | None]:
        """The group's pictures that go with this one, or why none does."""
        config = self.config
        if not others:
            return [], Problem("bad_metadata", "a group of one picture")
        if config.min_aesthetics is not None:
            scores = {i: _aesthetics(record, i) for i in (part, *others)}
            if scores[part] is None or all(scores[i] is None for i in others):
                return [], Problem("no_score", "no 'aesthetics_scores' of this picture, or of no other")
            others = [i for i in others if (scores[i] or 0) >= config.min_aesthetics]
            if not others or (scores[part] or 0) < config.min_aesthetics:
                return [], Problem("low_aesthetics", f"{scores}, asked for {config.min_aesthetics}")
        if config.min_similarity is not None:
            alike = {i: _similarity(record, part, i) for i in others}
            if all(a is None for a in alike.values()):
                return [], Problem("no_score", "no 'dino_scores' of this picture")
            others = [i for i, a in alike.items() if a and config.min_similarity <= a <= config.max_similarity]
            if not others:
                return [], Problem("low_similarity", f"DINO scores {alike}, asked for {config.min_similarity}")
        return others[: config.references], None

    def _load(self, row: Row, names: list[str], part: int, chosen: list[int], file: str) -> Problem | None:
        folder = self._root.below(posixpath.dirname(file))
        found = {i: _found(folder, names[i]) for i in (part, *chosen)}
        row.meta["masks"] = [
            posixpath.join(posixpath.dirname(p), "masks", posixpath.splitext(posixpath.basename(p))[0] + ".jpg")
            for p in found.values()
        ]
        return load(row, folder, [found[i] for i in chosen], found[part])


def _strings(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) and v for v in value)


def _tails(name: str) -> Iterator[str]:
    parts = [p for p in posixpath.normpath(name).split("/") if p not in ("", "..", ".")]
    yield from ("/".join(parts[i:]) for i in range(len(parts)))


def _found(folder: Root, name: str) -> str:
    """The file that is meant, below the folder; the name itself if there is none."""
    tails = list(_tails(name))
    return next((t for t, f in zip(tails, folder.stat_many(tails), strict=True) if f is not None), tails[0])


def _similarity(record: dict[str, Any], first: int, second: int) -> float | None:
    """The DINO score of two pictures: rows of the matrix are the earlier ones, as only its upper triangle is filled."""
    low, high = sorted((first, second))
    try:
        score = record["dino_scores"][low][high]
    except (KeyError, IndexError, TypeError):
        return None
    return float(score) if isinstance(score, int | float) else None


def _aesthetics(record: dict[str, Any], index: int) -> float | None:
    stem = posixpath.splitext(posixpath.basename(record["filenames"][index]))[0]
    scores = record.get("aesthetics_scores")
    score = scores.get(stem) if isinstance(scores, dict) else None
    return float(score) if isinstance(score, int | float) else None
