"""The sizes that pictures are given before a model reads them, against the published code's own crops."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from x2i.model.pixels import centre_square, fit, fitted


def picture(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 7 % 256, y * 5 % 256, (x * y) % 256], -1).astype(np.uint8))


# VectorSpaceLab/OmniGen, OmniGen/utils.py, run on `picture`: size of the result, mean of each channel
CROP_ARR = [
    ((100, 80, 128), (96, 80), (119.833, 107.9, 123.15)),
    ((128, 128, 128), (128, 128), (118.5, 115.5, 124.062)),
    ((129, 70, 128), (128, 64), (118.531, 110.719, 124.06)),
    ((300, 200, 128), (128, 80), (124.891, 124.625, 125.434)),
    ((600, 520, 128), (128, 96), (126.258, 128.031, 127.276)),
    ((1000, 257, 128), (128, 32), (127.008, 125.125, 126.171)),
    ((10, 40, 128), (16, 64), (31.562, 97.5, 73.829)),
    ((8, 8, 128), (16, 16), (24.562, 17.5, 12.383)),
    ((500, 12, 128), (672, 16), (126.149, 27.625, 117.524)),
    ((47, 33, 64), (32, 32), (141.5, 77.5, 117.0)),
    ((1023, 1025, 256), (256, 256), (127.855, 127.941, 126.011)),
    ((64, 48, 64), (64, 48), (112.5, 117.5, 115.333)),
    ((2000, 300, 512), (512, 64), (126.994, 128.297, 125.467)),
]
CENTER_CROP_ARR = [
    ((100, 80, 64), (125.641, 107.891, 124.302)),
    ((300, 200, 96), (130.604, 125.521, 126.586)),
    ((600, 520, 128), (126.961, 126.32, 127.044)),
    ((30, 40, 64), (101.516, 96.344, 112.67)),
]


@pytest.mark.parametrize(("given", "size", "means"), CROP_ARR)
def test_input_images_are_cut_as_the_published_code_cuts_them(
    given: tuple[int, int, int], size: tuple[int, int], means: tuple[float, ...]
) -> None:
    width, height, largest = given
    cut = fit(picture(width, height), largest)
    assert cut.shape == (size[1], size[0], 3) and cut.dtype == np.uint8
    np.testing.assert_allclose(cut.mean((0, 1)), means, atol=0.02)


@pytest.mark.parametrize("given", [g for g, _, _ in CROP_ARR])
def test_and_pixel_by_pixel_as_diffusers_does(given: tuple[int, int, int]) -> None:
    pytest.importorskip("torchvision", reason="diffusers' processor of OmniGen needs torchvision")
    from diffusers.pipelines.omnigen.processor_omnigen import crop_image

    width, height, largest = given
    assert np.array_equal(fit(picture(width, height), largest), np.asarray(crop_image(picture(width, height), largest)))


@pytest.mark.parametrize(("given", "means"), CENTER_CROP_ARR)
def test_squares_are_the_published_ones(given: tuple[int, int, int], means: tuple[float, ...]) -> None:
    width, height, side = given
    cut = centre_square(picture(width, height), side)
    assert cut.shape == (side, side, 3)
    np.testing.assert_allclose(cut.mean((0, 1)), means, atol=0.02)


def test_other_multiples_and_modes_work_too() -> None:
    assert fit(picture(100, 50).convert("L"), 64, 28).shape == (28, 56, 3)
    assert fit(picture(90, 61).convert("RGBA"), 64, 32).shape == (32, 64, 3)


def test_the_size_of_a_fitted_picture_is_known_without_it() -> None:
    for width, height in np.random.default_rng(0).integers(1, 900, (60, 2)).tolist():
        made = fit(Image.new("RGB", (width, height)), 256, 16)
        assert fitted(width, height, 256, 16) == (made.shape[1], made.shape[0])
