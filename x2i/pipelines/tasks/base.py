"""What a task family is: a pure function of a selected row, or of a group of rows, and a seed, giving X2I samples.

A subclass lives in a file of its own in this folder; the file's name is its key under `tasks` in a recipe.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from x2i.base.config import Config
from x2i.base.seeds import digest, generator
from x2i.corpus.sample import Picture, Sample
from x2i.pipelines.images import decode, encode, read_header
from x2i.pipelines.tasks._instructions import Instructions

if TYPE_CHECKING:
    import duckdb


@dataclass(frozen=True)
class Skipped:
    """A task that a row cannot serve. `reason` is a snake_case word; it is counted."""

    task_type: str
    reason: str


@dataclass(frozen=True)
class Group:
    """Rows that make a sample together; it belongs to the row `anchor`, whose picture is as a rule its output.

    `others` are ids of further kept rows. `about` is what `build` has to know besides (JSON types).
    """

    anchor: str
    task_type: str
    others: tuple[str, ...]
    about: dict[str, Any] = field(default_factory=dict)


@dataclass
class Found:
    """A group as `build` meets it: its other rows with their pictures, or the reason for which one cannot be had."""

    task_type: str
    others: tuple[Selected, ...]
    about: dict[str, Any]
    problem: str | None = None


@dataclass
class Selected:
    """A row that the selection let in, and its picture as it will be stored.

    `values` are the annotators' columns, `{"nsfw": {"score": 0.01}, …}`, with the heavy ones that the tasks read. They
    are None where an annotator's `where` did not let the row in. `inputs` and `mask` are the further pictures of a
    row that was an X2I sample already, `input_ids` the SHA-256 of the inputs' original bytes. `groups` are those of the
    task family at hand, of which this row is the anchor. `seed` is the recipe's. `carried` are the values that every
    sample's provenance tells (`output.carry`).
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
    input_ids: tuple[str, ...] = ()
    mask: Picture | None = None
    groups: tuple[Found, ...] = ()
    seed: int = 0
    untouched: bool = True
    carried: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def pixels(self) -> np.ndarray:
        """uint8 [height, width, 3] of the stored picture, so that what derives from it fits what a reader sees."""
        return decode(self.picture.data, read_header(self.picture.data))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the stored picture, in pixels."""
        return self.picture.width, self.picture.height

    def value(self, column: str) -> Any:
        """A value by its column's name: `hed.map`, or `rows.text`. None where there is none."""
        name, _, part = column.partition(".")
        if name == "rows":
            return self.text if part == "text" else self.meta.get(part)
        return (self.values.get(name) or {}).get(part)

    def generator(self, task_type: str) -> np.random.Generator:
        """Random numbers that depend on the image, the task and the recipe's seed alone."""
        return generator("task/1", self.seed, self.image_id, task_type)

    def key(self, task_type: str, variant: str = "") -> str:
        """The sample's key: by image, row, task, and what sets it apart from others of that task."""
        # a dot would end the key for webdataset, and published task types hold anything
        tail = task_type if not variant else f"{task_type[:32]}-{digest(variant)[:8]}"
        return f"{self.image_id[:16]}-{self.row_id[:8]}-{re.sub(r'[^A-Za-z0-9_-]', '_', tail)[:41]}"

    def sample(
        self,
        task_type: str,
        instruction: str,
        input_images: Sequence[Picture] = (),
        parameters: dict[str, Any] | None = None,
        *,
        output: Picture | None = None,
        mask: Picture | None = None,
        others: Sequence[Selected] = (),
        variant: str = "",
    ) -> Sample:
        """A sample with its provenance.

        Args:
            output: the output image; None takes this row's own picture.
            mask: white where an edit changed something, for losses that weigh regions; as large as the output.
            others: further rows whose pictures are in the sample.
            variant: sets samples of one row and task apart, e.g. a box's number.
        """
        return Sample(
            self.key(task_type, variant),
            task_type,
            instruction,
            tuple(input_images),
            output or self.picture,
            (),
            self._provenance(task_type, parameters, others, self.untouched and output is None),
            mask,
        )

    def conversation(
        self,
        task_type: str,
        messages: Sequence[Mapping[str, Any]],
        parameters: dict[str, Any] | None = None,
        *,
        images: Sequence[Picture] | None = None,
        objects: dict[str, Any] | None = None,
        rejected_response: str | None = None,
        others: Sequence[Selected] = (),
        variant: str = "",
    ) -> Sample:
        """A sample of an understanding task: `messages` as ms-swift reads them, with an `<image>` for each picture.

        Args:
            images: the pictures that are talked of; None: this row's own.
            objects: `ref` and `bbox`, in the order of the `<ref-object>` and `<bbox>` in the messages.
            rejected_response: an answer worse than the last message, for preference training.
        """
        pictures = (self.picture,) if images is None else tuple(images)
        provenance = self._provenance(task_type, parameters, others, False)
        said = tuple(dict(m) for m in messages)
        key = self.key(task_type, variant)
        return Sample(
            key,
            task_type,
            "",
            pictures,
            None,
            said,
            provenance,
            objects=objects or {},
            rejected_response=rejected_response,
        )

    def _provenance(
        self, task_type: str, parameters: dict[str, Any] | None, others: Sequence[Selected], untouched: bool
    ) -> dict[str, Any]:
        out: dict[str, Any] = {
            "image_id": self.image_id,
            "row_id": self.row_id,
            "source": self.source,
            "location": self.location,
            "untouched": untouched,  # whether the output image is the source's bytes
            "seed": digest("task/1", self.seed, self.image_id, task_type),
            "parameters": parameters or {},
        }
        if self.carried:
            out["carried"] = self.carried
        if self.input_ids:
            out["input_ids"] = list(self.input_ids)
        if others:
            names = ("image_id", "row_id", "source", "location", *(["carried"] if self.carried else []))
            out["others"] = [
                {n: getattr(o, n) for n in names} | ({"input_ids": list(o.input_ids)} if o.input_ids else {})
                for o in others
            ]
        return out


