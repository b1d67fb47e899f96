"""What phrases name in a picture: their boxes, and the masks of these, put together from columns beside each other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from x2i.pipelines.boxes import Box, nested, place
from x2i.pipelines.masks import Code, decoded

K = TypeVar("K")

_WORDS = """i you he she it we they me him her us them this that these those who whom whose which what one ones other
others another all both each some someone somebody something anyone anything everyone everything nobody nothing himself
herself itself themselves photo photos photograph photographs picture pictures image images shot view views scene scenes
illustration background foreground front back side sides top bottom left right middle center centre edge end part way
time day night moment love freedom life idea fun style use kind sort type number lot couple"""
#: Last words of phrases that name nothing that a box could hold: pronouns, pictures, places in them, abstract things.
VAGUE = tuple(_WORDS.split())


@dataclass(frozen=True, eq=False)
class Region:
    """What a phrase names in a picture: one box, or several put `together`.

    Attributes:
        size: (width, height) of the picture.
        phrase: what it holds; may be empty.
        index: the boxes' places in their column. boxes: the boxes themselves, where they were read.
        score: how sure the least sure box is.
        span: characters [start, end) of the row's text that it stands for, where the box brings them.
        codes: a mask for each box, None where there is none.
        quality: the masks' least predicted IoU; None where one has none.
    """

    size: tuple[int, int]
    phrase: str
    index: tuple[int, ...] = ()
    boxes: tuple[Box, ...] = ()
    score: float = 1.0
    span: tuple[int, int] | None = None
    codes: tuple[Code | None, ...] = ()
    quality: float | None = None

    @property
    def number(self) -> int:
        """The (first) box's place in its column."""
        return self.index[0]

    @property
    def box(self) -> Box:
        """The (first) box."""
        return self.boxes[0]

    @property
    def masked(self) -> bool:
        """Whether every box has a mask."""
        return bool(self.codes) and all(code is not None for code in self.codes)

    @cached_property
    def mask(self) -> np.ndarray:
        """Where it is, by those masks that there are: bool [height, width]."""
        out = np.zeros(self.size[::-1], bool)
        for code in self.codes:
            if code is not None:
                out |= decoded(code, self.size)
        return out

    @cached_property
    def share(self) -> float:
        """The mask's share of the picture."""
        return float(self.mask.mean())


def numbered(
    codes: Sequence[Code] | None, index: Sequence[int | None] | None, qualities: Sequence[float] | None = None
) -> dict[int, tuple[Code, float | None]]:
    """Masks by the number of the box that each was asked for, with their predicted IoU where it is given."""
    known = [None] * len(codes or ()) if qualities is None else [float(q) for q in qualities]
    given = zip(index or (), codes or (), known, strict=True)
    return {i: (code, quality) for i, code, quality in given if i is not None}


def read(
    size: tuple[int, int],
    boxes: Sequence[Any] | None,
    phrases: str | Sequence[str | None] | None,
    masks: Mapping[int, tuple[Code, float | None]],
    scores: Sequence[float] | None = None,
    text: str = "",
) -> list[Region]:
    """The boxes of a picture as regions of one box; what is no box is left out, as a source may say anything.

    Args:
        size: (width, height) of the picture.
        boxes: [x1, y1, x2, y2], structs that have a `box` and a `score`, or GRIT's [start, end, x1, y1, x2, y2, score]
            with characters of `text`; None: their phrases and masks are enough.
        phrases: of each box; a string is what all of them hold.
        masks: as `numbered` gives them.
        scores: of each box, where the boxes bring none.
    """
    out = []
    for i in range(len(boxes if boxes is not None else phrases or ())):
        there = place(boxes[i]) if boxes is not None else None
        if there is None and boxes is not None:
            continue
        box, score, span = there or (None, 1.0, None)
        if isinstance(phrases, str):
            said: str | None = phrases
        elif span is not None:
            said = text[slice(*span)]
        else:
            said = phrases[i] if phrases and i < len(phrases) else None
        code, quality = masks.get(i, (None, None))
        out.append(
            Region(
                size,
                (said or "").strip(),
                (i,),
                () if box is None else (box,),
                float(scores[i]) if scores else score,
                span,
                (code,),
                quality,
            )
        )
    return out


def alike(found: Iterable[Region], key: Callable[[Region], K]) -> dict[K, list[Region]]:
    """Those that have a key in common, in their order."""
    out: dict[K, list[Region]] = {}
    for region in found:
        out.setdefault(key(region), []).append(region)
    return out


def together(members: Sequence[Region]) -> Region:
    """Several regions of one phrase as one."""
    first = members[0]
    if len(members) == 1:
        return first
    qualities = [m.quality for m in members if m.quality is not None]
    return Region(
        first.size,
        first.phrase,
        tuple(i for m in members for i in m.index),
        tuple(b for m in members for b in m.boxes),
        min(m.score for m in members),
        None,
        tuple(c for m in members for c in m.codes),
        min(qualities) if len(qualities) == len(members) else None,
    )


def things(found: Iterable[Region]) -> list[Region]:
    """One for each phrase, because "the dog" is said of both dogs; those of which a box lacks its mask are left out."""
    each = (together(members) for members in alike(found, lambda r: r.phrase).values())
    return [thing for thing in each if thing.phrase and thing.masked]


def apart(found: Iterable[Region], most: float) -> list[Region]:
    """Without those that lie in a surer one by a larger share than `most`; the surest first."""
    kept: list[Region] = []
    for region in sorted(found, key=lambda r: (-r.score, r.index)):
        if all(nested(region.box, other.box) <= most for other in kept):
            kept.append(region)
    return kept


def is_vague(phrase: str, words: Collection[str] = VAGUE) -> bool:
    """Whether a noun phrase (whose head is its last word, as in English) names nothing that can be pointed at."""
    said = "".join(c if c.isalnum() else " " for c in phrase.lower()).split()
    return not said or said[-1] in words
