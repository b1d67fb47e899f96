"""Decoding at the least scale that suffices: near to the full picture, at its place, and odd files as ever."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_image

from tests.trainer import corpora
from tests.trainer.corpora import Made
from x2i import corpus
from x2i.corpus.sample import Picture, Sample
from x2i.model.pixels import centre_crop, crop, shrink
from x2i.trainer import decode
from x2i.trainer.data import DamagedSample, SampleReader
from x2i.trainer.decode import pictures
from x2i.trainer.table import SampleTable

PHOTOGRAPHS = [
    *(load() for load in (skimage.data.astronaut, skimage.data.chelsea, skimage.data.coffee, skimage.data.rocket)),
    *(load_sample_image(name) for name in ("china.jpg", "flower.jpg")),
]


def jpeg(pixels: np.ndarray | Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(out, "JPEG", **({"quality": 92} | options))
    return out.getvalue()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return float(10 * np.log10(255**2 / max(np.square(a.astype(float) - b).mean(), 1e-9)))


def both(data: bytes, height: int, width: int, whole: bool = False) -> float:
    """How near the two ways of decoding come to each other, in dB."""
    (full,), (reduced,) = (pictures([data], height, width, whole, how) for how in ("full", "reduced"))
    return psnr(full, reduced)


@pytest.mark.parametrize("side", [150, 128, 48])
def test_reduced_is_close_to_full_on_photographs(side: int) -> None:
    near = [both(jpeg(p), side, side) for p in PHOTOGRAPHS]
    assert min(near) > 35 and np.mean(near) > 38
    assert min(both(jpeg(p), side, side, whole=True) for p in PHOTOGRAPHS) > 32


def test_a_crop_lies_where_it_does_in_full_whatever_the_sides() -> None:
    """A shift by half a pixel of the result would cost far more than this."""
    photograph = np.asarray(Image.fromarray(PHOTOGRAPHS[0]).resize((1024, 1024), Image.Resampling.LANCZOS))
    for width, height in ((1024, 700), (1023, 700), (1022, 701), (1021, 511), (803, 512), (513, 1021), (400, 399)):
        data = jpeg(photograph[:height, :width])
        for size in ((256, 256), (250, 250), (192, 256), (256, 160)):
            assert both(data, *size) > 37, (width, height, size)


def test_without_a_scale_to_reduce_by_only_rounding_differs() -> None:
    for photograph in PHOTOGRAPHS:
        assert both(jpeg(photograph), 280, 290) > 50
        assert both(jpeg(photograph), 600, 700) > 50  # larger than it is
        (kept,) = pictures([jpeg(photograph)], 900, 900, True, "reduced")
        assert kept.shape == photograph.shape


def test_full_is_what_pillow_makes_of_it() -> None:
    for photograph in PHOTOGRAPHS[:2]:
        data = jpeg(photograph)
        image = Image.open(io.BytesIO(data))
        (cut,), (whole,) = pictures([data], 100, 120, False, "full"), pictures([data], 100, 120, True, "full")
        assert np.array_equal(cut, centre_crop(image, 100, 120)) and np.array_equal(whole, shrink(image, 100))


def test_crops_of_any_size_fit_into_the_picture() -> None:
    """Their sides are computed with rounding, which may lead a hair's breadth beyond the picture."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        width, height, w, h = (int(v) for v in rng.integers((300, 300, 64, 64), (900, 900, 128, 128)))
        pixels = np.zeros((height, width, 3), np.uint8)
        assert centre_crop(Image.fromarray(pixels), h, w).shape == (h, w, 3)
        assert crop(pixels, h, w, 1.0, 1.0, 1.0).shape == (h, w, 3)


def test_halves_of_a_pixel_are_rounded_as_in_full() -> None:
    """Packs are planned by it, too: 1500 * (17 / 200) is a little more than 127.5, and 1500 / (200 / 17) is not."""
    data = jpeg(np.zeros((1500, 200, 3), np.uint8))
    assert {pictures([data], 17, 17, True, how)[0].shape for how in ("full", "reduced")} == {(128, 17, 3)}


def test_odd_files_come_out_as_in_full() -> None:
    photograph = Image.fromarray(PHOTOGRAPHS[1])
    turned = Image.Exif()
    turned[0x0112] = 6
    adobe = jpeg(photograph.convert("CMYK"))
    odd = {
        "CMYK": adobe,
        "grey": jpeg(photograph.convert("L")),
        "progressive": jpeg(photograph, progressive=True),
        "turned": jpeg(photograph, exif=turned),
        "full colours": jpeg(photograph, subsampling=0),
        "bytes after the end": jpeg(photograph) + b"\0" * 100,
        "thin": jpeg(photograph.crop((0, 0, 300, 1))),
        "one pixel": jpeg(photograph.crop((0, 0, 1, 1))),
    }
    for name, data in odd.items():
        for side in (64, 100, 200):
            assert both(data, side, side) > 35, name
            assert both(data, side, side, whole=True) > 35, name
    for mode in ("RGB", "L", "P", "RGBA", "1", "I;16"):
        out = io.BytesIO()
        (photograph.convert("L").convert("I").convert("I;16") if mode == "I;16" else photograph.convert(mode)).save(
            out, "PNG"
        )
        assert both(out.getvalue(), 100, 100) > 40, mode


def test_pictures_of_one_sample_are_reduced_alike() -> None:
    """What an edit leaves alone is alike in source and result, though one of them is no JPEG."""
    photograph = Image.fromarray(PHOTOGRAPHS[0])
    out = io.BytesIO()
    photograph.save(out, "PNG")
    files = [jpeg(photograph, quality=100, subsampling=0), out.getvalue()]
    together = psnr(*pictures(files, 150, 150, False, "reduced"))
    alone = psnr(*(pictures([f], 150, 150, False, "reduced")[0] for f in files))
    assert together > 45 and together > alone + 6, (together, alone)


@pytest.mark.parametrize("how", ["full", "reduced"])
def test_damaged_files_and_bombs_are_refused(how: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = jpeg(PHOTOGRAPHS[2])
    huge = whole.replace(struct.pack(">HH", 400, 600), struct.pack(">HH", 60000, 60000), 1)
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks
    )
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as after an import of what reads web pages' pictures
    bad = {
        "cut": whole[: len(whole) // 2],
        "stub": whole[:200],
        "huge": huge,
        "bomb": png,
        "text": b"<html>",
        "none": b"",
    }

    def made(name: str, data: bytes) -> Made:
        return Made(Sample(name, "text_to_image", "A cup", (), Picture(data, "jpg", 600, 400)), name.ljust(64, "0"))

    folder = corpora.write(tmp_path / "corpus", [made(n, d) for n, d in {**bad, "good": whole}.items()])
    table = SampleTable([corpus.open(folder)], 0.0)
    reader = SampleReader(table, decode=how)
    for number, name in enumerate(bad):
        with pytest.raises(DamagedSample, match="pixels, of which" if name in ("huge", "bomb") else "does not decode"):
            reader.read(number, 64)
    assert reader.read(len(bad), 64).key == "good"
    assert decode.MAX_PIXELS < 30000**2
