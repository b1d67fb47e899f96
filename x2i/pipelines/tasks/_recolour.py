"""Colours by their common names, and things made another colour, so that the names hold before and after.

A name is a region of CIELAB (D65) in lightness L, chroma C and hue angle h; see `names_of`. Only the hue is turned,
shading and highlights stay. Whether the new colour deserves its name is measured on the result, never assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

#: Every name, in the order of the numbers that `names_of` gives.
NAMES = (
    "black", "grey", "white", "red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink", "brown",
    "beige",
)  # fmt: skip
#: Those that have no hue to speak of.
COLOURLESS = ("black", "grey", "white", "beige")
#: The hue angle, in degrees, to which each colour is turned; the others are more than a hue.
HUES = {"red": 32.0, "orange": 62.0, "yellow": 95.0, "green": 142.0, "turquoise": 195.0, "blue": 280.0, "purple": 322.0}
#: Pixels of less chroma are grey to the eye.
GREY = 14.0
#: Hues nearer to an object's own than the first are turned whole, beyond the second not at all; degrees.
_NEAR, _FAR = 35.0, 60.0
#: A picture has a colour if more of it has the name than this; and all of a colour is so much of it.
_ABSENT, _MOST = 0.003, 0.85
#: Smaller turns make neighbours of each other, whose names are a matter of taste; degrees.
_LEAST_TURN = 50.0
#: Colours of which half the pixels have less chroma than this are dull, and their names a matter of taste, too.
_VIVID = 33.0
#: `everywhere` asks for more: skin and dry grass have up to this much chroma, and nobody would call them yellow.
_VERY_VIVID = 38.0
#: Share of `everywhere` that one connected patch must have: what is scattered over the picture is nobody's colour.
_TOGETHER = 0.4
_LETTERS = {"gray": "grey", "violet": "purple", "cyan": "turquoise", "teal": "turquoise"}


def _lch(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lightness 0 to 100, chroma, hue angle 0 to 360 of uint8 RGB: float32 [height, width] each."""
    lab = cv2.cvtColor(pixels.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    return lab[..., 0], np.hypot(lab[..., 1], lab[..., 2]), np.degrees(np.arctan2(lab[..., 2], lab[..., 1])) % 360


def names_of(pixels: np.ndarray) -> np.ndarray:
    """The name of each pixel's colour, as its place in `NAMES`: uint8 [height, width]."""
    light, chroma, hue = _lch(pixels)
    dim = light < 27
    rules = [
        ((chroma < GREY) & (light > 82), "white"),
        ((chroma < GREY) & dim | (light < 8), "black"),
        (chroma < GREY, "grey"),
        ((hue >= 45) & (hue < 112) & (chroma < 32) & (light > 65), "beige"),
        (((hue >= 340) | (hue < 20)) & (light > 45), "pink"),
        ((hue >= 20) & (hue < 45) & (light > 64), "pink"),
        ((hue < np.where(light < 48, 48, 42)) & ((chroma > 45) | dim) & (chroma > 30) & (light < 65), "red"),
        ((hue >= 335) & (chroma > 30), "purple"),
        ((hue < 75) & ((light < 55) | (chroma < 35)), "brown"),
        ((hue < 100) & (light < 42), "brown"),
        (hue < 78, "orange"),
        (hue < 112, "yellow"),
        (hue < 172, "green"),
        (hue < 225, "turquoise"),
        ((hue < 304) | (hue < 308) & (chroma > 70) & (light < 45), "blue"),
        ((hue < 340) & (light > 75), "pink"),
    ]
    places = [np.uint8(NAMES.index(name)) for _, name in rules]
    return np.select([rule for rule, _ in rules], places, np.uint8(NAMES.index("purple"))).astype(np.uint8)


def dominant(pixels: np.ndarray, where: np.ndarray) -> tuple[str, float]:
    """The commonest colour name among the pixels of a mask, bool [height, width], and its share.

    Shadows and highlights are black and white on things of every colour: if half the pixels or more are coloured, the
    name and the share are of those alone.
    """
    counts = np.bincount(names_of(pixels)[where], minlength=len(NAMES))
    coloured = np.array([n not in COLOURLESS for n in NAMES])
    if counts[coloured].sum() >= counts.sum() / 2:
        counts = counts * coloured
    best = int(counts.argmax())
    return NAMES[best], float(counts[best] / max(1, counts.sum()))


@dataclass(frozen=True)
class Turned:
    """A picture with a colour turned: `pixels`, by how many degrees, and the share of the object that has the name."""

    pixels: np.ndarray
    degrees: float
    share: float


@dataclass(frozen=True)
class Everywhere(Turned):
    """The same of all that has the colour `name` in a picture: it is `target` now, and was changed in `where` alone."""

    name: str
    target: str
    where: np.ndarray


def turned(pixels: np.ndarray, where: np.ndarray, name: str, target: str, least: float) -> Turned | None:
    """What has the colour `name` within a mask, in the colour `target`.

    Args:
        pixels: uint8 [height, width, 3]. where: bool [height, width]. target: one of `HUES`.
        least: share of the pixels named `name` that must be named `target` afterwards.

    Returns:
        The picture, unchanged outside the mask; None where the result would not deserve the name (a dark orange
        turned to yellow's hue is olive), the old colour is dull, or the two are neighbours.
    """
    light, chroma, hue = _lch(pixels)
    own = where & (names_of(pixels) == NAMES.index(name))
    if not own.any() or np.median(chroma[own]) < _VIVID:
        return None
    mean = _mean_hue(hue[own], chroma[own])
    degrees = round((HUES[target] - mean + 180) % 360 - 180, 1)
    if abs(degrees) < _LEAST_TURN:
        return None
    away = np.abs((hue - mean + 180) % 360 - 180)
    # what is of another hue keeps it, and hardly coloured pixels have a hue by chance
    weight = np.clip((_FAR - away) / (_FAR - _NEAR), 0, 1) * np.clip(chroma / GREY, 0, 1) * where
    some = weight > 0
    angle = np.radians(hue[some] + degrees * weight[some])
    lab = np.stack([light[some], chroma[some] * np.cos(angle), chroma[some] * np.sin(angle)], axis=1)
    made = pixels.copy()
    made[some] = _displayable(lab.astype(np.float32))
    share = float((names_of(made)[own] == NAMES.index(target)).mean())
    return Turned(made, degrees, round(share, 4)) if share >= least else None


def everywhere(pixels: np.ndarray, shares: tuple[float, float], order: Sequence[int]) -> Everywhere | None:
    """All that is of one colour, turned to another that the picture does not have.

    So "make all that is TARGET NAME again" says of the result what there is to do.

    Args:
        shares: least and most of the picture that must have the colour.
        order: numbers that bring the possible pairs of colours into the order in which they are tried.
    """
    names, chroma = names_of(pixels), _lch(pixels)[1]
    there = {n: float((names == NAMES.index(n)).mean()) for n in NAMES}
    vivid = [
        n
        for n in HUES
        if shares[0] <= there[n] <= shares[1] and np.median(chroma[names == NAMES.index(n)]) >= _VERY_VIVID
    ]
    pairs = [(n, t) for n in vivid for t in HUES if there[t] < _ABSENT]
    for _, (name, target) in sorted(zip(order, pairs, strict=False)):
        where = _patches(names == NAMES.index(name))
        sizes = cv2.connectedComponentsWithStats(where.astype(np.uint8))[2][1:, cv2.CC_STAT_AREA]
        if not len(sizes) or sizes.max() < _TOGETHER * sizes.sum():
            continue
        made = turned(pixels, where, name, target, _MOST)
        if made is None:
            continue
        after = names_of(made.pixels)
        left = float((after == NAMES.index(name)).mean())
        came = float((after == NAMES.index(target)).mean())
        if left <= (1 - _MOST) * there[name] and came >= _MOST * there[name]:
            return Everywhere(made.pixels, made.degrees, round(there[name], 4), name, target, where)
    return None


def _patches(where: np.ndarray) -> np.ndarray:
    """A mask without its specks, with a rim, so that no fringe of the old colour stays."""
    unit = max(1, round(min(where.shape) / 256))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * unit + 1, 2 * unit + 1))
    rim = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (4 * unit + 1, 4 * unit + 1))
    closed = cv2.morphologyEx(where.astype(np.uint8), cv2.MORPH_CLOSE, disc)
    return cv2.dilate(cv2.morphologyEx(closed, cv2.MORPH_OPEN, disc), rim) > 0


