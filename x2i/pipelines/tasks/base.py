"""What a task family is: a pure function of a selected row and a seed, giving X2I samples.

A subclass lives in a file of its own in this folder; the file's name is its key under `tasks` in a recipe.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from x2i.base.config import Config
from x2i.base.seeds import digest, generator
from x2i.corpus.sample import Picture, Sample
from x2i.pipelines.images import decode, encode, read_header


@dataclass(frozen=True)
class Skipped:
    """A task that a row cannot serve. `reason` is a snake_case word; it is counted."""

    task_type: str
    reason: str


@dataclass
class Selected:
    """A row that the selection let in, and its picture as it will be stored.

    `values` are the annotators' columns, `{"nsfw": {"score": 0.01}, …}`. `inputs` are the pictures of a
    row that was an X2I sample already. `seed` is the recipe's.
    """

    row_id: str
    image_id: str
    source: str
    location: str
    text: str | None
    meta: dict[str, Any]
    values: dict[str, dict[str, Any]]
    picture: Picture
    inputs: tuple[Picture, ...] = ()
    seed: int = 0
    untouched: bool = True

    @cached_property
    def pixels(self) -> np.ndarray:
        """uint8 [height, width, 3] of the stored picture, so that what derives from it fits what a reader sees."""
        return decode(self.picture.data, read_header(self.picture.data))

    def generator(self, task_type: str) -> np.random.Generator:
        """Random numbers that depend on the image, the task and the recipe's seed alone."""
        return generator("task/1", self.seed, self.image_id, task_type)

    def key(self, task_type: str) -> str:
        """The sample's key: by image, row and task."""
        # a dot would end the key for webdataset, and published task types hold anything
        return f"{self.image_id[:16]}-{self.row_id[:8]}-{re.sub(r'[^A-Za-z0-9_-]', '_', task_type)[:40]}"

    def sample(
        self,
        task_type: str,
        instruction: str,
        input_images: Sequence[Picture] = (),
        parameters: dict[str, Any] | None = None,
    ) -> Sample:
        """A sample whose output is this row's picture, with its provenance."""
        provenance = {
            "image_id": self.image_id,
            "row_id": self.row_id,
            "source": self.source,
            "location": self.location,
            "untouched": self.untouched,  # whether the output image is the source's bytes
            "seed": digest("task/1", self.seed, self.image_id, task_type),
            "parameters": parameters or {},
        }
        return Sample(self.key(task_type), task_type, instruction, tuple(input_images), self.picture, (), provenance)


def picture_of(pixels: np.ndarray, extension: str = "png", quality: int = 95) -> Picture:
    """Encode uint8 [height, width(, 3)] as a Picture: png keeps every value, jpg is smaller."""
    data = encode(pixels, "png" if extension == "png" else "jpg", quality, "444")
    return Picture(data, extension, pixels.shape[1], pixels.shape[0])


class Task(abc.ABC):
    """One family of tasks. `needs` names annotators whose columns `build` reads from `row.values`."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ()
    Config: ClassVar[type[Config]] = Config

    def __init__(self, config: Any) -> None:
        self.config = config

    @abc.abstractmethod
    def task_types(self) -> list[str]:
        """The task types that this family makes, as configured."""

    @abc.abstractmethod
    def build(self, row: Selected) -> Iterator[Sample | Skipped]:
        """One sample or one `Skipped` for each of `task_types()`; a pure function of the row."""

    @property
    def fingerprint(self) -> str:
        """Digest of what decides this family's samples besides the row."""
        return digest("task/1", self.name, self.version, self.config.model_dump(mode="json"))


class Wordings:
    """Several ways of saying an instruction; which one is drawn by the sample's generator."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def draw(self, rng: np.random.Generator, **words: str) -> str:
        """One of the texts, its `{words}` filled in."""
        return self.texts[int(rng.integers(len(self.texts)))].format(**words)
