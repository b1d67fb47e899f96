"""Boxes, phrases and masks read from columns: what is missing or odd, and several boxes as one region."""

from __future__ import annotations

import numpy as np
import pytest

from tests.pipelines.drawn import ellipse
from x2i.pipelines.masks import filled
from x2i.pipelines.regions import numbered, read, things, together

SIZE = (40, 30)
LEFT, RIGHT = [0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]


def test_boxes_are_numbered_by_their_column_whatever_is_left_out() -> None:
    given = [LEFT, "no box", {"box": RIGHT, "score": 0.25}, [0.0, float("nan"), 1.0, 1.0], [4, 9, *RIGHT, 0.5]]
    found = read(SIZE, given, ["a cat", "b", None], {}, text="The spoon lies there")
    assert [(r.number, r.phrase, r.score, r.span) for r in found] == [
        (0, "a cat", 1.0, None),
        (2, "", 0.25, None),
        (4, "spoon", 0.5, (4, 9)),
    ]
    assert [r.phrase for r in read(SIZE, [LEFT, RIGHT], "a face", {})] == ["a face", "a face"]
    assert not any(r.masked or r.mask.any() for r in found)


def test_together_they_are_as_sure_as_the_least_sure_and_cover_what_all_cover() -> None:
    masks = [ellipse(SIZE, LEFT), ellipse((20, 15), RIGHT)]  # the second at half the size
    codes = numbered(masks, [1, 0], [0.9, 0.7])
    both = together(read(SIZE, [RIGHT, LEFT], ["eyes", "eyes"], codes, [0.6, 0.8]))
    assert (both.index, both.score, both.quality, both.masked) == ((0, 1), 0.6, 0.7, True)
    assert both.boxes == (tuple(RIGHT), tuple(LEFT)) and both.mask.shape == (30, 40)
    assert both.share == pytest.approx(np.pi / 4, abs=0.03)
    half = together(read(SIZE, [RIGHT, LEFT], ["eyes", "eyes"], numbered(masks[:1], [0], [0.9])))
    assert (half.masked, half.quality) == (False, None) and half.mask.any()
    assert things([half]) == [] and things([both]) == [both]


def test_a_box_has_a_pixel_at_least() -> None:
    assert filled([0.5, 0.5, 0.5, 0.5], SIZE).sum() == 1 and filled([1.0, 1.0, 1.0, 1.0], SIZE)[-1, -1]
    assert filled(LEFT, SIZE).sum() == 600
