"""Control maps as MultiGen-20M and ControlNet have them, drawn from what the annotators found.

All take and give arrays, and draw nothing at random. Sizes are (width, height) in pixels. Recipes and constants:
salesforce/UniControl (arXiv 2305.11147) and lllyasviel/ControlNet (arXiv 2302.05543).
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from x2i.base.seeds import digest
from x2i.pipelines.annotators._palette import palette
from x2i.pipelines.boxes import pixel_box

#: OpenPose's 18 parts are numbered as in `annotators._openpose.PARTS`; limbs in the order in which they are drawn.
LIMBS = (
    (1, 2),
    (1, 5),
    (2, 3),
    (3, 4),
    (5, 6),
    (6, 7),
    (1, 8),
    (8, 9),
    (9, 10),
    (1, 11),
    (11, 12),
    (12, 13),
    (1, 0),
    (0, 14),
    (14, 16),
    (0, 15),
    (15, 17),
)
#: Where OpenPose's parts are among COCO's 17; the neck (None) lies between the shoulders.
_FROM_COCO17 = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
#: Stick width and joint radius: 4 pixels where the shorter side has 512.
_STICK = 4 / 512
_OPAQUE = 0.6
#: How many colours boxes may have.
_COLOURS = 64
#: Metres: nearer things would fill an inverse depth map alone.
_NEAREST = 0.1


def stored(data: bytes) -> np.ndarray:
    """A map as an annotator stored it: [height, width], uint8 or uint16."""
    return np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED))


def sized(values: np.ndarray, size: tuple[int, int], labels: bool = False) -> np.ndarray:
    """A map at another size: by area when it shrinks, else linear; labels take their nearest neighbour."""
    if values.shape[1::-1] == size:
        return values
    shrinks = size[0] * size[1] < values.shape[0] * values.shape[1]
    how = cv2.INTER_NEAREST_EXACT if labels else cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(values, size, interpolation=how)


def canny(pixels: np.ndarray, low: int, high: int) -> np.ndarray:
    """Canny edges of the luma of uint8 [height, width, 3]: uint8 [height, width] of 0 and 255."""
    return cv2.Canny(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), low, high)


def sketch(hed: np.ndarray, threshold: int) -> np.ndarray:
    """Dark lines on white where an edge map, uint8 [height, width], reaches the threshold; a 3x3 Gaussian softens them."""
    lines = np.where(hed >= threshold, 0, 255).astype(np.uint8)
    return cv2.GaussianBlur(lines, (3, 3), 0)


def inverse_depth(stored_map: np.ndarray, minimum: float, maximum: float, near_is: str) -> np.ndarray:
    """Inverse depth, float32 [height, width], from the annotator's map; up to scale and shift, as relative models say it.

    Args:
        stored_map: uint16; 0 stands for `minimum`, 65535 for `maximum`, in the model's unit.
        near_is: "white", or "black" where the unit is metres.
    """
    raw = np.float32(minimum) + stored_map.astype(np.float32) / 65535 * np.float32(maximum - minimum)
    return raw if near_is == "white" else 1 / np.maximum(raw, np.float32(_NEAREST))


def depth(inverse: np.ndarray) -> np.ndarray:
    """Inverse depth stretched to 0 … 255, near is white: float [height, width] to uint8."""
    return (_stretched(inverse) * 255).clip(0, 255).astype(np.uint8)


def normals(inverse: np.ndarray, a: float, background: float, size: tuple[int, int]) -> np.ndarray:
    """Surface normals as colours: uint8 [height, width, 3]; red, green and blue are x, y and z from -1 to 1.

    The gradient is Sobel's (3x3) of inverse depth in the model's unit and at the map's own size, z is `a`; where depth,
    stretched to 0 … 1, is below `background` the surface faces us. Smaller `a`, stronger relief.
    """
    x, y = (cv2.Sobel(inverse, cv2.CV_32F, dx, 1 - dx, ksize=3) for dx in (1, 0))
    far = _stretched(inverse) < background
    x[far], y[far] = 0, 0
    vectors_HW3 = np.stack([x, y, np.full_like(x, a)], axis=2)
    vectors_HW3 = sized(vectors_HW3 / np.linalg.norm(vectors_HW3, axis=2, keepdims=True), size)
    vectors_HW3 = vectors_HW3 / np.linalg.norm(vectors_HW3, axis=2, keepdims=True)
    return (vectors_HW3 * 127.5 + 127.5).clip(0, 255).astype(np.uint8)


def _stretched(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / max(float(np.ptp(values)), 1e-12)


def joints(person: Mapping[str, Any], layout: str) -> list[tuple[float, float] | None]:
    """OpenPose's 18 joints of a person of the annotator `pose`, as shares of width and height; None: not found.

    Args:
        layout: "coco18", or "coco17", which has no neck.
    """
    found = [(k["x"], k["y"]) if k["score"] > 0 and k["x"] is not None else None for k in person["keypoints"]]
    if layout == "coco18":
        return found
    out = [None if i is None else found[i] for i in _FROM_COCO17]
    right, left = out[2], out[5]
    if right is not None and left is not None:
        out[1] = ((right[0] + left[0]) / 2, (right[1] + left[1]) / 2)
    return out


def part_colours() -> list[tuple[int, int, int]]:
    """The colours of OpenPose's 18 parts, and of its limbs: 18 hues, 20 degrees apart, from red."""
    hues = (colorsys.hsv_to_rgb(i / 18, 1, 1) for i in range(18))
    return [(int(r * 255 + 1e-6), int(g * 255 + 1e-6), int(b * 255 + 1e-6)) for r, g, b in hues]


