"""`erase`: the picture without one of its objects, whose place is filled from what surrounds it.

The object is one phrase's: all its boxes (`grounding`), each with its mask (`masks`), or boxes alone (`faces`). Two
backends fill the hole. `opencv` needs no weights and knows no objects: it carries the colours of the rim inwards (Telea
2004, "An image inpainting technique based on the fast marching method", or Bertalmio et al. 2001, "Navier-Stokes, fluid
dynamics, and image and video inpainting"), which looks right on plain surroundings and smeared on others. `diffusers`
runs any inpainting pipeline that diffusers loads. Default: Stable Diffusion 1.5's (Rombach et al. 2022,
https://arxiv.org/abs/2112.10752; CreativeML Open RAIL-M, about 5.5 GB with its safety checker).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import cv2
import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from x2i.base.packages import version
from x2i.base.seeds import generator
from x2i.base.weights import Weights
from x2i.pipelines.annotators._diffusers import Inpainting
from x2i.pipelines.annotators._objects import ObjectsConfig
from x2i.pipelines.annotators._pictures import pixels
from x2i.pipelines.annotators._torch import SPEED, Runtime, folder
from x2i.pipelines.annotators._weights import weights_of
from x2i.pipelines.annotators.base import Annotator, Decoding, Item
from x2i.pipelines.images import encode, resize
from x2i.pipelines.masks import filled, grown
from x2i.pipelines.ranges import Shares
from x2i.pipelines.regions import Region, things

SD15 = Weights(
    "stable-diffusion-v1-5/stable-diffusion-inpainting", size=5_480_000_000, licence="CreativeML Open RAIL-M"
)
KNOWN = (
    SD15,
    Weights(
        "diffusers/stable-diffusion-xl-1.0-inpainting-0.1", size=13_900_000_000, licence="CreativeML Open RAIL++-M"
    ),
)
METHODS = {"telea": cv2.INPAINT_TELEA, "ns": cv2.INPAINT_NS}


class EraseConfig(ObjectsConfig):
    """Which objects may go, and how the hole is filled."""

    backend: Literal["opencv", "diffusers"] = Field(
        "opencv", description="opencv (no weights, for small things before plain ones) or a model, e.g. diffusers"
    )
    weights: str = Field(
        SD15.spec,
        description="diffusers: an inpainting pipeline by hub id or folder, e.g. "
        "diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
    )
    noun: str | None = Field(None, description="what the boxes hold where there are no phrases, e.g. face")
    area: Shares = Field((0.003, 0.12), description="share of the picture that the object may have, e.g. [0.003, 0.12]")
    max_border: float = Field(
        0.01, ge=0, le=1, description="share of the picture's edge that the object may touch at most, e.g. 0.01"
    )
    grow: float = Field(
        0.015, ge=0, le=0.2, description="rim that goes with the object, as a share of the shorter side, e.g. 0.015"
    )
    side: int = Field(1024, gt=63, description="longest side of the picture that is kept, in pixels, e.g. 1024")
    method: Literal["telea", "ns"] = Field("telea", description="opencv: how it fills, e.g. ns")
    radius: float = Field(
        0.01, gt=0, le=0.1, description="opencv: how far it looks, as a share of the shorter side, e.g. 0.01"
    )
    prompt: str = Field("empty background", description="diffusers: what the hole should show, e.g. plain background")
    avoid: str = Field(
        "{object}, object, person, text", description="diffusers: what it should not show; e.g. {object} is the phrase"
    )
    context: float = Field(
        2.0, ge=1, description="diffusers: sides of the part that the model sees, times the hole's box's, e.g. 2.0"
    )
    strength: float = Field(1.0, gt=0, le=1, description="diffusers: 1 forgets what was in the hole, e.g. 0.99")

    @model_validator(mode="after")
    def _named(self) -> EraseConfig:
        if (self.phrases is None) == (self.noun is None):
            raise ValueError("give `phrases`, or `phrases: null` and a `noun`")
        return self


class Erase(Annotator):
    """The picture without an object, or why there is none (`status`: erased, no_boxes, none_fits, flagged).

    `image` is a JPEG, `mask` a PNG of the same size, white where `image` differs from the picture. Of several objects
    that fit, one is drawn by the image's id; it is `phrase`, the boxes `index`, and `area` its share of the picture
    without the rim. `by` says what filled the hole. flagged: a model's own safety checker refused what it made.
    """

    name = "erase"
    Config = EraseConfig
    heavy = frozenset({"image", "mask"})
    speed = SPEED
    columns = pa.schema(
        {
            "image": pa.binary(),
            "mask": pa.binary(),
            "status": pa.string(),
            "phrase": pa.string(),
            "index": pa.list_(pa.int32()),
            "area": pa.float32(),
            "by": pa.string(),
        }
    )

    def __init__(self, config: EraseConfig, decoding: Decoding | None = None) -> None:
        super().__init__(config, decoding)
        if config.backend == "diffusers":
            self.gpus = 1.0  # type: ignore[misc]  # OpenCV fills on a CPU

    @property
    def reads(self) -> tuple[str, ...]:
        return self.config.columns

    def weights(self) -> list[Weights]:
        config = self.config
        return [weights_of(config.weights, config.sha256, KNOWN)] if config.backend == "diffusers" else []

    def description(self) -> dict[str, Any]:
        """As in the base class; what a hole is filled with changes with the library."""
        library = "opencv-python" if self.config.backend == "opencv" else "diffusers"
        return super().description() | {"library": f"{library} {version(library)}"}

    def setup(self) -> None:
        if self.config.backend == "diffusers":
            self._pipeline = Inpainting(folder(self.weights()[0]), Runtime(self.config, auto="bf16"), "erase")

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        given = self.config.cells(batch, "erase")
        rows = [self._row(i, p, g) for i, p, g in zip(batch, pixels(batch), given, strict=True)]
        return pa.Table.from_pylist(rows, schema=self.columns)

    def _row(self, item: Item, picture: np.ndarray, given: Mapping[str, Any]) -> dict[str, Any]:
        config = self.config
        if not given[config.boxes]:
            return {"status": "no_boxes"}
        scale = min(1.0, config.side / max(picture.shape[:2]))
        picture = resize(picture, *(max(1, round(n * scale)) for n in picture.shape[1::-1]))
        fits = [t for t in self._things(given, picture.shape[1::-1]) if self._fits(t.mask)]
        if not fits:
            return {"status": "none_fits"}
        rng = generator("erase/1", item.image_id)
        thing = fits[int(rng.integers(len(fits)))]
        hole = grown(thing.mask, round(config.grow * min(picture.shape[:2])))
        erased = self._filled(picture, hole, thing.phrase, rng)
        if erased is None:
            return {"status": "flagged"}
        return {
            "image": encode(np.where(hole[..., None], erased, picture), "jpg", config.quality, "444"),
            "mask": encode(np.where(hole, 255, 0).astype(np.uint8), "png"),
            "status": "erased",
            "phrase": thing.phrase,
            "index": list(thing.index),
            "area": thing.share,
            "by": f"opencv {config.method}" if config.backend == "opencv" else f"diffusers {config.weights}",
        }

    def _things(self, given: Mapping[str, Any], size: tuple[int, int]) -> list[Region]:
        """What could be erased. A noun of the configuration is said of one box: of several, which would go?"""
        config = self.config
        found = config.regions(given, size, config.noun)
        if config.phrases is None and len(found) > 1:
            return []
        if not config.masks:
            found = [replace(r, codes=(filled(r.box, size),)) for r in found]
        return things(found)

    def _fits(self, mask: np.ndarray) -> bool:
        least, most = self.config.area
        edge = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        return bool(least <= mask.mean() <= most and edge.mean() <= self.config.max_border)

    def _filled(
        self, picture: np.ndarray, hole: np.ndarray, phrase: str, rng: np.random.Generator
    ) -> np.ndarray | None:
        """The picture with its hole filled; None where the model refuses."""
        config = self.config
        if config.backend == "opencv":
            return _carried(picture, hole, max(1.0, config.radius * min(picture.shape[:2])), METHODS[config.method])
        x1, y1, x2, y2 = _around(hole, config.context)
        asked = config.asked(phrase, int(rng.integers(2**62)))
        part = self._pipeline(picture[y1:y2, x1:x2], hole[y1:y2, x1:x2], **asked)
        if part is None:
            return None
        out = picture.copy()
        out[y1:y2, x1:x2] = part
        return out


def _around(hole: np.ndarray, times: float) -> tuple[int, int, int, int]:
    """The hole's box, its sides so many times as long, within the picture: x1, y1, x2, y2."""
    out = []
    for axis in (0, 1):
        there = np.flatnonzero(hole.any(axis=axis))
        start, end, length = int(there[0]), int(there[-1]) + 1, hole.shape[1 - axis]
        more = round((times - 1) / 2 * (end - start))
        out.append((max(0, start - more), min(length, end + more)))
    (x1, x2), (y1, y2) = out
    return x1, y1, x2, y2


def _carried(picture: np.ndarray, hole: np.ndarray, radius: float, method: int) -> np.ndarray:
    """Filled by cv2.inpaint; only the part round the hole is looked at, which changes nothing and saves time."""
    x1, y1, x2, y2 = _around(hole, 1)
    rim = int(np.ceil(radius)) + 2
    part = np.s_[max(0, y1 - rim) : y2 + rim, max(0, x1 - rim) : x2 + rim]
    out = picture.copy()
    out[part] = cv2.inpaint(np.ascontiguousarray(picture[part]), hole[part].astype(np.uint8), radius, method)
    return out
