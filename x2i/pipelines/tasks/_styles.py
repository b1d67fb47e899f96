"""Filters that change a whole picture, named for what they look like: sepia, pencil, cartoon, pixels …

All take uint8 [height, width, 3] RGB and give the same, draw nothing at random but grain (by a seed that is told), and
measure lengths in shares of the shorter side, so that a picture looks alike at every size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from x2i.pipelines.ranges import real

#: Photoshop's and the W3C's sepia (CSS filter effects, "sepia"): rows are the new red, green and blue.
_SEPIA = np.array([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]], np.float32)
#: Dark and light ends of two-coloured prints.
_INKS = (
    ((24, 28, 92), (255, 222, 173)),
    ((60, 12, 70), (255, 178, 102)),
    ((8, 60, 64), (250, 240, 200)),
    ((90, 10, 30), (170, 225, 240)),
)


def sepia(pixels: np.ndarray, strength: float) -> np.ndarray:
    """Brown tones, mixed with the picture's own colours where strength is below 1."""
    toned = pixels.astype(np.float32) @ _SEPIA.T
    return _bytes(pixels + strength * (toned - pixels))


def black_and_white(pixels: np.ndarray, contrast: float) -> np.ndarray:
    """The luma, its distance to the middle times `contrast`."""
    luma = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return _rgb(_bytes((luma - 127.5) * contrast + 127.5))


def negative(pixels: np.ndarray) -> np.ndarray:
    """255 less every value."""
    return 255 - pixels


def posterise(pixels: np.ndarray, levels: float) -> np.ndarray:
    """So many evenly spaced values in each channel, of a picture whose fine grain is smoothed away."""
    steps = round(levels) - 1
    smooth = cv2.bilateralFilter(pixels, _length(pixels, 0.012, odd=True), 40, 5)
    return _bytes(np.rint(smooth.astype(np.float32) / 255 * steps) * (255 / steps))