def skeletons(people: Sequence[Sequence[tuple[float, float] | None]], size: tuple[int, int]) -> np.ndarray:
    """People in OpenPose's colours on black: joints as discs, then limbs as ellipses that cover to 60 %.

    Args:
        people: 18 joints each, as shares.

    Returns:
        uint8 [height, width, 3], RGB.
    """
    width, height = size
    canvas = np.zeros((height, width, 3), np.uint8)
    stick = max(1, round(_STICK * min(size)))
    colours = part_colours()
    places = [[None if j is None else np.array([j[0] * width, j[1] * height]) for j in person] for person in people]
    for part, colour in enumerate(colours):
        for person in places:
            place = person[part]
            if place is not None:
                cv2.circle(canvas, _point(place), stick, colour, -1)
    for (start, end), colour in zip(LIMBS, colours, strict=False):
        for person in places:
            a, b = person[start], person[end]
            if a is None or b is None:
                continue
            along = b - a
            axes = (int(np.hypot(*along) / 2), stick)
            outline = cv2.ellipse2Poly(
                _point((a + b) / 2), axes, int(np.degrees(np.arctan2(along[1], along[0]))), 0, 360, 1
            )
            covered = np.zeros((height, width), np.uint8)
            cv2.fillConvexPoly(covered, np.array(outline), 1)
            there = covered > 0
            canvas[there] = np.rint((1 - _OPAQUE) * canvas[there] + _OPAQUE * np.array(colour)).astype(np.uint8)
    return canvas


def _point(place: np.ndarray) -> tuple[int, int]:
    return int(place[0]), int(place[1])


def phrase_colours(phrases: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """A colour for each phrase. A phrase has its own everywhere, unless another of the same picture has it."""
    table = palette("hues", _COLOURS)
    out: dict[str, tuple[int, int, int]] = {}
    taken: set[int] = set()
    for phrase in sorted(set(phrases)):
        place = int(digest("colour/1", phrase.lower())[:8], 16) % _COLOURS
        while place in taken and len(taken) < _COLOURS:
            place = (place + 1) % _COLOURS
        taken.add(place)
        r, g, b = table[place].tolist()
        out[phrase] = (r, g, b)
    return out


def painted_boxes(
    boxes: Sequence[Sequence[float]], colours: Sequence[tuple[int, int, int]], size: tuple[int, int]
) -> np.ndarray:
    """Filled boxes on black, the largest first, so that small ones stay in sight: uint8 [height, width, 3].

    Args:
        boxes: x1, y1, x2, y2 as shares. colours: one for each.
    """
    width, height = size
    canvas = np.zeros((height, width, 3), np.uint8)
    by_area = sorted(range(len(boxes)), key=lambda i: (boxes[i][0] - boxes[i][2]) * (boxes[i][3] - boxes[i][1]))
    for i in by_area:
        x1, y1, x2, y2 = pixel_box(boxes[i], size)
        canvas[y1:y2, x1:x2] = colours[i]
    return canvas


def hex_colour(colour: Sequence[int]) -> str:
    """#rrggbb."""
    return "#" + "".join(f"{c:02x}" for c in colour)
