"""`repaint`: cut-outs of a picture's subjects, painted anew by a diffusion model, so that copying them does not pay.

OmniGen's GRIT-Entity (arXiv 2409.11340, section 3) has its cut-outs repainted by MS-Diffusion, which no library of the
registry runs. Here any pipeline does that diffusers loads. `method: inpaint` paints the subject anew within its mask;
`method: image` the whole cut-out, by image-to-image or by a pipeline that follows a picture (Kontext, Qwen-Image-Edit).
Both defaults are Stable Diffusion 1.5's (Rombach et al. 2022, https://arxiv.org/abs/2112.10752; CreativeML Open RAIL-M).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from x2i.base.packages import version
from x2i.base.seeds import generator
from x2i.base.weights import Weights
from x2i.pipelines.annotators._diffusers import Inpainting, Redrawing
from x2i.pipelines.annotators._objects import ObjectsConfig
from x2i.pipelines.annotators._pictures import pixels
from x2i.pipelines.annotators._torch import SPEED, Runtime, folder
from x2i.pipelines.annotators._weights import weights_of
from x2i.pipelines.annotators.base import Annotator, Item
from x2i.pipelines.boxes import area, edges
from x2i.pipelines.images import encode, resize
from x2i.pipelines.masks import bounded, cut_out, grown
from x2i.pipelines.ranges import Shares
from x2i.pipelines.regions import Region, is_vague

LICENCE = "CreativeML Open RAIL-M"
#: Sizes in bytes are about right, for people.
INPAINT = Weights("stable-diffusion-v1-5/stable-diffusion-inpainting", size=5_480_000_000, licence=LICENCE)
IMAGE = Weights("stable-diffusion-v1-5/stable-diffusion-v1-5", size=5_480_000_000, licence=LICENCE)


class RepaintConfig(ObjectsConfig):
    """What is repainted, by which model, and how much of it stays."""

    defaults = ("method", {"inpaint": INPAINT.spec, "image": IMAGE.spec})

    method: Literal["inpaint", "image"] = Field(
        "inpaint", description="the subject within its mask, or e.g. image: the cut-out as a whole"
    )
    weights: str = Field(
        INPAINT.spec,
        description="a pipeline as diffusers saves it, by hub id or folder: for inpaint one that inpaints, for image one "
        "from image to image, e.g. black-forest-labs/FLUX.1-Kontext-dev",
    )
    name: str | None = Field(None, description="what all boxes hold where there are no phrases, e.g. a person")
    most: int = Field(4, ge=1, description="cut-outs of a picture that are repainted, e.g. 4")
    area: Shares = Field((0.02, 0.7), description="share of the picture that their boxes may have, e.g. [0.02, 0.7]")
    max_edges: int = Field(2, ge=0, le=4, description="edges of the picture that a box may touch, e.g. 1")
    margin: float = Field(
        0.05, ge=0, le=3, description="room around a cut-out, as a share of its longer side, e.g. 0.05"
    )
    grow: float = Field(
        0.01,
        ge=0,
        le=0.2,
        description="inpaint: rim of the mask that is repainted too, as a share of that side, e.g. 0",
    )
    prompt: str = Field(
        "a photo of {object}, on a plain white background",
        description="what the model is told; {object} is the phrase, e.g. another view of {object}, on white",
    )
    avoid: str = Field(
        "text, watermark, cropped, blurry", description="what it should not paint, where it takes that, e.g. text"
    )
    strength: float = Field(0.6, gt=0, le=1, description="how much is forgotten, where the pipeline takes it, e.g. 0.6")

    @model_validator(mode="after")
    def _named(self) -> RepaintConfig:
        if (self.phrases is None) == (self.name is None):
            raise ValueError("give `phrases`, or `phrases: null` and a `name`, e.g. name: a person")
        if int(self.steps * self.strength) < 1:
            raise ValueError(f"of {self.steps} steps the share `strength` is done, which is none of them: more steps")
        return self


class Repaint(Annotator):
    """A list per row, in the order of the boxes: a JPEG each, null where there is none.

    `index` are the boxes that were repainted: the first `most` that are fit and have a phrase that names a thing.
    `flagged` counts what a pipeline's own safety checker refused. By `inpaint`, what lies outside the subject's mask and
    its rim is white. What is drawn depends on the image's id and the box's number alone.
    """

    name = "repaint"
    Config = RepaintConfig
    heavy = frozenset({"images"})
    speed = SPEED
    gpus = 1.0
    columns = pa.schema(
        {
            "images": pa.list_(pa.binary()),
            "index": pa.list_(pa.int32()),
            "flagged": pa.int32(),
        }
    )

    @property
    def reads(self) -> tuple[str, ...]:
        return self.config.columns

    def weights(self) -> list[Weights]:
        return [weights_of(self.config.weights, self.config.sha256, (INPAINT, IMAGE))]

    def description(self) -> dict[str, Any]:
        """As in the base class; what is painted changes with the library."""
        return super().description() | {"library": version("diffusers")}

    def setup(self) -> None:
        kind = Inpainting if self.config.method == "inpaint" else Redrawing
        self._pipeline = kind(folder(self.weights()[0]), Runtime(self.config), "repaint")

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        given = self.config.cells(batch, "repaint")
        rows = [self._row(i, p, g) for i, p, g in zip(batch, pixels(batch), given, strict=True)]
        return pa.Table.from_pylist(rows, schema=self.columns)

    def _row(self, item: Item, picture: np.ndarray, given: Mapping[str, Any]) -> dict[str, Any]:
        images: list[bytes | None] = [None] * len(given[self.config.boxes] or [])
        index: list[int] = []
        flagged = 0
        for region in self._fit(given, picture.shape[1::-1]):
            number = region.number
            cut = cut_out(picture, region.box, region.mask if region.masked else None, self.config.margin)
            if cut is None:
                continue
            seed = int(generator("repaint/1", item.image_id, number).integers(2**62))
            painted = self._painted(*cut, region.phrase, seed)
            if painted is None:
                flagged += 1
                continue
            images[number] = encode(painted, "jpg", self.config.quality, "444")
            index.append(number)
            if len(index) == self.config.most:
                break
        return {"images": images, "index": index, "flagged": flagged}

    def _fit(self, given: Mapping[str, Any], size: tuple[int, int]) -> Iterator[Region]:
        """The boxes that may be a subject."""
        config = self.config
        for region in config.regions(given, size, config.name):
            fits = config.area[0] <= area(region.box) <= config.area[1] and edges(region.box) <= config.max_edges
            if fits and not (config.phrases and is_vague(region.phrase)) and (region.masked or not config.masks):
                yield region

    def _painted(self, cut: np.ndarray, there: np.ndarray, phrase: str, seed: int) -> np.ndarray | None:
        """A cut-out painted anew: uint8 [height, width, 3], no side longer than `size`."""
        config = self.config
        cut = bounded(cut, config.size)
        small = resize(np.where(there, 255, 0).astype(np.uint8), cut.shape[1], cut.shape[0]) >= 128
        hole = grown(small, round(config.grow * max(cut.shape[:2])))
        painted = self._pipeline(cut, hole, **config.asked(phrase, seed))
        if painted is not None and config.method == "inpaint":
            painted[~hole] = 255
        return painted
