"""What the annotators measure, on real photographs."""

import cv2
import numpy as np
import pyarrow as pa
import pytest
import simplejpeg

from x2i.pipelines.annotators.base import Decoding, Item
from x2i.pipelines.annotators.phash import PHash, phash
from x2i.pipelines.annotators.quality import Quality, QualityConfig, blockiness, colourfulness, sharpness
from x2i.pipelines.images import decode, encode, read_header, resize
from x2i.pipelines.quickstart import photographs

PHOTOS = {n: d for n, d in photographs().items() if not n.endswith(".txt")}
PIXELS = {n: decode(d, read_header(d)) for n, d in PHOTOS.items()}


def items(*names: str) -> list[Item]:
    return [Item(n, None, PHOTOS[n], read_header(PHOTOS[n]), PIXELS[n]) for n in names]


def distance(a: int, b: int) -> int:
    return (a ^ b).bit_count()


def test_phash_survives_resizing_and_compression_and_tells_photographs_apart() -> None:
    hashes = {n: phash(p) for n, p in PIXELS.items()}
    for name, pixels in PIXELS.items():
        small = resize(pixels, pixels.shape[1] * 2 // 3, pixels.shape[0] * 2 // 3)
        copy = encode(small, "jpg", 60)
        assert distance(hashes[name], phash(simplejpeg.decode_jpeg(copy, "RGB"))) <= 6, name
    values = list(hashes.values())
    assert min(distance(a, b) for i, a in enumerate(values) for b in values[:i]) > 8


def test_phash_is_laid_out_as_published() -> None:
    """The first bit is the mean (always above the median of a natural picture's), the top row comes first."""
    chelsea = PIXELS["chelsea.png"]
    small = cv2.resize(cv2.cvtColor(chelsea, cv2.COLOR_RGB2GRAY), (32, 32), interpolation=cv2.INTER_AREA).astype(float)
    from scipy.fft import dctn

    low = dctn(small, type=2, norm="ortho")[:8, :8]
    bits = (low > np.median(low)).ravel()
    assert [int(b) for b in f"{phash(chelsea):064b}"] == bits.astype(int).tolist()


def test_blur_lowers_sharpness() -> None:
    grey = cv2.cvtColor(PIXELS["coffee.png"], cv2.COLOR_RGB2GRAY)
    values = [sharpness(cv2.GaussianBlur(grey, (k, k), 0)) if k else sharpness(grey) for k in (0, 3, 9, 21)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 20 * values[-1]


def test_colourfulness_is_hasslers() -> None:
    assert colourfulness(PIXELS["camera.png"]) == 0
    assert colourfulness(PIXELS["hubble_deep_field.jpg"]) < colourfulness(PIXELS["chelsea.png"])
    assert colourfulness(PIXELS["chelsea.png"]) < colourfulness(PIXELS["flower.jpg"])
    half = np.zeros((2, 2, 3), np.uint8)
    half[0, :, 0] = 255  # rg is 255 on half the pixels, yb 127.5: sigma 127.5 and 63.75, mu the same
    expected = np.hypot(127.5, 63.75) * 1.3
    assert colourfulness(half) == pytest.approx(expected, rel=1e-5)


def test_blockiness_rises_with_compression_and_finds_a_shifted_grid() -> None:
    grey = cv2.cvtColor(PIXELS["astronaut.png"], cv2.COLOR_RGB2GRAY)

    def compressed(quality: int) -> np.ndarray:
        return simplejpeg.decode_jpeg(encode(grey, "jpg", quality), "GRAY")[..., 0]

    values = [blockiness(grey)] + [blockiness(compressed(q)) for q in (90, 50, 20, 10)]
    assert values == sorted(values)
    assert values[0] < 0.05
    assert values[-1] > 0.5
    assert blockiness(compressed(10)[3:, 5:]) == pytest.approx(values[-1], rel=0.1)


def test_quality_has_a_value_for_every_column() -> None:
    table = Quality(QualityConfig())(items(*PIXELS))
    assert table.schema == Quality.columns
    assert all(column.null_count == 0 for column in table)
    text = dict(zip(PIXELS, table.to_pylist(), strict=True))
    assert text["page.png"]["brightness"] > text["hubble_deep_field.jpg"]["brightness"]
    assert text["hubble_deep_field.jpg"]["clipped_dark"] < 1


def test_fingerprints_change_with_what_changes_values_and_with_nothing_else() -> None:
    base = Quality(QualityConfig()).fingerprint
    assert Quality(QualityConfig(batch_size=3)).fingerprint == base
    assert Quality(QualityConfig(shorter_side=256)).fingerprint != base
    assert Quality(QualityConfig(), Decoding(max_pixels=1000)).fingerprint != base
    assert PHash(PHash.Config()).fingerprint != base


def test_columns_are_typed_as_declared() -> None:
    table = PHash(PHash.Config())(items("chelsea.png"))
    assert table.schema.field("hash").type == pa.uint64()