def duotone(pixels: np.ndarray, inks: float) -> np.ndarray:
    """Luma between two inks."""
    dark, light = (np.array(c, np.float32) for c in _INKS[int(inks)])
    luma = cv2.equalizeHist(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[..., None].astype(np.float32) / 255
    return _bytes(dark + luma * (light - dark))


def vintage(pixels: np.ndarray, fade: float, grain: float, seed: float) -> np.ndarray:
    """An old print: faded blacks, a yellow cast, dim corners, grain (standard deviation of 255)."""
    values = pixels.astype(np.float32)
    grey = values.mean(axis=2, keepdims=True)
    values = grey + 0.6 * (values - grey)
    values = values * (1 - fade) + 255 * 0.5 * fade
    values *= np.array([1.08, 1.0, 0.78], np.float32)
    values *= _corners(pixels, 0.35)[..., None]
    noise = np.random.Generator(np.random.PCG64(int(seed))).standard_normal(pixels.shape[:2], np.float32)
    return _bytes(values + grain * noise[..., None])


def dark_corners(pixels: np.ndarray, strength: float) -> np.ndarray:
    """A vignette: corners lose this share of their light."""
    return _bytes(pixels * _corners(pixels, strength)[..., None])


def pixelate(pixels: np.ndarray, block: float) -> np.ndarray:
    """Squares of one colour, their mean; `block` is a side."""
    height, width = pixels.shape[:2]
    side = max(2, round(block * min(height, width)))
    small = cv2.resize(
        pixels, (max(1, round(width / side)), max(1, round(height / side))), interpolation=cv2.INTER_AREA
    )
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def halftone(pixels: np.ndarray, cell: float) -> np.ndarray:
    """Black dots on white, in a grid turned by 45 degrees; the darker, the larger (a newspaper's print)."""
    height, width = pixels.shape[:2]
    side = max(4.0, cell * min(height, width))
    luma = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
    luma = np.asarray(cv2.GaussianBlur(luma, (0, 0), side / 3))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    u, v = (x + y) * (np.pi / side / 2**0.5), (x - y) * (np.pi / side / 2**0.5)
    screen = 0.5 + 0.25 * (np.cos(u) + np.cos(v))  # 0 … 1, highest in the middle of a cell
    # a screen's values are not spread evenly: by their ranks a tone covers its own share of the paper
    rank = (
        np.searchsorted(np.sort(screen[:: max(1, height // 256)].ravel()), screen)
        / screen[:: max(1, height // 256)].size
    )
    return _rgb(_bytes((luma - (1 - rank)) * side * 1.5 * 255 + 127.5))


def pencil_sketch(pixels: np.ndarray, reach: float, strength: float) -> np.ndarray:
    """Grey pencil on white: the luma dodged by its own blurred negative; strength darkens the lines."""
    return _rgb(_bytes(255 * _dodged(pixels, reach) ** strength))


def colour_pencil(pixels: np.ndarray, reach: float, strength: float) -> np.ndarray:
    """The same lines, and pale colours of the picture."""
    lab = cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB).astype(np.float32)
    lines = 255 * _dodged(pixels, reach) ** strength
    lab[..., 0] = 0.75 * lines + 0.25 * lab[..., 0]
    lab[..., 1:] = 128 + 0.8 * (lab[..., 1:] - 128)
    return cv2.cvtColor(_bytes(lab), cv2.COLOR_LAB2RGB)


def _dodged(pixels: np.ndarray, reach: float) -> np.ndarray:
    """White where the luma is even, dark at what is darker than its neighbourhood: float32 0 to 1."""
    luma = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float32)
    around = cv2.GaussianBlur(luma, (0, 0), reach * min(luma.shape))
    return np.minimum(luma / np.maximum(around, 1), 1)


def line_drawing(pixels: np.ndarray, reach: float, keep: float) -> np.ndarray:
    """A few dark lines on white: OpenCV's pencilSketch (Gastal and Oliveira 2011, domain transform) of a smoothed copy."""
    flat = _bgr(_flat(pixels, reach, keep))
    return _rgb(cv2.pencilSketch(flat, sigma_s=reach, sigma_r=0.07, shade_factor=0.1)[0])


def charcoal(pixels: np.ndarray, reach: float, grain: float, seed: float) -> np.ndarray:
    """Soft dark tones and lines with the grain of rough paper."""
    flat = _flat(pixels, 40, 0.4)
    luma = cv2.cvtColor(flat, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
    tone = _dodged(flat, reach) ** 2.5 * (0.35 + 0.65 * np.sqrt(luma))
    noise = np.random.Generator(np.random.PCG64(int(seed))).standard_normal(luma.shape, np.float32)
    noise = np.asarray(cv2.GaussianBlur(noise, (0, 0), max(0.6, min(luma.shape) / 640)))
    return _rgb(_bytes(255 * (tone + grain * noise * (1 - tone) + 0.02)))


def _flat(pixels: np.ndarray, reach: float, keep: float) -> np.ndarray:
    """Without fine texture, by OpenCV's edge-preserving filter (the same paper)."""
    return np.asarray(cv2.edgePreservingFilter(pixels, flags=cv2.RECURS_FILTER, sigma_s=reach, sigma_r=keep))


def watercolour(pixels: np.ndarray, reach: float, keep: float) -> np.ndarray:
    """Pale, flat areas with darker rims."""
    flat = _flat(pixels, reach, keep)
    luma = cv2.cvtColor(flat, cv2.COLOR_RGB2GRAY).astype(np.float32)
    unit = min(luma.shape) / 512
    rims = np.abs(cv2.GaussianBlur(luma, (0, 0), unit) - cv2.GaussianBlur(luma, (0, 0), 4 * unit))
    light = 255 * (flat.astype(np.float32) / 255) ** 0.75
    return _bytes(light * (1 - np.clip(rims / 60, 0, 0.5))[..., None])


def cartoon(pixels: np.ndarray, levels: float, line: float) -> np.ndarray:
    """Smoothed areas in few tones, with black lines where the luma changes (bilateral filter, adaptive threshold)."""
    height, width = pixels.shape[:2]
    scale = min(1.0, 512 / min(height, width))
    small = cv2.resize(pixels, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
    for _ in range(4):
        small = cv2.bilateralFilter(small, 9, 30, 7)
    smooth = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
    hsv = cv2.cvtColor(smooth, cv2.COLOR_RGB2HSV).astype(np.float32)
    step = 255 / (round(levels) - 1)
    hsv[..., 2] = np.rint(hsv[..., 2] / step) * step
    hsv[..., 1] = np.minimum(255, hsv[..., 1] * 1.25)
    flat = cv2.cvtColor(_bytes(hsv), cv2.COLOR_HSV2RGB)
    block = _length(pixels, line, odd=True)
    luma = cv2.medianBlur(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), 7)
    lines = cv2.adaptiveThreshold(luma, 255, cv2.ADAPTIVE_THRESH_MEAN_C, cv2.THRESH_BINARY, max(3, block), 6)
    return np.where(lines[..., None] > 0, flat, flat // 5)


def oil_painting(pixels: np.ndarray, brush: float) -> np.ndarray:
    """Strokes like oil paint: each pixel takes the mean of the calmest of the four squares beside it (Kuwahara 1976)."""
    size = _length(pixels, brush, odd=False)
    values = pixels.astype(np.float32)
    luma = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float32)
    best = np.full(luma.shape, np.inf, np.float32)
    out = values.copy()
    for anchor in ((0, 0), (size, 0), (0, size), (size, size)):
        box: dict[str, Any] = {"ksize": (size + 1, size + 1), "anchor": anchor, "borderType": cv2.BORDER_REFLECT_101}
        mean, mean_square = cv2.blur(luma, **box), cv2.blur(luma * luma, **box)
        spread = mean_square - mean * mean
        calmer = spread < best
        best = np.where(calmer, spread, best)
        out = np.where(calmer[..., None], cv2.blur(values, **box), out)
    return _bytes(out)


@dataclass(frozen=True)
class Style:
    """A filter, and the ranges from which its parameters are drawn. `colour`: it is told by the colours that go."""

    apply: Callable[..., np.ndarray]
    ranges: dict[str, tuple[float, float]]
    colour: bool = False

    def parameters(self, rng: np.random.Generator) -> dict[str, float]:
        """Drawn parameters, as they are stored."""
        return {name: real(rng, ends, 3) for name, ends in self.ranges.items()}


STYLES: dict[str, Style] = {
    "sepia": Style(sepia, {"strength": (0.85, 1.0)}, colour=True),
    "black_and_white": Style(black_and_white, {"contrast": (1.0, 1.2)}, colour=True),
    "negative": Style(negative, {}),
    "posterise": Style(posterise, {"levels": (2.6, 5.4)}),
    "duotone": Style(duotone, {"inks": (0, len(_INKS) - 0.01)}, colour=True),
    "vintage": Style(vintage, {"fade": (0.2, 0.4), "grain": (4, 10), "seed": (0, 1e6)}, colour=True),
    "dark_corners": Style(dark_corners, {"strength": (0.6, 0.9)}),
    "pixelate": Style(pixelate, {"block": (0.015, 0.04)}),
    "halftone": Style(halftone, {"cell": (0.006, 0.011)}),
    "pencil_sketch": Style(pencil_sketch, {"reach": (0.008, 0.02), "strength": (1.8, 3.0)}),
    "colour_pencil": Style(colour_pencil, {"reach": (0.008, 0.02), "strength": (1.8, 3.0)}),
    "line_drawing": Style(line_drawing, {"reach": (30, 60), "keep": (0.3, 0.5)}),
    "charcoal": Style(charcoal, {"reach": (0.02, 0.04), "grain": (0.12, 0.25), "seed": (0, 1e6)}),
    "watercolour": Style(watercolour, {"reach": (40, 80), "keep": (0.3, 0.5)}),
    "cartoon": Style(cartoon, {"levels": (5, 9), "line": (0.01, 0.02)}),
    "oil_painting": Style(oil_painting, {"brush": (0.008, 0.018)}),
}


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.rint(values).clip(0, 255).astype(np.uint8)


def _rgb(grey: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)


def _bgr(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels[..., ::-1])


def _length(pixels: np.ndarray, share: float, odd: bool) -> int:
    """A share of the shorter side in pixels, at least 2 (3 if it must be odd)."""
    length = max(2, round(share * min(pixels.shape[:2])))
    return length // 2 * 2 + 1 if odd else length


def _corners(pixels: np.ndarray, strength: float) -> np.ndarray:
    """A factor for each pixel, float32 [height, width]: 1 in the middle, 1 - strength in the corners."""
    height, width = pixels.shape[:2]
    y, x = np.ogrid[:height, :width]
    distance = ((x - width / 2) / width) ** 2 + ((y - height / 2) / height) ** 2  # 0.5 in the corners
    return (1 - strength * np.clip(distance * 2, 0, 1) ** 1.2).astype(np.float32)
