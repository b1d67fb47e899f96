"""What an annotator is: a class that turns a batch of images into a table of typed columns.

A subclass lives in a file of its own in this folder; the file's name is the annotator's name in recipes,
in SQL and in the lake. Its fingerprint covers everything that can change a value.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from x2i.base.config import Config
from x2i.base.seeds import digest
from x2i.base.weights import Weights, digest_of
from x2i.pipelines.images import MAX_PIXELS, Header

#: Goes up when `x2i.pipelines.images` would give other headers or other pixels for the same bytes.
DECODER = 1


class Decoding(Config):
    """How image files are opened, for every annotator alike."""

    max_pixels: int = Field(
        MAX_PIXELS, gt=0, description="larger pictures are quarantined from their header, undecoded, e.g. 40_000_000"
    )


class AnnotatorConfig(Config):
    """What every annotator's configuration has."""

    batch_size: int = Field(16, gt=0, description="images per call; changes speed, and is not in the fingerprint")


@dataclass
class Item:
    """One usable image: its header is read, and its pixels are there if the annotator needs them.

    `pixels` is uint8 [height, width, 3]: upright, sRGB, alpha on white. Read only: it is shared.
    """

    image_id: str
    text: str | None
    data: bytes
    header: Header
    pixels: np.ndarray | None = None


class Annotator(abc.ABC):
    """One kind of annotation.

    `columns` are what a call returns, a row per item, in order. `needs` says what an item must have;
    rows whose pixels cannot be had never reach an annotator that needs them. `version` goes up when
    the same input would give other values. `cpus` and `gpus` are what one worker takes; annotators
    with equal resources share a worker, and decode each image once.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["header", "pixels"]] = "pixels"
    columns: ClassVar[pa.Schema]
    cpus: ClassVar[float] = 1.0
    gpus: ClassVar[float] = 0.0
    Config: ClassVar[type[AnnotatorConfig]] = AnnotatorConfig

    def __init__(self, config: Any, decoding: Decoding | None = None) -> None:
        self.config = config
        self.decoding = decoding or Decoding()

    def weights(self) -> list[Weights]:
        """The weights that `setup` loads. They are fetched once a machine before anything starts."""
        return []

    def setup(self) -> None:  # noqa: B027 - optional: most annotators have nothing to load
        """Load models, once a worker."""

    @abc.abstractmethod
    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        """Annotate a batch: a table of `columns`, one row per item.

        An exception costs only the row that causes it: the batch is tried again one by one, and that
        row gets nulls and the reason `annotator_failed`.
        """

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all that can change a value: code version, parameters, weights, decoding."""
        return digest("annotator/1", self.description())

    def description(self) -> dict[str, Any]:
        """What the fingerprint is made of, for people and for the lake's `annotator.json`."""
        return {
            "name": self.name,
            "version": self.version,
            "parameters": self.config.model_dump(mode="json", exclude={"batch_size"}),
            "weights": {w.spec: w.sha256 or digest_of(w.fetch()) for w in self.weights()},
            "decoding": {"version": DECODER, **self.decoding.model_dump(mode="json")},
            "columns": {f.name: str(f.type) for f in self.columns},
        }
