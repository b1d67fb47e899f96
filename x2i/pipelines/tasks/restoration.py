"""`restoration`: the picture is the output, a damaged copy of it is the input.

Blur, grey, rectangles and central crops as MultiGen-20M / UniControl have them; noise as in the
denoising literature. Every parameter is drawn from the image's id and stored in the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import cv2
import numpy as np
from pydantic import Field

from x2i.corpus.sample import Sample
from x2i.pipelines.tasks.base import Selected, Skipped, Task, TaskConfig, picture_of

Kind = Literal["deblur", "denoise", "colorize", "inpaint", "outpaint"]


class RestorationConfig(TaskConfig):
    """Which tasks, and the ranges from which their parameters are drawn."""

    tasks: tuple[Kind, ...] = Field(
        ("deblur", "denoise", "colorize", "inpaint", "outpaint"), min_length=1, description="the tasks to make"
    )
    blur: tuple[float, float] = Field((0.01, 0.05), description="Gaussian kernel, as a share of the shorter side")
    noise: tuple[float, float] = Field((10.0, 50.0), description="standard deviation of Gaussian noise, of 255")
    hole: tuple[float, float] = Field(
        (0.2, 0.5), description="sides of the missing rectangle, as a share of the picture's"
    )
    centre: tuple[float, float] = Field((0.2, 0.8), description="sides of the part kept for outpainting, likewise")
    min_colourfulness: float = Field(8.0, ge=0, description="greyer pictures are not worth colouring (Hasler's M3)")


class Restoration(Task):
    """One sample per row and task. Holes are black; their rectangle is [x, y, width, height] in pixels."""

    name = "restoration"
    Config = RestorationConfig
    words = dict.fromkeys(get_args(Kind), ("image",))

    def task_types(self) -> list[str]:
        return list(self.config.tasks)

    def build(self, row: Selected) -> Iterator[Sample | Skipped]:
        for kind in self.config.tasks:
            rng = row.generator(kind)
            damage: Callable[..., Any] = getattr(self, f"_{kind}")
            made = damage(row.pixels, rng)
            if isinstance(made, str):
                yield Skipped(kind, made)
                continue
            pixels, parameters = made
            # a hole must stay exactly black, and its surroundings exact; the rest may be compressed
            picture = picture_of(pixels, "png" if kind in ("inpaint", "outpaint") else "jpg")
            yield row.sample(kind, self.instructions.draw(kind, rng), [picture], parameters)

    def _deblur(self, pixels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
        kernel = 2 * max(1, round(float(rng.uniform(*self.config.blur)) * min(pixels.shape[:2]))) + 1
        return cv2.GaussianBlur(pixels, (kernel, kernel), 0), {"kernel": kernel}

    def _denoise(self, pixels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
        sigma = round(float(rng.uniform(*self.config.noise)), 2)
        noisy = pixels + rng.standard_normal(pixels.shape, np.float32) * np.float32(sigma)
        return np.clip(np.rint(noisy), 0, 255).astype(np.uint8), {"sigma": sigma}

    def _colorize(self, pixels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]] | str:
        from x2i.pipelines.annotators.quality import colourfulness

        if colourfulness(pixels) < self.config.min_colourfulness:
            return "already_grey"
        return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), {}

    def _inpaint(self, pixels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
        x, y, width, height = _rectangle(pixels, rng, self.config.hole)
        out = pixels.copy()
        out[y : y + height, x : x + width] = 0
        return out, {"hole": [x, y, width, height]}

    def _outpaint(self, pixels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
        low, high = self.config.centre
        share = rng.uniform(low, high, 2)
        height, width = (max(1, round(float(s) * n)) for s, n in zip(share, pixels.shape[:2], strict=True))
        y, x = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
        out = np.zeros_like(pixels)
        out[y : y + height, x : x + width] = pixels[y : y + height, x : x + width]
        return out, {"kept": [x, y, width, height]}


def _rectangle(pixels: np.ndarray, rng: np.random.Generator, share: tuple[float, float]) -> tuple[int, int, int, int]:
    sides = rng.uniform(share[0], share[1], 2)
    height, width = (max(1, round(float(s) * n)) for s, n in zip(sides, pixels.shape[:2], strict=True))
    y = int(rng.integers(0, pixels.shape[0] - height + 1))
    x = int(rng.integers(0, pixels.shape[1] - width + 1))
    return x, y, width, height
