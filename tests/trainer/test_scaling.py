"""The filter that reduced pictures are scaled by: Pillow's bicubic, at any box, the same with every instruction set."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import skimage.data
from cykooz_resizer import CpuExtensions, Resizer
from PIL import Image

from x2i.trainer import scaling
from x2i.trainer.scaling import bicubic

PHOTOGRAPH = skimage.data.astronaut()

#: Boxes of the photograph and the size that each is scaled to.
CASES = [
    ((0, 0, 512, 512), (256, 256)),
    ((0.5, 100.25, 511.5, 400.75), (300, 177)),
    ((30.3, 0, 480.3, 512), (57, 64)),
    ((100, 100, 180.5, 150.25), (322, 200)),
    ((0, 7, 512, 300), (512, 100)),
    ((3, 7, 259, 263), (256, 256)),
]


def weights(start: float, end: float, size: int, most: int) -> np.ndarray:
    """Keys' cubic (a = -0.5), widened where a side shrinks, without any rounding: [size, most]."""
    step = (end - start) / size
    x = (np.arange(most) + 0.5 - (start + (np.arange(size)[:, None] + 0.5) * step)) / max(step, 1)
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    found = np.where(x < 1, near, np.where(x < 2, far, 0))
    return found / found.sum(1, keepdims=True)


def exact(pixels: np.ndarray, box: tuple[float, float, float, float], width: int, height: int) -> np.ndarray:
    down = weights(box[1], box[3], height, pixels.shape[0])
    across = weights(box[0], box[2], width, pixels.shape[1])
    return np.clip(np.einsum("ij,jkc,lk->ilc", down, pixels.astype(float), across, optimize=True), 0, 255)


@pytest.mark.parametrize(("box", "size"), CASES)
def test_as_near_to_the_exact_filter_as_pillow(box: tuple[float, float, float, float], size: tuple[int, int]) -> None:
    wanted = exact(PHOTOGRAPH, box, *size)
    ours = np.abs(bicubic(PHOTOGRAPH, box, *size) - wanted)
    pillow = np.abs(np.asarray(Image.fromarray(PHOTOGRAPH).resize(size, Image.Resampling.BICUBIC, box=box)) - wanted)
    assert ours.mean() < pillow.mean() + 0.005
    # more than rounding only where what lies between the two directions would be beyond 0 or 255, as with Pillow
    assert np.mean(ours > 1.2) < np.mean(pillow > 1.2) + 0.005


def test_without_clipping_rounding_is_all_that_differs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(150):
        height, width = (int(v) for v in rng.integers(1, 90, 2))
        pixels = rng.integers(96, 160, (height, width, 3), dtype=np.uint8)
        (left, right), (top, bottom) = (np.sort(rng.uniform(0, side, 2)) for side in (width, height))
        right, bottom = min(max(right, left + 0.2), width), min(max(bottom, top + 0.2), height)
        left, top = min(left, right - 0.1), min(top, bottom - 0.1)
        w, h = (int(v) for v in rng.integers(1, 70, 2))
        box = (float(left), float(top), float(right), float(bottom))
        assert np.abs(bicubic(pixels, box, w, h) - exact(pixels, box, w, h)).max() < 1.2, (pixels.shape, box, w, h)


def test_enlarged_boxes_may_begin_at_a_pixels_centre() -> None:
    """Asked for both directions at once, the library reads what is not its own here, and the process dies."""
    pixels = np.ascontiguousarray(PHOTOGRAPH[:321, :481])
    for side, left in ((320.8, 80.1), (160.4, 20.3), (40.1, 10.45)):
        size = round(side / 0.8)
        left = 80.5 - side / size / 2
        found = bicubic(pixels, (left, 0.1, left + side, 0.1 + side), size, size)
        assert np.abs(found - exact(pixels, (left, 0.1, left + side, 0.1 + side), size, size)).mean() < 0.4


def test_pixels_do_not_hang_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    best = Resizer()
    plain = [CpuExtensions.none] + [CpuExtensions.sse4_1] * (best.cpu_extensions is CpuExtensions.avx2)
    for extensions in plain:
        limited = Resizer()
        limited.cpu_extensions = extensions
        found = []
        for resizer in (best, limited):
            monkeypatch.setattr(scaling._own, "resizer", resizer, raising=False)
            found.append([bicubic(PHOTOGRAPH, box, *size) for box, size in CASES])
        assert all(map(np.array_equal, *found)), extensions


def test_threads_do_not_disturb_each_other() -> None:
    wanted = [bicubic(PHOTOGRAPH, box, *size) for box, size in CASES]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda case: bicubic(PHOTOGRAPH, case[0], *case[1]), CASES * 20))
    assert all(np.array_equal(f, w) for f, w in zip(found, wanted * 20, strict=True))
