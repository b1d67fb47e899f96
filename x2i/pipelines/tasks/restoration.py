"""`restoration`: the picture is the output, a damaged copy of it is the input.

Blur, grey, rectangles and central crops as MultiGen-20M / UniControl have them; the other damages as in their
literature (see `_damage` and `_holes`). Every parameter is drawn from the image's id and stored in the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, get_args

import cv2
import numpy as np
from pydantic import Field

from x2i.corpus.sample import Picture, Sample
from x2i.pipelines.images import encode
from x2i.pipelines.masks import decoded, grown
from x2i.pipelines.ranges import Positive, Range, Shares, Whole, real, whole
from x2i.pipelines.tasks import _damage, _holes
from x2i.pipelines.tasks._instructions import Instructions
from x2i.pipelines.tasks._masks import mask_of
from x2i.pipelines.tasks.base import Selected, Skipped, Task, TaskConfig, picture_of

Kind = Literal[
    "deblur", "motion_deblur", "denoise", "derain", "low_light", "jpeg_artifacts", "super_resolution", "colorize",
    "inpaint", "inpaint_freeform", "inpaint_object", "outpaint",
]  # fmt: skip


class RestorationConfig(TaskConfig):
    """Which tasks, and the ranges from which their parameters are drawn."""

    tasks: tuple[Kind, ...] = Field(
        ("deblur", "denoise", "colorize", "inpaint", "outpaint"),
        min_length=1,
        description="the tasks to make, e.g. [derain]",
    )
    wording: Literal["own", "multigen"] = Field(
        "own", description="whose phrases, e.g. multigen: published ones (instructions/multigen_restoration.yaml)"
    )
    blur: Shares = Field((0.01, 0.05), description="Gaussian kernel, as a share of the shorter side, e.g. [0.01, 0.05]")
    motion: Shares = Field(
        (0.02, 0.08), description="path of the camera, as a share of the shorter side, e.g. [0.02, 0.08]"
    )
    noise: Positive = Field((10.0, 50.0), description="standard deviation of Gaussian noise, of 255, e.g. [10, 50]")
    poisson: float = Field(0.0, ge=0, le=1, description="share of `denoise` that gets Poisson noise instead, e.g. 0.5")
    photons: Positive = Field(
        (30.0, 600.0), description="photons of white for that, e.g. [30, 600]: the fewer, the noisier"
    )
    tilt: Range = Field((-30.0, 30.0), description="rain's angle to the vertical, degrees, e.g. [-30, 30]")
    rain_layers: Whole = Field((1, 3), description="layers of rain, e.g. [1, 3]")
    rain_length: Shares = Field(
        (0.03, 0.15), description="length of a streak, as a share of the shorter side, e.g. [0.03, 0.15]"
    )
    rain_cover: Shares = Field((0.02, 0.12), description="share of the picture that a layer covers, e.g. [0.02, 0.12]")
    rain_strength: Shares = Field((0.3, 0.8), description="opacity of the streaks, e.g. [0.3, 0.8]")
    gamma: Positive = Field((2.0, 3.5), description="gamma of low light, e.g. [2.0, 3.5] (MBLLEN)")
    gain: Shares = Field((0.5, 1.0), description="factor of low light after gamma, e.g. [0.5, 1.0]")
    low_light_photons: Positive = Field(
        (200.0, 2000.0), description="photons of white in low light, e.g. [200, 200] (MBLLEN)"
    )
    read_noise: Range = Field((0.0, 3.0), description="Gaussian noise in low light, of 255, e.g. [0, 3]")
    jpeg_quality: Whole = Field((5, 30), description="quality of the spoilt JPEG, 1 to 100, e.g. [5, 30]")
    factor: Whole = Field((2, 8), description="how many times larger super-resolution makes a side, e.g. [2, 8]")
    min_small: int = Field(
        64,
        ge=1,
        description="least shorter side of the small picture, e.g. 64; large factors are not drawn where it would be less",
    )
    enlarged: bool = Field(
        False, description="store super-resolution's input at the output's size (bicubic), not at its own, e.g. true"
    )
    min_colourfulness: float = Field(
        8.0, ge=0, description="greyer pictures are not worth colouring (Hasler's M3), e.g. 8"
    )
    hole: Shares = Field(
        (0.2, 0.5), description="sides of the missing rectangle, as a share of the picture's, e.g. [0.2, 0.5]"
    )
    strokes: Shares = Field(
        (0.05, 0.35), description="share of the picture that free-form strokes cover at least, e.g. [0.05, 0.35]"
    )
    brush: float = Field(0.12, gt=0, le=1, description="widest stroke, as a share of the shorter side, e.g. 0.12")
    masks: str = Field("masks", description="annotator whose `masks` are the objects to leave out, e.g. masks")
    object: Shares = Field(
        (0.02, 0.4), description="share of the picture that such an object may have, e.g. [0.02, 0.4]"
    )
    grow: Shares = Field((0.01, 0.03), description="rim around it, as a share of the shorter side, e.g. [0.01, 0.03]")
    centre: Shares = Field(
        (0.2, 0.8), description="sides of the part kept for outpainting, as a share of the picture's, e.g. [0.2, 0.8]"
    )


class Damaged:
    """An input picture, the parameters of its damage, and the hole, bool [height, width], if there is one."""

    def __init__(self, picture: Picture, parameters: dict[str, Any], hole: np.ndarray | None = None) -> None:
        self.picture, self.parameters = picture, parameters
        self.mask = None if hole is None else mask_of(hole)


class Restoration(Task):
    """One sample per row and task; none ("nothing_changed") where a damage does not show, as on a picture of one colour.

    Inputs are JPEGs of quality 95, but those with holes, and small ones, which must stay exact, are PNGs. Holes are
    black; their sample has a mask. Rectangles are [x, y, width, height] in pixels. Super-resolution's input is stored at
    its own, small size, unless `enlarged`: every other input is as large as its output.
    """

    name = "restoration"
    version = 2  # samples in which nothing is damaged are left out
    Config = RestorationConfig
    config: RestorationConfig
    words: ClassVar = dict.fromkeys(get_args(Kind), ("image",))

    def __init__(self, config: RestorationConfig) -> None:
        super().__init__(config)
        if config.wording != "own" and config.instructions is None:
            self.instructions = Instructions(self.words, None, "multigen_restoration")

    def task_types(self) -> list[str]:
        return list(self.config.tasks)

    @property
    def reads(self) -> Mapping[str, str]:
        if "inpaint_object" not in self.config.tasks:
            return {}
        name = self.config.masks
        return {f"{name}.{c}": f"{name}: {{kind: masks, boxes: grounding.boxes}}" for c in ("masks", "area")}

    def build(self, row: Selected) -> Iterator[Sample | Skipped]:
        for kind in self.config.tasks:
            rng = row.generator(kind)
            damage: Callable[[Selected, np.random.Generator], Damaged | str] = getattr(self, f"_{kind}")
            made = damage(row, rng)
            if isinstance(made, str):
                yield Skipped(kind, made)
                continue
            instruction = self.instructions.draw(kind, rng)
            yield row.sample(kind, instruction, [made.picture], made.parameters, mask=made.mask)

    def _deblur(self, row: Selected, rng: np.random.Generator) -> Damaged | str:
        kernel = 2 * max(1, round(float(rng.uniform(*self.config.blur)) * _shorter(row))) + 1
        return _jpeg(row, cv2.GaussianBlur(row.pixels, (kernel, kernel), 0), {"kernel": kernel})

    def _motion_deblur(self, row: Selected, rng: np.random.Generator) -> Damaged | str:
        length = round(max(3.0, float(rng.uniform(*self.config.motion)) * _shorter(row)), 2)
        angle = real(rng, (0.0, 180.0), 1)
        return _jpeg(row, _damage.motion_blur(row.pixels, length, angle), {"length": length, "angle": angle})

    def _denoise(self, row: Selected, rng: np.random.Generator) -> Damaged | str:
        if self.config.poisson and rng.random() < self.config.poisson:
            low, high = np.log(self.config.photons)
            peak = round(float(np.exp(rng.uniform(low, high))), 1)
            return _jpeg(row, _damage.poisson_noise(row.pixels, peak, rng), {"photons": peak})
        sigma = real(rng, self.config.noise, 2)
        return _jpeg(row, _damage.gaussian_noise(row.pixels, sigma, rng), {"sigma": sigma})

    def _derain(self, row: Selected, rng: np.random.Generator) -> Damaged | str:
        tilt = real(rng, self.config.tilt, 1)
        layers: list[_damage.Streaks] = []
        for _ in range(whole(rng, self.config.rain_layers)):
            length = round(max(3.0, float(rng.uniform(*self.config.rain_length)) * _shorter(row)), 1)
            layers.append(
                {
                    "length": length,
                    "width": round(max(1.0, length / 20), 2),
                    "cover": real(rng, self.config.rain_cover),
                    "strength": real(rng, self.config.rain_strength),
                }
            )
        return _jpeg(row, _damage.rain(row.pixels, tilt, layers, rng), {"tilt": tilt, "layers": layers})

    def _low_light(self, row: Selected, rng: np.random.Generator) -> Damaged | str:
        config = self.config
        drawn = {
            "gamma": real(rng, config.gamma),
            "gain": real(rng, config.gain),
            "peak": real(rng, config.low_light_photons, 1),
            "read": real(rng, config.read_noise, 2),
        }
        return _jpeg(row, _damage.low_light(row.pixels, **drawn, rng=rng), drawn)

    def _jpeg_artifacts(self, row: Selected, rng: np.random.Generator) -> Damaged | str:
        quality = whole(rng, self.config.jpeg_quality)
        if (row.pixels == row.pixels[0, 0]).all():  # of one colour: no quality leaves a trace
            return "nothing_changed"
        data = encode(row.pixels, "jpg", quality)  # the file itself is the damage
        return Damaged(Picture(data, "jpg", row.picture.width, row.picture.height), {"quality": quality})

    def _super_resolution(self, row: Selected, rng: np.random.Generator) -> Damaged | str:
        most = min(self.config.factor[1], _shorter(row) // self.config.min_small)
        if most < self.config.factor[0]:
            return "too_small"
        factor = whole(rng, (self.config.factor[0], most))
        width, height = row.picture.width, row.picture.height
        small = _damage.smaller(row.pixels, round(width / factor), round(height / factor))
        if self.config.enlarged:
            small = _damage.smaller(small, width, height)
        return Damaged(picture_of(small), {"factor": factor, "enlarged": self.config.enlarged})

    def _colorize(self, row: Selected, rng: np.random.Generator) -> Damaged | str:
        from x2i.pipelines.annotators.quality import colourfulness

        if colourfulness(row.pixels) < self.config.min_colourfulness:
            return "already_grey"
        return Damaged(picture_of(cv2.cvtColor(row.pixels, cv2.COLOR_RGB2GRAY), "jpg"), {})

    def _inpaint(self, row: Selected, rng: np.random.Generator) -> Damaged | str:
        width, height = _sides(row, rng, self.config.hole)
        y = int(rng.integers(0, row.picture.height - height + 1))
        x = int(rng.integers(0, row.picture.width - width + 1))
        box = [x, y, width, height]
        return _with_hole(row, _holes.rectangle(row.size, box), {"hole": box})

    def _inpaint_freeform(self, row: Selected, rng: np.random.Generator) -> Damaged | str:
        strokes = _holes.drawn_strokes(row.size, real(rng, self.config.strokes), self.config.brush, rng)
        hole = _holes.painted_strokes(row.size, strokes)
        return _with_hole(row, hole, {"strokes": strokes, "share": round(float(hole.mean()), 4)})

    def _inpaint_object(self, row: Selected, rng: np.random.Generator) -> Damaged | str:
        codes, areas = (row.value(f"{self.config.masks}.{c}") for c in ("masks", "area"))
        if codes is None or areas is None:
            return "not_annotated"
        least, most = self.config.object
        fits = [i for i, area in enumerate(areas) if least <= area <= most]
        if not fits:
            return "no_fitting_object"
        number = fits[int(rng.integers(len(fits)))]
        grow = round(float(rng.uniform(*self.config.grow)) * _shorter(row))
        hole = grown(decoded(codes[number], row.size), grow)
        return _with_hole(row, hole, {"object": number, "grow": grow, "share": round(float(hole.mean()), 4)})

    def _outpaint(self, row: Selected, rng: np.random.Generator) -> Damaged | str:
        width, height = _sides(row, rng, self.config.centre)
        y, x = (row.picture.height - height) // 2, (row.picture.width - width) // 2
        box = [x, y, width, height]
        return _with_hole(row, ~_holes.rectangle(row.size, box), {"kept": box})


def _jpeg(row: Selected, pixels: np.ndarray, parameters: dict[str, Any]) -> Damaged | str:
    if _same(row.pixels, pixels):
        return "nothing_changed"
    return Damaged(picture_of(pixels, "jpg"), parameters)


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether no eye could tell them apart."""
    return int(cv2.absdiff(one, other).max()) <= 3


def _with_hole(row: Selected, hole: np.ndarray, parameters: dict[str, Any]) -> Damaged | str:
    cut = _holes.cut(row.pixels, hole)
    if _same(row.pixels, cut):
        return "nothing_changed"
    return Damaged(picture_of(cut), parameters, hole)


def _sides(row: Selected, rng: np.random.Generator, share: tuple[float, float]) -> tuple[int, int]:
    """Width and height of a part of the picture."""
    shares = rng.uniform(share[0], share[1], 2)  # the height's first
    height, width = (max(1, round(float(s) * n)) for s, n in zip(shares, row.size[::-1], strict=True))
    return width, height


def _shorter(row: Selected) -> int:
    return min(row.size)
