"""`clip_text`: how well any text fits a picture, by CLIP's text tower against the stored image embedding.

Recaptions are scored so without an image being opened: `clip_text: {text: caption.long}`. Model, weights and licence
as in `clip`; they must be those from which the embeddings come.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
from pydantic import Field

from x2i.base.weights import Weights
from x2i.pipelines.annotators._clip import Clip, ClipConfig, named, shape_of
from x2i.pipelines.annotators._columns import texts
from x2i.pipelines.annotators._heads import embeddings
from x2i.pipelines.annotators._torch import SHARE, SPEED
from x2i.pipelines.annotators.base import Annotator, Decoding, Item


class ClipTextConfig(ClipConfig):
    """Which CLIP, which text, which embedding."""

    text: str = Field("caption.long", description="column of texts, e.g. caption.short; rows.text is the caption")
    embedding: str = Field(
        "clip.embedding", description="column of the same CLIP's embeddings, e.g. clip_b32.embedding"
    )


class ClipText(Annotator):
    """`similarity`: cosine of text and image, -1 to 1; null where either is missing. 77 tokens are read. No pixels."""

    name = "clip_text"
    needs = "row"
    Config = ClipTextConfig
    columns = pa.schema({"similarity": pa.float32()})
    speed = SPEED
    gpus = SHARE

    def __init__(self, config: ClipTextConfig, decoding: Decoding | None = None) -> None:
        super().__init__(config, decoding)
        self._shape = shape_of(config)

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.config.text, self.config.embedding)

    def weights(self) -> list[Weights]:
        return [named(self.config)]

    def setup(self) -> None:
        self._clip = Clip(self.config, self._shape)
        self._clip.text_only()

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        images, there = embeddings(batch, self.config.embedding, self._shape.width, "clip_text")
        said = texts(batch, self.config.text, "clip_text")
        return pa.table({"similarity": self._clip.similarity(images, there, said)})
