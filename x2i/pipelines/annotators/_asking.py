"""A question to a vision-language model and its answer, whichever backend is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

#: A picture is padded to this shorter side, and to this ratio of its sides at most (Qwen2-VL refuses 200).
LEAST_SIDE, MOST_RATIO = 28, 100


@dataclass(frozen=True)
class Question:
    """One picture and one prompt. `pixels` is uint8 [height, width, 3]; `seed` is for sampling."""

    pixels: np.ndarray
    system: str
    prompt: str
    most_tokens: int
    seed: int


@dataclass(frozen=True)
class Answer:
    """What came back. `reason` says why there is no text (failed); a truncated text hit the limit of tokens."""

    text: str | None
    status: Literal["ok", "truncated", "failed"]
    reason: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0


def presentable(pixels: np.ndarray) -> np.ndarray:
    """The picture, on white if it is so small or so long that processors refuse it; else itself."""
    height, width = pixels.shape[:2]
    least = max(LEAST_SIDE, -(-max(height, width) // MOST_RATIO))
    down, across = max(0, least - height), max(0, least - width)
    if not down and not across:
        return pixels
    return cv2.copyMakeBorder(
        pixels, down // 2, -(-down // 2), across // 2, -(-across // 2), cv2.BORDER_CONSTANT, value=(255, 255, 255)
    )
