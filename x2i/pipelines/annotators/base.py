"""What an annotator is: a class that turns a batch of rows into a table of typed columns.

A subclass lives in a file of its own in this folder; the file's name is the annotator's name in recipes,
in SQL and in the lake (a recipe may give it another one: `{clip_b32: {kind: clip, …}}`). Its fingerprint
covers everything that can change a value.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from x2i.base.config import Config
from x2i.base.seeds import digest
from x2i.base.weights import Weights
from x2i.pipelines.images import MAX_PIXELS, Header

#: Goes up when `x2i.pipelines.images` would give other headers or other pixels for the same bytes.
DECODER = 3


class Decoding(Config):
    """How image files are opened, for every annotator alike."""

    max_pixels: int = Field(
        MAX_PIXELS, gt=0, description="larger pictures are quarantined from their header, undecoded, e.g. 40_000_000"
    )
    shorter_side: int | None = Field(
        1024,
        gt=15,
        description="JPEGs are decoded at 1/2, 1/4 or 1/8 (scaled DCT) while their shorter side keeps this many pixels; "
        "null decodes in full. One size for all annotators: a value does not depend on which others run",
    )


class AnnotatorConfig(Config):
    """What every annotator's configuration has. Nothing here is in the fingerprint."""

    batch_size: int = Field(16, gt=0, description="rows per call; halved and tried again where memory runs out")
    where: str | None = Field(
        None,
        description="SQL over `annotator.column`: only rows for which it holds are annotated, e.g. aesthetic.score > 6",
    )
    cpus: float | None = Field(None, gt=0, description="CPUs that one worker takes; default: the annotator's own")
    gpus: float | None = Field(
        None, ge=0, description="GPUs that one worker takes, fractions too, e.g. 0.25; ignored where there are none"
    )


#: A header that was not read: rows of annotators that need only columns have it.
UNREAD = Header("", 0, 0, "", 0, 1, 0, None)


@dataclass
class Item:
    """One row: its header is read and its pixels are there if the annotator needs them.

    `pixels` is uint8 [height, width, 3]: upright, sRGB, alpha on white; a large JPEG may have been decoded
    at a reduced scale (`Decoding.shorter_side`), so that `header` and `pixels` differ in size, not in shape.
    Read only: it is shared. `meta` is what else the source says of the row, as JSON.
    """

    image_id: str
    text: str | None
    data: bytes = b""
    header: Header = UNREAD
    pixels: np.ndarray | None = None
    meta: str = "{}"


class Batch(list[Item]):
    """Items, and the columns of other annotators that were asked for.

    `columns` has a row per item and a column per name in `Annotator.reads`, e.g. `clip.embedding`.
    """

    def __init__(self, items: Iterable[Item], columns: pa.Table | None = None) -> None:
        super().__init__(items)
        self.columns = columns if columns is not None else pa.table({})


class Annotator(abc.ABC):
    """One kind of annotation.

    `columns` are what a call returns, a row per item, in order; `heavy` names those that stay in the lake
    and are not copied into selections (maps, masks, embeddings). `needs` says what an item must have: "row"
    (no image at all), "header", or "pixels"; rows whose pixels cannot be had never reach an annotator that
    needs them. `version` goes up when the same input would give other values. `cpus` and `gpus` are what one
    worker takes; annotators with equal resources share a worker, and decode each image once.
    """

    name: str
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["row", "header", "pixels"]] = "pixels"
    columns: pa.Schema
    heavy: ClassVar[frozenset[str]] = frozenset()
    cpus: ClassVar[float] = 1.0
    gpus: ClassVar[float] = 0.0
    Config: ClassVar[type[AnnotatorConfig]] = AnnotatorConfig
    #: SQL over its columns: rows that `x2i build --retry` asks again, besides those with an error of the annotator's.
    retry: ClassVar[str | None] = None
    #: Parameters that change speed or place and no value.
    speed: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Any, decoding: Decoding | None = None) -> None:
        self.config = config
        self.decoding = decoding or Decoding()
        #: The largest batch that memory has room for, as far as this process has found out.
        self.fits: int | None = None
        #: The annotators whose columns it reads; a recipe fills them in.
        self.upstream: list[Annotator] = []

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns of other annotators that a batch must bring, as `annotator.column`.

        `rows.text` is the caption, `rows.meta` the JSON of what else the source says.
        """
        return ()

    @property
    def shorter_side(self) -> int:
        """The shorter side, in pixels, that is enough for it: a recipe whose `decode.shorter_side` is less is refused."""
        return 512

    def weights(self) -> list[Weights]:
        """The weights that `setup` loads. They are fetched once a machine before anything starts."""
        return []

    def setup(self) -> None:  # noqa: B027 - optional: most annotators have nothing to load
        """Load models, once a worker."""

    @abc.abstractmethod
    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        """Annotate a batch (a `Batch`): a table of `columns`, one row per item.

        An exception costs only the row that causes it: the batch is halved until that row is found, which gets
        nulls and the reason `annotator_failed` (`out_of_memory` where that is what it was).
        """

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all that can change a value: code version, parameters, weights, decoding, what it reads."""
        return digest("annotator/1", self.description())

    def description(self) -> dict[str, Any]:
        """What the fingerprint is made of, for people and for the lake's `annotator.json`."""
        out = {
            "name": type(self).name,
            "version": self.version,
            "parameters": self.config.model_dump(mode="json", exclude=self.speed | AnnotatorConfig.model_fields.keys()),
            "weights": {w.spec: w.digest() for w in self.weights()},
            "columns": {f.name: str(f.type) for f in self.columns},
        }
        if self.needs != "row":
            exclude = {"shorter_side"} if self.needs == "header" else set()
            out["decoding"] = {"version": DECODER, **self.decoding.model_dump(mode="json", exclude=exclude)}
        if self.upstream:
            out["reads"] = {a.name: a.fingerprint for a in sorted(self.upstream, key=lambda a: a.name)}
        return out
