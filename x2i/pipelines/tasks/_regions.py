"""What a picture's regions are: boxes with phrases, their masks, and pictures cut out along them.

Boxes are x1, y1, x2, y2 as shares of width and height, masks bool [height, width], pictures uint8 [height, width, 3].
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from x2i.pipelines.images import resize
from x2i.pipelines.tasks._holes import decoded
from x2i.pipelines.tasks._maps import pixel_box
from x2i.pipelines.tasks.base import Selected

Box = tuple[float, float, float, float]

#: How near a picture's edge (a share of the side) a box touches it.
_TOUCH = 0.005
_WORDS = """i you he she it we they me him her us them this that these those who whom whose which what one ones other
others another all both each some someone somebody something anyone anything everyone everything nobody nothing himself
herself itself themselves photo photos photograph photographs picture pictures image images shot view views scene scenes
illustration background foreground front back side sides top bottom left right middle center centre edge end part way
time day night moment love freedom life idea fun style use kind sort type number lot couple"""
#: Last words of phrases that name nothing that a box could hold: pronouns, pictures, places in them, abstract things.
VAGUE = tuple(_WORDS.split())
#: First words of phrases that only a sentence's beginning makes large.
_FIRST = "a an the this that these those my your his her its our their some several many few two three four"


@dataclass(frozen=True)
class Region:
    """One box of a row: its place in its column, what it holds, how sure that is, and its mask if there is one.

    `span` are the characters [start, end) of the row's text that it stands for. `code` is a COCO run-length code,
    `quality` the mask's predicted IoU.
    """

    index: int
    box: Box
    phrase: str
    score: float = 1.0
    span: tuple[int, int] | None = None
    code: Mapping[str, Any] | None = None
    quality: float | None = None

    def mask(self, size: tuple[int, int]) -> np.ndarray | None:
        """Its mask in a picture of size (width, height)."""
        return None if self.code is None else decoded(self.code, size)


def told(row: Selected, column: str) -> Any:
    """A value by its column's name; `rows.meta.KEY` is what the source says of the row."""
    kept = column.removeprefix("rows.meta.")
    return row.meta.get(kept) if kept != column else row.value(column)


def regions(
    row: Selected, boxes: str, name: str | None = None, masks: str | None = None, text: str | None = None
) -> list[Region] | None:
    """The boxes of a row; None where its annotators did not see it.

    Args:
        boxes: a column of boxes, of structs that have a `box` and a `score`, or of GRIT's [start, end, x1, y1, x2, y2,
            score] with characters of `text`. The `scores` and `phrases` beside boxes are theirs.
        name: what all boxes hold; None: their phrases.
        masks: annotator (`masks`) of these boxes' masks; boxes of which it has none go without.
        text: the text that GRIT's spans are of.
    """
    given = told(row, boxes)
    if given is None:
        return None
    beside = boxes.rpartition(".")[0]
    of_source = boxes.startswith("rows.")
    scores, phrases = (None, None) if of_source else (row.value(f"{beside}.{c}") for c in ("scores", "phrases"))
    codes = _codes(row, masks) if masks is not None else {}
    if codes is None:
        return None
    out = []
    for i, entry in enumerate(given if isinstance(given, list) else []):
        there = place(entry)
        if there is None:
            continue  # a source may say anything
        box, score, span = there
        said = phrases[i] if phrases else ""
        if name is not None:
            said = name
        elif span is not None:
            said = (text or "")[slice(*span)]
        score = float(scores[i]) if scores else score
        out.append(Region(i, box, str(said).strip(), score, span, *codes.get(i, (None, None))))
    return out


def place(entry: Any) -> tuple[Box, float, tuple[int, int] | None] | None:
    """A box, its score and its characters: of [x1, y1, x2, y2], of a struct with `box` and `score`, or of GRIT's lists.

    Returns:
        None where an entry, which may be anything, is none of these.
    """
    values = entry.get("box") if isinstance(entry, Mapping) else entry
    if not isinstance(values, list | tuple) or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
        return None
    span, score = None, entry.get("score") if isinstance(entry, Mapping) else 1.0
    if len(values) == 7:
        start, end, *values, score = values
        span = int(start), int(end)
    if len(values) != 4 or not isinstance(score, int | float) or not math.isfinite(score):
        return None
    x1, y1, x2, y2 = (min(1.0, max(0.0, float(v))) for v in values)
    return (x1, y1, x2, y2), float(score), span


