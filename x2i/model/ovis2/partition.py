"""How Ovis2 cuts an image into tiles, and what stands where in the text. Pure functions of sizes.

- among all grids of at most `max_tiles` tiles: the fewest tiles that keep over `covering` of the image's area at
  the tile's resolution; where none does, the grid that keeps most
- with more than one tile, the whole image comes first as one more view
- each view keeps its aspect: its longer side becomes the tile's, and it lies in the middle of a square of zeros
- in the text: start, whole image, mid, then tiles row by row with column and row marks between them, end

Source: BaseVisualTokenizer of AIDC-AI/Ovis at 58b0ad6 (`preprocess_image`, `construct_image_placeholders`).
"""

from __future__ import annotations

from x2i.base.errors import X2IError

Grid = tuple[int, int]  # rows, columns
Box = tuple[int, int, int, int]  # left, upper, right, lower, in pixels

#: Places in the text. A `TILE` stands for all visual tokens of one view; the others are rows of the visual table,
#: its last five in this order.
TILE = -300
START, MID, COLUMN, ROW, END = INDICATORS = (-301, -302, -303, -304, -305)


def best_grid(width: int, height: int, side: int, max_tiles: int, covering: float = 0.9) -> Grid:
    """Rows and columns for an image.

    Args:
        width, height: of the image, in pixels.
        side: of a tile, in pixels.
        max_tiles: at most this many tiles, the view of the whole image not counted.
        covering: share of the area that a grid of few tiles must keep.

    Raises:
        X2IError: an empty image, or `max_tiles` below 1.
    """
    if width < 1 or height < 1 or max_tiles < 1:
        raise X2IError(f"an image of {width} x {height} pixels in at most {max_tiles} tiles: all must be 1 or more")
    kept = {
        (rows, columns): covered(width, height, (rows, columns), side)
        for rows in range(1, max_tiles + 1)
        for columns in range(1, max_tiles // rows + 1)
    }
    good = [grid for grid, share in kept.items() if share > covering]
    if good:
        return min(good, key=lambda grid: (grid[0] * grid[1], -kept[grid]))
    return min(kept, key=lambda grid: (-kept[grid], grid[0] * grid[1]))


def covered(width: int, height: int, grid: Grid, side: int) -> float:
    """Share of the image's area that its tiles keep when each is shrunk to fit into `side` x `side`.

    Only the longer side is shrunk into the count, and the area is that of the shrunk tile: as the published code does.
    """
    total: float = 0
    for left, upper, right, lower in boxes(width, height, grid):
        long, short = max(right - left, lower - upper), min(right - left, lower - upper)
        total += short / long * side * side if long > side else long * short
    return total / (width * height)


def boxes(width: int, height: int, grid: Grid) -> list[Box]:
    """The tiles of a grid, row by row. What the division leaves over goes to the last row and the last column."""
    rows, columns = grid
    tile_height, tile_width = height // rows, width // columns
    return [
        (
            column * tile_width,
            row * tile_height,
            width if column == columns - 1 else (column + 1) * tile_width,
            height if row == rows - 1 else (row + 1) * tile_height,
        )
        for row in range(rows)
        for column in range(columns)
    ]


def views(width: int, height: int, grid: Grid) -> list[Box]:
    """What the model sees, in order: with more than one tile the whole image first, then the tiles."""
    tiles = boxes(width, height, grid)
    return tiles if len(tiles) == 1 else [(0, 0, width, height), *tiles]


def fitted(width: int, height: int, side: int) -> tuple[int, int]:
    """Width and height of a view whose longer side is `side`; the shorter is rounded down, but not to nothing.

    The published code fails where the shorter side comes to 0 pixels; here it is 1.
    """
    if width == height:
        return side, side
    if width > height:
        return side, max(int(height / width * side), 1)
    return max(int(width / height * side), 1), side


def layout(grid: Grid) -> list[int]:
    """Places of one image in the text: `TILE` and `INDICATORS`."""
    rows, columns = grid
    places = [START, TILE, MID]
    if rows * columns > 1:
        for row in range(rows):
            places += [ROW] * (row > 0)
            for column in range(columns):
                places += [COLUMN] * (column > 0) + [TILE]
    return [*places, END]
