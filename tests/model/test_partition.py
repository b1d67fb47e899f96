"""Ovis2 cuts images as the published code does: grids, boxes, sizes of views, and what stands where in the text.

The figures come from AIDC-AI/Ovis at 58b0ad6 (`BaseVisualTokenizer.preprocess_image`) with tiles of 448 pixels.
"""

import pytest

from x2i.base.errors import X2IError
from x2i.model.ovis2.partition import (
    COLUMN,
    END,
    MID,
    ROW,
    START,
    TILE,
    best_grid,
    boxes,
    covered,
    fitted,
    layout,
    views,
)

# width, height, grid of at most 4 tiles, grid of at most 9
GRIDS = [
    (1, 1, (1, 1), (1, 1)),
    (2, 1, (1, 1), (1, 1)),
    (7, 300, (1, 1), (1, 1)),
    (100, 100, (1, 1), (1, 1)),
    (448, 448, (1, 1), (1, 1)),
    (449, 448, (1, 1), (1, 1)),
    (448, 449, (1, 1), (1, 1)),
    (473, 473, (2, 2), (2, 2)),
    (500, 500, (2, 2), (2, 2)),
    (640, 480, (2, 2), (2, 2)),
    (480, 640, (2, 2), (2, 2)),
    (800, 600, (2, 2), (2, 2)),
    (600, 800, (2, 2), (2, 2)),
    (896, 448, (1, 2), (1, 2)),
    (448, 896, (2, 1), (2, 1)),
    (896, 896, (2, 2), (2, 2)),
    (1024, 768, (2, 2), (2, 3)),
    (768, 1024, (2, 2), (3, 2)),
    (1024, 1024, (2, 2), (3, 3)),
    (1280, 720, (2, 2), (2, 3)),
    (720, 1280, (2, 2), (3, 2)),
    (1344, 1344, (2, 2), (3, 3)),
    (1500, 500, (1, 3), (2, 4)),
    (500, 1500, (3, 1), (4, 2)),
    (1600, 1200, (2, 2), (3, 3)),
    (1920, 1080, (2, 2), (2, 4)),
    (1080, 1920, (2, 2), (4, 2)),
    (2048, 2048, (2, 2), (3, 3)),
    (2400, 300, (1, 4), (1, 6)),
    (300, 2400, (4, 1), (6, 1)),
    (3000, 2000, (2, 2), (2, 3)),
    (2000, 3000, (2, 2), (3, 2)),
    (4032, 3024, (2, 2), (3, 3)),
    (4000, 400, (1, 4), (1, 9)),
    (400, 4000, (4, 1), (9, 1)),
    (4480, 448, (1, 4), (1, 9)),
    (10000, 10, (1, 4), (1, 9)),
    (10, 10000, (4, 1), (9, 1)),
    (5000, 1000, (1, 4), (1, 5)),
    (1000, 5000, (4, 1), (5, 1)),
    (8192, 8192, (2, 2), (3, 3)),
    (12000, 9000, (2, 2), (3, 3)),
    (997, 613, (2, 2), (2, 3)),
    (613, 997, (2, 2), (3, 2)),
    (1366, 768, (2, 2), (2, 3)),
    (2480, 3508, (2, 2), (3, 3)),
]


def test_grids_are_the_published_ones() -> None:
    found = [(w, h, best_grid(w, h, 448, 4), best_grid(w, h, 448, 9)) for w, h, _, _ in GRIDS]
    assert found == GRIDS
    assert {best_grid(w, h, 448, 1) for w, h, _, _ in GRIDS} == {(1, 1)}


def test_views_of_an_odd_size() -> None:
    found = views(997, 613, best_grid(997, 613, 448, 9))
    assert found == [
        (0, 0, 997, 613),  # the whole image first; what the division leaves over is in the last row and column
        (0, 0, 332, 306),
        (332, 0, 664, 306),
        (664, 0, 997, 306),
        (0, 306, 332, 613),
        (332, 306, 664, 613),
        (664, 306, 997, 613),
    ]
    sizes = [fitted(right - left, lower - upper, 448) for left, upper, right, lower in found]
    assert sizes == [(448, 275), (448, 412), (448, 412), (448, 411), (448, 414), (448, 414), (448, 413)]


def test_sizes_of_views() -> None:
    assert views(50, 7, best_grid(50, 7, 448, 9)) == [(0, 0, 50, 7)]
    assert fitted(50, 7, 448) == (448, 62)
    assert fitted(300, 2400, 448) == (56, 448)
    assert fitted(9, 9, 448) == (448, 448)
    assert fitted(10_000, 10, 448) == (448, 1)  # the published code comes to 0 and fails


@pytest.mark.parametrize("most", [1, 4, 9])
def test_tiles_cover_the_image_once(most: int) -> None:
    for width, height, _, _ in GRIDS:
        grid = best_grid(width, height, 448, most)
        tiles = boxes(width, height, grid)
        assert len(tiles) == grid[0] * grid[1] <= most
        assert sum((r - l) * (b - t) for l, t, r, b in tiles) == width * height  # noqa: E741 - left
        assert all(0 <= l < r <= width and 0 <= t < b <= height for l, t, r, b in tiles)  # noqa: E741 - left
        assert 0 < covered(width, height, grid, 448) <= 1


def test_places_in_the_text() -> None:
    assert layout((1, 1)) == [START, TILE, MID, END]
    assert layout((1, 2)) == [START, TILE, MID, TILE, COLUMN, TILE, END]
    assert layout((3, 1)) == [START, TILE, MID, TILE, ROW, TILE, ROW, TILE, END]
    row = [TILE, COLUMN, TILE, COLUMN, TILE]
    assert layout((2, 3)) == [START, TILE, MID, *row, ROW, *row, END]
    # the ids of the published code
    assert layout((1, 1)) == [-301, -300, -302, -305]


@pytest.mark.parametrize(("width", "height", "most"), [(0, 5, 9), (5, 0, 9), (5, 5, 0)])
def test_an_empty_image_or_no_tiles_is_refused(width: int, height: int, most: int) -> None:
    with pytest.raises(X2IError, match="must be 1 or more"):
        best_grid(width, height, 448, most)
