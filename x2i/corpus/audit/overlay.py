"""Boxes and joints over a picture, as inline SVG: sharp at any size, with their names, in the page's own colours."""

from __future__ import annotations

import unicodedata
from itertools import pairwise

from markupsafe import Markup

from x2i.corpus.audit.seen import Look, Mark, Point

#: The page shows pictures within a box of 4 : 3. In units of the drawing it is so large, whatever the picture's shape.
WIDTH, HEIGHT = 320, 240
#: Height of a name's chip.
CHIP = 16.0
#: Colours take turns: the classes c0 … c5 of report.css.
COLOURS = 6

#: Joints that a bone connects: OpenPose's 18 (arms and legs from the neck), COCO's 17.
BONES: dict[str, tuple[tuple[int, int], ...]] = {
    "coco18": (
        *pairwise((1, 2, 3, 4)),
        *pairwise((1, 5, 6, 7)),
        *pairwise((1, 8, 9, 10)),
        *pairwise((1, 11, 12, 13)),
        *pairwise((1, 0, 14, 16)),
        *pairwise((0, 15, 17)),
    ),
    "coco17": (
        *pairwise((9, 7, 5, 6, 8, 10)),
        *pairwise((15, 13, 11, 12, 14, 16)),
        (5, 11),
        (6, 12),
        *pairwise((3, 1, 0, 2, 4)),
    ),
}


def colour(look: Look, number: int) -> int:
    """The colour of a mark: one for each label, or one for each mark where they have none or all the same."""
    labels = list(dict.fromkeys(m.label for m in look.marks))
    return (labels.index(look.marks[number].label) if len(labels) > 1 else number) % COLOURS


def overlay(look: Look) -> Markup:
    """The drawing over a picture that is shown `object-fit: contain`; nothing where its size is unknown."""
    width, height = look.row["width"], look.row["height"]
    if not width or not height or not any(m.box or m.joints for m in look.marks):
        return Markup()
    scale = min(WIDTH / width, HEIGHT / height)
    size = (width * scale, height * scale)
    bones = BONES.get(look.layout or "", ())
    drawn = [_mark(m, colour(look, i), size, bones) for i, m in enumerate(look.marks)]
    several = len(look.marks) > 1
    drawn += [_chip(m, i + 1 if several else None, colour(look, i), size) for i, m in enumerate(look.marks)]
    return Markup(
        '<svg class="marks" viewBox="0 0 {:.1f} {:.1f}" aria-hidden="true" focusable="false">{}</svg>'
    ).format(*size, Markup("").join(drawn))


def _mark(mark: Mark, colour: int, size: tuple[float, float], bones: tuple[tuple[int, int], ...]) -> Markup:
    parts = []
    # a person's box says nothing that the joints do not
    if mark.box is not None and not mark.joints:
        (x1, y1), (x2, y2) = _place(mark.box[:2], size), _place(mark.box[2:], size)
        shape = Markup('x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"').format(x1, y1, x2 - x1, y2 - y1)
        parts += [Markup('<rect class="halo" {0}/><rect class="edge" {0}/>').format(shape)]
    places = [None if joint is None else _place(joint, size) for joint in mark.joints]
    ends = [(places[a], places[b]) for a, b in bones if max(a, b) < len(places)]
    path = "".join(f"M{a[0]:.1f},{a[1]:.1f}L{b[0]:.1f},{b[1]:.1f}" for a, b in ends if a and b)
    if path:
        parts += [Markup('<path class="halo" d="{0}"/><path class="edge" d="{0}"/>').format(path)]
    parts += [Markup('<circle class="joint" cx="{:.1f}" cy="{:.1f}" r="2.6"/>').format(*p) for p in places if p]
    return Markup('<g class="c{}">{}</g>').format(colour, Markup("").join(parts))


def _chip(mark: Mark, number: int | None, colour: int, size: tuple[float, float]) -> Markup:
    """The mark's number and label: above its box, below where there is no room, or else within."""
    if mark.box is None:
        return Markup()
    (x, y), (x2, y2) = _place(mark.box[:2], size), _place(mark.box[2:], size)
    # a label that would cover more than its own box and a little beside it is told below the picture only
    head = "" if number is None else str(number)
    text = f"{head} {mark.label if mark.label and not mark.joints else ''}".strip()
    if _wide(text) > max(x2 - x, 110.0):
        text = head
    if not text:
        return Markup()
    wide = _wide(text) + 8
    x = max(0.0, min(x, size[0] - wide))
    y = y - CHIP if y >= CHIP else y2 if y2 + CHIP <= size[1] else y
    return Markup(
        '<g class="c{}"><rect class="chip" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{}" rx="2"/>'
        '<text x="{:.1f}" y="{:.1f}" textLength="{:.1f}" lengthAdjust="spacingAndGlyphs">{}</text></g>'
    ).format(colour, x, y, wide, CHIP, x + 4, y + 12, wide - 8, text)


def _wide(text: str) -> float:
    """About the width of a text in the drawing's units; the drawing then makes it exactly that wide, in any font."""
    return sum(12.0 if unicodedata.east_asian_width(c) in "WF" else 8.2 if c.isupper() else 6.6 for c in text)


def _place(point: Point, size: tuple[float, float]) -> Point:
    return point[0] * size[0], point[1] * size[1]