def _codes(row: Selected, masks: str) -> dict[int, tuple[Any, float]] | None:
    """A row's masks by the number of their box."""
    codes, indices, qualities = (row.value(f"{masks}.{c}") for c in ("masks", "box_index", "predicted_iou"))
    if codes is None or indices is None:
        return None
    numbered = zip(indices, codes, qualities, strict=True)
    return {i: (code, float(quality)) for i, code, quality in numbered if i is not None}


def area(box: Sequence[float]) -> float:
    """A box's share of the picture."""
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def nested(first: Sequence[float], second: Sequence[float]) -> float:
    """The share of the smaller of two boxes that lies in the other."""
    left, top = max(first[0], second[0]), max(first[1], second[1])
    both = area((left, top, min(first[2], second[2]), min(first[3], second[3])))
    return both / max(min(area(first), area(second)), 1e-9)


def apart(found: Iterable[Region], most: float) -> list[Region]:
    """Without those that lie in a surer one by a larger share than `most`; the surest first."""
    kept: list[Region] = []
    for region in sorted(found, key=lambda r: (-r.score, r.index)):
        if all(nested(region.box, other.box) <= most for other in kept):
            kept.append(region)
    return kept


def edges(box: Sequence[float]) -> int:
    """How many of the picture's four edges a box touches."""
    return sum(v <= _TOUCH for v in box[:2]) + sum(v >= 1 - _TOUCH for v in box[2:])


def is_vague(phrase: str, words: Collection[str] = VAGUE) -> bool:
    """Whether a noun phrase (whose head is its last word, as in English) names nothing that can be pointed at."""
    said = "".join(c if c.isalnum() else " " for c in phrase.lower()).split()
    return not said or said[-1] in words


def inside(phrase: str) -> str:
    """A phrase as it stands within a sentence: `a cat` for `A cat`; names keep their capitals."""
    first = phrase.partition(" ")[0]
    return first.lower() + phrase[len(first) :] if first.lower() in _FIRST.split() else phrase


def painted(pixels: np.ndarray, mask: np.ndarray, colour: Sequence[int], alpha: float) -> np.ndarray:
    """The picture with the mask in a colour (RGB), of which `alpha` is the opacity; all else keeps its value."""
    out = pixels.copy()
    out[mask] = np.rint(alpha * np.array(colour, np.float64) + (1 - alpha) * pixels[mask]).astype(np.uint8)
    return out


def cut_out(
    pixels: np.ndarray, box: Sequence[float], mask: np.ndarray | None, margin: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """A region of a picture: on white, if there is a mask; else the rectangle.

    Args:
        mask: what of the picture is the subject; what lies outside the box and its margin is left out.
        margin: room around the subject, as a share of its longer side; of a rectangle only as far as the picture goes.

    Returns:
        The cut-out, and where the subject is in it (everywhere in a rectangle); None where the mask has nothing there.
    """
    height, width = pixels.shape[:2]
    x1, y1, x2, y2 = pixel_box(box, (width, height))
    room = round(margin * max(x2 - x1, y2 - y1))
    left, top, right, bottom = max(0, x1 - room), max(0, y1 - room), min(width, x2 + room), min(height, y2 + room)
    inner = pixels[top:bottom, left:right]
    if mask is None:
        return inner.copy(), np.ones(inner.shape[:2], bool)
    part = np.ascontiguousarray(mask[top:bottom, left:right])
    if not part.any():
        return None
    x, y, w, h = cv2.boundingRect(part.astype(np.uint8))
    room = round(margin * max(w, h))
    there = np.pad(part[y : y + h, x : x + w], room)
    out = np.pad(inner[y : y + h, x : x + w], ((room, room), (room, room), (0, 0)))
    out[~there] = 255
    return out, there


def bounded(pixels: np.ndarray, side: int) -> np.ndarray:
    """Shrunk so that the longer side is no more than `side` pixels."""
    height, width = pixels.shape[:2]
    scale = min(1.0, side / max(height, width))
    return resize(pixels, max(1, round(width * scale)), max(1, round(height * scale)))
