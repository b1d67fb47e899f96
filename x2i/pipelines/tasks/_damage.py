"""What spoils pictures: blur, noise, rain, darkness, fewer pixels.

Pictures are uint8 [height, width, 3] in and out. Everything that is drawn but noise itself is an argument, so that a
sample's parameters, with its seed for the noise, give its damage again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

import cv2
import numpy as np
from PIL import Image

#: Rain is lighter than what is behind it, but not white.
_RAIN = 230.0


class Streaks(TypedDict):
    """A layer of rain: near drops are long, wide and few."""

    length: float  # pixels
    width: float  # pixels
    cover: float  # share of the picture that its streaks would cover if none met
    strength: float  # opacity at a streak's middle, 0 to 1


def line_kernel(length: float, angle: float) -> np.ndarray:
    """What a point leaves that moves along a line during the exposure: float32 [n, n], n odd, sum 1.

    Args:
        length: pixels; 1 is no movement.
        angle: degrees, 0 to the right, 90 upwards.
    """
    half = max(0.0, (length - 1) / 2)
    centre = math.ceil(half)
    along = np.linspace(-half, half, max(1, math.ceil(8 * length)))
    x = centre + along * math.cos(math.radians(angle))
    y = centre - along * math.sin(math.radians(angle))
    kernel = np.zeros((2 * centre + 3, 2 * centre + 3))
    left, top = np.floor(x + 1e-9).astype(int), np.floor(y + 1e-9).astype(int)
    for dx in (0, 1):
        for dy in (0, 1):
            share = (1 - np.abs(x - left - dx)).clip(0, 1) * (1 - np.abs(y - top - dy)).clip(0, 1)
            np.add.at(kernel, (top + dy, left + dx), share)
    kernel = kernel[: 2 * centre + 1, : 2 * centre + 1]
    return (kernel / kernel.sum()).astype(np.float32)


def motion_blur(pixels: np.ndarray, length: float, angle: float) -> np.ndarray:
    """Blur by a camera that moves `length` pixels at an even pace; the surroundings are the picture mirrored."""
    return cv2.filter2D(pixels, -1, line_kernel(length, angle), borderType=cv2.BORDER_REFLECT_101)


def gaussian_noise(pixels: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Noise of standard deviation `sigma`, of 255, in every channel by itself."""
    return _bytes(pixels + rng.standard_normal(pixels.shape, np.float32) * np.float32(sigma))


def poisson_noise(pixels: np.ndarray, peak: float, rng: np.random.Generator) -> np.ndarray:
    """Shot noise of a sensor for which white is `peak` photons: at white its deviation is 255 / sqrt(peak)."""
    return _bytes(_shot(pixels * np.float32(peak / 255), rng) * np.float32(255 / peak))


def low_light(
    pixels: np.ndarray, gamma: float, gain: float, peak: float, read: float, rng: np.random.Generator
) -> np.ndarray:
    """An underexposed picture: gain x value^gamma, then shot noise, then read noise.

    Gamma from 2 to 3.5 and shot noise with a peak of 200 are those of MBLLEN (Lv et al. 2018, BMVC, section 4.1).

    Args:
        peak: photons of white. read: standard deviation of the Gaussian noise, of 255.
    """
    dark = np.float32(gain) * (pixels / np.float32(255)) ** np.float32(gamma)
    shot = _shot(dark * np.float32(peak), rng) * np.float32(255 / peak)
    return _bytes(shot + rng.standard_normal(pixels.shape, np.float32) * np.float32(read))


def rain(pixels: np.ndarray, tilt: float, layers: Sequence[Streaks], rng: np.random.Generator) -> np.ndarray:
    """Streaks of rain over the picture: seeds of random brightness, drawn out along the fall, as translucent layers.

    The usual synthesis of the deraining literature (Rain100 and Rain800 were made so with an image editor).

    Args:
        tilt: degrees from the vertical, positive to the left below.
    """
    height, width = pixels.shape[:2]
    out = pixels.astype(np.float32)
    for layer in layers:
        streak = _streak(layer["length"], layer["width"], 90 - tilt)
        margin = streak.shape[0] // 2  # drops that begin outside
        field = rng.random((height + 2 * margin, width + 2 * margin), np.float32)
        rate = layer["cover"] / float(streak.sum())
        # of the field's lowest values, which are the drops, the lower the brighter
        drops = np.where(field < rate, 1 - field / (2 * rate), 0).astype(np.float32)
        falling = cv2.filter2D(drops, -1, streak, borderType=cv2.BORDER_CONSTANT)
        inner = falling[margin : margin + height, margin : margin + width]
        alpha = (layer["strength"] * inner.clip(0, 1))[..., None]
        out += alpha * (_RAIN - out)
    return _bytes(out)


def _streak(length: float, width: float, angle: float) -> np.ndarray:
    """One drop's track, float32, 1 at its brightest: a line, softened across."""
    line = line_kernel(length, angle)
    soft = max(0.3, width / 2.355)  # the width is a Gaussian's at half its height
    pad = math.ceil(2 * soft)
    track = cv2.GaussianBlur(np.pad(line, pad), (0, 0), soft)
    return track / track.max()


def smaller(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Bicubic with antialiasing (a = -0.5, as MATLAB's imresize, which super-resolution's benchmarks use)."""
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def _shot(expected: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Photons that arrive where so many are expected: float32, a few rows at a time, for they come as 64-bit numbers."""
    out = np.empty_like(expected, np.float32)
    for start in range(0, len(expected), 256):
        out[start : start + 256] = rng.poisson(expected[start : start + 256])
    return out


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
