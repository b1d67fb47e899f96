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
from x2i.pipelines.annotators._clip import Clip, ClipConfig, cosines, said, shape_of, weights_of
from x2i.pipelines.annotators._heads import spread
from x2i.pipelines.annotators._torch import SPEED, pixels
from x2i.pipelines.annotators.base import Annotator, Decoding, Item


class ClipAnnotator(Annotator):
    """`embedding`, fp16 of length 1; `similarity`, its cosine with the caption's, null where there is no caption.

    LAION-5B kept English pairs above 0.28 by ViT-B/32; a threshold does not carry over to another model.
    """

    name = "clip"
    Config = ClipConfig
    heavy = frozenset({"embedding"})
    speed = SPEED
    gpus = 0.5

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
        return [weights_of(self.config)]

    def setup(self) -> None:
        self._clip = Clip(self.config, self._shape)

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        stored = np.zeros((len(batch), self._shape.width), np.float16)
        if batch:
            stored = self._clip.images(pixels(batch)).astype(np.float16)
        texts = [i.text or "" for i in batch]
        speaks = said(texts)
        there = np.zeros(len(batch), bool)
        there[speaks] = True
        similarity = np.zeros(0, np.float32)
        if speaks:  # with the embedding as it is stored, so that `clip_text` would say the same
            similarity = cosines(stored[speaks], self._clip.texts([texts[i] for i in speaks]))
        flat = pa.array(stored.ravel(), pa.float16())
        return pa.table(
            {
                "embedding": pa.FixedSizeListArray.from_arrays(flat, self._shape.width),
                "similarity": spread(similarity, there),
            }
        )
