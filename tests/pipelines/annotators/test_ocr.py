"""`ocr`: reads what was drawn, finds nothing where nothing is written, keeps order, survives odd pictures."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from tests.pipelines.annotating import batch, drawn, item, photo, run
from tests.pipelines.annotators.registry import fetched, ready
from x2i.pipelines.annotators._languages import language, scripts
from x2i.pipelines.annotators.ocr import OCR, OCRConfig, _bounded, reading_order

SENTENCE = "A house by the quiet river"


@pytest.fixture(scope="module")
def ocr() -> OCR:
    return ready(OCR(OCRConfig(side=480)))


def written(*lines: tuple[str, int, int]) -> np.ndarray:
    """The cat, with text at (x, y), white on a dark edge."""
    pixels = item(photo("chelsea")).pixels
    assert pixels is not None
    out = pixels.copy()
    for text, x, y in lines:
        cv2.putText(out, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (0, 0, 0), 6, cv2.LINE_AA)
        cv2.putText(out, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (255, 255, 255), 2, cv2.LINE_AA)
    return out


def test_reads_a_sentence_drawn_on_a_photograph(ocr: OCR) -> None:
    row = run(ocr, batch([drawn(written((SENTENCE, 20, 280)))])).to_pylist()[0]
    assert row["texts"] == [SENTENCE] and row["text"] == SENTENCE
    assert row["confidence"][0] > 0.95
    assert row["language"] == "en"
    x1, y1, x2, y2 = row["boxes"][0]
    assert x1 < 0.06 and x2 > 0.65 and 0.8 < y1 < 0.9 < y2 < 1  # drawn along the bottom
    polygon = np.array(row["polygons"][0]).reshape(4, 2)
    assert np.allclose([*polygon.min(0), *polygon.max(0)], row["boxes"][0])
    assert 0.5 * (x2 - x1) * (y2 - y1) < row["area"] <= (x2 - x1) * (y2 - y1) + 1e-6


def test_a_page_is_covered_with_text_and_a_cat_is_not() -> None:
    ocr = fetched(OCR(OCRConfig()))
    page, cat, cup = run(ocr, batch([photo("page"), photo("chelsea"), photo("coffee")])).to_pylist()
    assert page["area"] > 0.1 and page["language"] == "en"
    assert page["text"].startswith("Region-based segmentation\nLet us first determine markers of the coins")
    for nothing in (cat, cup):
        assert nothing["area"] == 0 and nothing["boxes"] == [] and nothing["text"] == "" and nothing["language"] is None


def test_a_tall_short_line_is_kept_if_asked() -> None:
    ocr = fetched(OCR(OCRConfig(tallest_short=None)))
    assert run(ocr, batch([photo("coffee")]))["texts"].to_pylist() == [["8"]]


def test_rows_from_the_top_and_from_the_left(ocr: OCR) -> None:
    image = written(("right side", 260, 60), ("left side", 20, 64), ("below them", 20, 270))
    row = run(ocr, batch([drawn(image)])).to_pylist()[0]
    assert row["text"] == "left side right side\nbelow them"
    assert row["texts"] == ["left side", "right side", "below them"]


def test_batch_equals_one_by_one_and_says_nothing(ocr: OCR, capfd: pytest.CaptureFixture[str]) -> None:
    files = [drawn(written((SENTENCE, 20, 280))), drawn(np.full((96, 96, 3), 120, np.uint8))]
    table = run(ocr, batch(files))
    assert table.to_pylist() == [ocr(batch([f])).to_pylist()[0] for f in files]
    assert capfd.readouterr() == ("", "")  # RapidOCR would warn of every picture without text
    assert ocr(batch([])).num_rows == 0


def test_odd_pictures(ocr: OCR) -> None:
    odd = [
        np.zeros((1, 1, 3), np.uint8),
        np.full((5000, 1, 3), 200, np.uint8),
        np.full((3, 900, 3), 90, np.uint8),
        np.zeros((40, 3000, 3), np.uint8),
    ]
    table = run(ocr, batch([drawn(p) for p in odd]))
    assert table["texts"].to_pylist() == [[]] * 4 and table["area"].to_pylist() == [0.0] * 4


def test_a_banner_is_read_in_its_own_shares(ocr: OCR) -> None:
    strip = np.full((60, 720, 3), 235, np.uint8)
    cv2.putText(strip, "Season sale: everything must go", (20, 42), cv2.FONT_HERSHEY_SIMPLEX, 1, (20, 20, 20), 2)
    row = run(ocr, batch([drawn(strip)])).to_pylist()[0]
    assert row["text"].replace(" ", "") == "Seasonsale:everythingmustgo"
    assert row["area"] > 0.3 and row["boxes"][0][3] <= 1
    image, width, height = _bounded(strip, 360)
    assert image.shape == (90, 360, 3) and (width, height) == (360, 30) and not image[30:].any()


def test_overlapping_lines_are_counted_once(ocr: OCR) -> None:
    one = np.array([[0.1, 0.1], [0.5, 0.1], [0.5, 0.3], [0.1, 0.3]])
    assert ocr._area([one]) == pytest.approx(0.08)
    assert ocr._area([one, np.add(one, [0.2, 0])]) == pytest.approx(0.12)
    assert ocr._area([]) == 0
    assert reading_order([np.add(one, [0.4, 0.01]), one, np.add(one, [0, 0.5])]) == [[1, 0], [2]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The museum is open from nine to five, closed on Mondays", "en"),
        ("BITTE NICHT BERÜHREN, DIE FARBE IST NOCH FEUCHT", "de"),
        ("Prière de ne pas marcher sur la pelouse du jardin", "fr"),
        ("Осторожно, двери закрываются, следующая станция", "ru"),
        ("小心地滑", "zh"),
        ("こちらは入口です", "ja"),
        ("출입 금지", "ko"),
        ("Προσοχή", "el"),
        ("EXIT", None),
        ("42 %", None),
        ("", None),
    ],
)
def test_language(ocr: OCR, text: str, expected: str | None) -> None:
    assert language(text, ocr._languages) == expected


def test_scripts() -> None:
    assert scripts("ABC 漢字 ｱ 1") == {"LATIN": 3, "CJK": 2, "KATAKANA": 1}


def test_models_are_pinned_and_part_of_the_fingerprint() -> None:
    plain = OCR(OCRConfig())
    assert all(w.sha256 and w.size for w in plain.weights())
    assert plain.description()["rapidocr"] and plain.shorter_side == 736
    assert plain.fingerprint != OCR(OCRConfig(side=640)).fingerprint
