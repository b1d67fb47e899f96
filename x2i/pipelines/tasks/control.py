"""`control`: a map of the picture is the input, the picture is the output (MultiGen-20M, UniControl)."""

from collections.abc import Iterator
from typing import ClassVar

import cv2
from pydantic import Field, model_validator

from x2i.corpus.sample import Sample
from x2i.pipelines.tasks.base import Selected, Skipped, Task, TaskConfig, holds_placeholder, picture_of


class ControlConfig(TaskConfig):
    """Ranges from which the thresholds are drawn, per picture (cv2.Canny's units, L1 gradient of 8-bit luma)."""

    low: tuple[int, int] = Field((50, 120), description="range of the lower hysteresis threshold")
    high: tuple[int, int] = Field((130, 250), description="range of the upper one")
    min_edges: float = Field(0.002, ge=0, lt=1, description="maps with a smaller share of edge pixels make no sample")

    @model_validator(mode="after")
    def _ordered(self) -> "ControlConfig":
        if not (0 < self.low[0] <= self.low[1] <= self.high[0] <= self.high[1]):
            raise ValueError("thresholds must satisfy 0 < low[0] <= low[1] <= high[0] <= high[1]")
        return self


class Control(Task):
    """`canny_to_image`: cv2.Canny with thresholds drawn from the image's id, stored in the sample."""

    name = "control"
    Config = ControlConfig
    words: ClassVar = {"canny_to_image": ("image", "text"), "canny_to_image.bare": ("image",)}

    def task_types(self) -> list[str]:
        return ["canny_to_image"]

    def build(self, row: Selected) -> Iterator[Sample | Skipped]:
        if holds_placeholder(row.text):
            yield Skipped("canny_to_image", "text_has_placeholders")
            return
        rng = row.generator("canny_to_image")
        low = int(rng.integers(self.config.low[0], self.config.low[1] + 1))
        high = int(rng.integers(self.config.high[0], self.config.high[1] + 1))
        edges = cv2.Canny(cv2.cvtColor(row.pixels, cv2.COLOR_RGB2GRAY), low, high)
        if (edges > 0).mean() < self.config.min_edges:
            yield Skipped("canny_to_image", "too_few_edges")
            return
        key = "canny_to_image" if row.text else "canny_to_image.bare"
        yield row.sample(
            "canny_to_image",
            self.instructions.draw(key, rng, text=row.text or ""),
            [picture_of(edges)],
            {"low": low, "high": high},
        )
