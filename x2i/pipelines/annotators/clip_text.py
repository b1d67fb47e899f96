"""`clip_text`: how well any text fits a picture, by CLIP's text tower against the stored image embedding.

Recaptions are scored so without an image being opened: `clip_text: {text: caption.long}`. Model, weights and licence
as in `clip`; they must be those from which the embeddings come.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from pydantic import Field

from x2i.base.weights import Weights
from x2i.pipelines.annotators._clip import Clip, ClipConfig, cosines, said, shape_of, weights_of
from x2i.pipelines.annotators._heads import embeddings, spread
from x2i.pipelines.annotators._torch import SPEED
from x2i.pipelines.annotators.base import Annotator, Batch, Decoding, Item


class ClipTextConfig(ClipConfig):
    """Which CLIP, which text, which embedding."""

    text: str = Field("caption.long", description="column of texts, e.g. caption.short; rows.text is the caption")
    embedding: str = Field(
        "clip.embedding", description="column of the same CLIP's embeddings, e.g. clip_b32.embedding"
    )


class ClipText(Annotator):
    """One column, `similarity`: cosine of text and image; null where either is missing. 77 tokens are read."""

    name = "clip_text"
    needs = "row"
    Config = ClipTextConfig
    columns = pa.schema({"similarity": pa.float32()})
    speed = SPEED
    gpus = 0.25

    def __init__(self, config: ClipTextConfig, decoding: Decoding | None = None) -> None:
        super().__init__(config, decoding)
        self._shape = shape_of(config)

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.config.text, self.config.embedding)

    def weights(self) -> list[Weights]:
        return [weights_of(self.config)]

    def setup(self) -> None:
        self._clip = Clip(self.config, self._shape)
        self._clip.text_only()

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        given = batch if isinstance(batch, Batch) else Batch(batch)
        column = self.config.text
        texts = [i.text for i in given] if column == "rows.text" else given.columns[column].to_pylist()
        images, there = embeddings(given, self.config.embedding, self._shape.width, "clip_text")
        place = np.cumsum(there) - 1  # of a row among the rows that have an embedding
        both = [i for i in said(texts) if there[i]]
        scored = np.zeros(len(given), bool)
        scored[both] = True
        similarity = np.zeros(0, np.float32)
        if both:
            similarity = cosines(images[place[both]], self._clip.texts([str(texts[i]) for i in both]))
        return pa.table({"similarity": spread(similarity, scored)})
