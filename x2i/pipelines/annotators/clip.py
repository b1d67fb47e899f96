"""`clip`: image embeddings, and how well the caption fits the picture, by CLIP through open_clip.

Models: any architecture and weights of open_clip (https://github.com/mlfoundations/open_clip, MIT; Radford et al.
2021, "Learning transferable visual models from natural language supervision", arXiv 2103.00020). By default OpenAI's
ViT-L/14 (MIT), on whose embeddings LAION's `aesthetic` and `clip_nsfw` heads stand. Other weights have licences of
their own: see their model cards.

Activations follow the weights: OpenAI's were trained with QuickGELU, which open_clip's ViT-L-14 alone does not have.
Preparation is open_clip's own transform of the weights (for OpenAI's: bicubic to 224, centre crop).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from x2i.base.weights import Weights
from x2i.pipelines.annotators._clip import Clip, ClipConfig, named, shape_of
from x2i.pipelines.annotators._heads import stored
from x2i.pipelines.annotators._pictures import pixels
from x2i.pipelines.annotators._torch import SHARE, SPEED
from x2i.pipelines.annotators.base import Annotator, Decoding, Item


class ClipAnnotator(Annotator):
    """`embedding`, fp16 [width] of length 1 (768 wide by default); `similarity`, its cosine with the caption's
    embedding, -1 to 1, null where there is no caption.

    LAION-5B kept English pairs above 0.28 by ViT-B/32; a threshold does not carry over to another model.
    """

    name = "clip"
    Config = ClipConfig
    heavy = frozenset({"embedding"})
    speed = SPEED
    gpus = SHARE

    def __init__(self, config: ClipConfig, decoding: Decoding | None = None) -> None:
        super().__init__(config, decoding)
        self._shape = shape_of(config)
        self.columns = pa.schema({"embedding": pa.list_(pa.float16(), self._shape.width), "similarity": pa.float32()})

    @property
    def reads(self) -> tuple[str, ...]:
        return ("rows.text",)

    @property
    def shorter_side(self) -> int:
        return self._shape.side

    def weights(self) -> list[Weights]:
        return [named(self.config)]

    def setup(self) -> None:
        self._clip = Clip(self.config, self._shape)

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        # the cosine is of the embedding as it is stored, so that `clip_text` says the same
        kept = self._clip.images(pixels(batch)).astype(np.float16)
        similarity = self._clip.similarity(kept, np.ones(len(batch), bool), [i.text for i in batch])
        return pa.table({"embedding": stored(kept), "similarity": similarity})