def _mean_hue(hue: np.ndarray, chroma: np.ndarray) -> float:
    angles = np.radians(hue)
    return float(np.degrees(np.arctan2((chroma * np.sin(angles)).sum(), (chroma * np.cos(angles)).sum())) % 360)


def _displayable(lab_N3: np.ndarray) -> np.ndarray:
    """CIELAB as uint8 RGB; colours that no display has lose chroma until one has, and keep lightness and hue.

    OpenCV cuts what lies beyond 0 to 1, so a colour is displayable if it comes back as it went.
    """
    lab_N13 = lab_N3[:, None].copy()
    beyond = np.arange(len(lab_N13))
    for _ in range(12):
        part = lab_N13[beyond]
        back = cv2.cvtColor(cv2.cvtColor(part, cv2.COLOR_LAB2RGB), cv2.COLOR_RGB2LAB)
        beyond = beyond[np.abs(back - part).max(axis=(1, 2)) > 2]
        if not len(beyond):
            break
        lab_N13[beyond, :, 1:] *= 0.9
    rgb = cv2.cvtColor(lab_N13, cv2.COLOR_LAB2RGB)[:, 0]
    return np.rint(np.clip(rgb, 0, 1) * 255).astype(np.uint8)


def coloured_words(text: str) -> tuple[str, list[str]]:
    """A text without its colour words, and these, as `NAMES` has them: "a dark red car" to "a dark car", [red]."""
    kept, found = [], []
    for word in text.split():
        bare = word.strip(",.;").lower()
        name = _LETTERS.get(bare, bare)
        if name in NAMES:
            found.append(name)
        else:
            kept.append(word)
    return " ".join(kept), found