def picture_of(pixels: np.ndarray, extension: str = "png", quality: int = 95) -> Picture:
    """Encode uint8 [height, width(, 3)] as a Picture: png keeps every value, jpg is smaller."""
    data = encode(pixels, "png" if extension == "png" else "jpg", quality, "444")
    return Picture(data, extension, pixels.shape[1], pixels.shape[0])


class TaskConfig(Config):
    """What every family's configuration has."""

    instructions: str | None = Field(
        None,
        description="YAML file of wordings, e.g. my_words.yaml, or the name of one in configs/instructions, e.g. "
        "restoration_plain; what it lacks, and null: configs/instructions/FAMILY.yaml",
    )


class Task(abc.ABC):
    """One family of tasks. In a recipe it may have a name of its own, with `kind`.

    `words` are the keys of its file of instructions, each with the words in braces that its texts must or may have:
    `{"canny_to_image": ("image", "text")}`. `image`, `image_1`, `image_2` … stand for the input pictures, and must be
    in every text; other words may be. `texts` are the wordings of a family that has no file in configs/instructions.
    """

    name: str
    version: ClassVar[int] = 1
    words: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    texts: ClassVar[Mapping[str, list[str]]] = {}
    Config: ClassVar[type[TaskConfig]] = TaskConfig

    #: While groups are asked for: reads the files of kept rows, by row id; None where that is not possible.
    pictures: Callable[[Sequence[str]], Mapping[str, bytes]] | None = None

    def __init__(self, config: Any) -> None:
        self.config = config
        self.name = type(self).name
        self.instructions = Instructions(self.words, config.instructions, type(self).name, self.texts)

    @property
    def reads(self) -> Mapping[str, str]:
        """Columns that it reads, `annotator.column`, each with what a recipe should have that lacks it.

        For example `{"hed.map": "hed: {kind: edges, model: hed}"}`. Heavy columns come from the lake, and only those
        named here.
        """
        return {}

    @abc.abstractmethod
    def task_types(self) -> list[str]:
        """The task types that this family makes, as configured."""

    def groups(self, connection: duckdb.DuckDBPyConnection, seed: int) -> Iterable[Group]:
        """Rows that make samples together, asked of the selection; as a rule there are none.

        Args:
            connection: `kept` has the rows that stay, with a struct of light columns per annotator;
                `lake."annotator"` has all columns of an annotator that this task reads, heavy ones too, by `row_id`.
            seed: the recipe's. What is drawn must depend on it and on content alone.
        """
        return ()

    def of_groups(self) -> list[str]:
        """Those of `task_types()` that are made of groups, and not of a row by itself."""
        return self.task_types() if type(self).groups is not Task.groups else []

    @abc.abstractmethod
    def build(self, row: Selected) -> Iterator[Sample | Skipped]:
        """Samples, or `Skipped` with a reason, of a row and of the groups that it is the anchor of.

        At least one of either for each of `task_types()`; a pure function of the row.
        """

    @property
    def fingerprint(self) -> str:
        """Digest of what decides this family's samples besides the row."""
        said = self.config.model_dump(mode="json", exclude={"instructions"})
        return digest("task/2", type(self).name, self.version, said, self.instructions.texts)


def caption(row: Selected, column: str = "rows.text") -> str | None:
    """A text that an instruction may hold: stripped, or None where there is none."""
    text = row.value(column)
    return (text.strip() or None) if isinstance(text, str) else None


def holds_placeholder(text: str | None) -> bool:
    """Whether a text from a source would be read as a place for an image."""
    return text is not None and "<|image_" in text
