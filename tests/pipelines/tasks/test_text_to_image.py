"""Captions in a given proportion, and pictures whose text is quoted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import cv2
import numpy as np
import pytest

from tests.pipelines.tasks.annotated import make, skipped
from tests.pipelines.tasks.rows import row
from x2i.base.config import parse_config
from x2i.base.errors import RecipeError
from x2i.corpus.sample import Picture
from x2i.pipelines import recipe as recipes
from x2i.pipelines.images import encode
from x2i.pipelines.tasks.text_rendering import TextRendering, TextRenderingConfig
from x2i.pipelines.tasks.text_to_image import TextToImage, TextToImageConfig

THREE = {"rows.text": 1.0, "caption.long": 2.0, "caption.short": 1.0}


def t2i(**more: Any) -> TextToImage:
    return TextToImage(TextToImageConfig(**more))


def test_captions_are_drawn_in_the_given_proportion() -> None:
    task = t2i(captions=THREE)
    values = {"caption": {"long": "A long caption.", "short": "A short one."}}
    drawn = Counter[str]()
    on = row(text="The source's.", values=values)
    for on.seed in range(400):
        sample = make(task, on)["text_to_image"]
        column = sample.provenance["parameters"]["text"]
        assert sample.instruction == {"rows.text": "The source's.", "caption.long": "A long caption."}.get(
            column, "A short one."
        )
        drawn[column] += 1
    assert drawn["caption.long"] == pytest.approx(200, abs=30)
    assert drawn["rows.text"] == pytest.approx(100, abs=30)


def test_the_captions_that_a_row_lacks_leave_their_share_to_the_others() -> None:
    task = t2i(captions=THREE)
    values = {"caption": {"long": None, "short": "A short one."}}
    said = Counter(make(task, row(seed=n, text=" ", values=values))["text_to_image"].instruction for n in range(20))
    assert said == {"A short one.": 20}
    one = make(t2i(), row(text="  Word for word. "))["text_to_image"]
    assert one.instruction == "Word for word."
    assert one.provenance["parameters"] == {"text": "rows.text"}
    # a caption that may not be used is as good as none, and is the reason if no other is left
    bad = row(text="<|image_1|>", values=values)
    assert make(task, bad)["text_to_image"].instruction == "A short one."
    none = row(text="<|image_1|>", values={"caption": {"long": None, "short": None}})
    assert skipped(task, none) == {"text_to_image": "text_has_placeholders"}


def test_what_the_captions_need() -> None:
    def recipe(annotators: dict[str, Any], captions: dict[str, float]) -> recipes.Recipe:
        content = {"name": "t", "lake": "l", "out": "o", "sources": [{"kind": "folder", "name": "p", "path": "."}]}
        tasks = {"text_to_image": {"captions": captions}}
        return parse_config(recipes.Recipe, content | {"annotators": annotators, "tasks": tasks}, "r.yaml")

    with pytest.raises(RecipeError, match=r"reads caption.long: .*`caption: \{kind: caption\}`"):
        recipes.make(recipe({}, THREE), "r.yaml")
    assert recipes.make(recipe({"caption": {}}, THREE), "r.yaml").heavy_reads() == {}
    with pytest.raises(RecipeError, match="is no column"):
        recipes.make(recipe({}, {"long": 1.0}), "r.yaml")
    with pytest.raises(RecipeError, match="leave the column out"):
        recipes.make(recipe({}, {"rows.text": 0.0}), "r.yaml")


def sign(*lines: tuple[str, float], language: str | None = None, height: float = 0.1) -> dict[str, Any]:
    """What `ocr` says of a picture with these lines and confidences, one below the other."""
    return {
        "texts": [t for t, _ in lines],
        "confidence": [c for _, c in lines],
        "boxes": [[0.1, 0.1 + 0.15 * i, 0.6, 0.1 + 0.15 * i + height] for i in range(len(lines))],
        "language": language,
    }


def rendering(**more: Any) -> TextRendering:
    return TextRendering(TextRenderingConfig(**more))


def test_the_text_of_the_picture_is_quoted_in_reading_order() -> None:
    on = row(text="A shop window", values={"ocr": sign(("OPEN", 0.99), ("24 hours", 0.95))})
    sample = make(rendering(), on)["text_rendering"]
    assert '"OPEN", "24 hours"' in sample.instruction
    assert "A shop window" in sample.instruction
    assert sample.input_images == ()
    assert sample.provenance["parameters"]["lines"][0] == {"text": "OPEN", "confidence": 0.99, "box": [45, 30, 271, 60]}
    on = row(text=None, values={"ocr": sign(('5" nails', 0.99))})
    bare = make(rendering(), on)["text_rendering"].instruction
    assert '“5" nails”' in bare
    assert "None" not in bare


@pytest.mark.parametrize(
    ("ocr", "reason"),
    [
        (sign(), "no_text_in_picture"),
        (sign(("SMUDGE", 0.7)), "text_unsure"),
        (sign(("SURE", 0.99), ("SMUDGE", 0.7)), "text_unsure"),  # half of the text would go unsaid
        (sign(("SURE", 0.99), height=0.003), "text_unsure"),
        (sign(("8", 0.99)), "text_unsure"),  # a bowl may be read as an 8
        (sign(("Straße gesperrt", 0.99), language="de"), "other_language"),
        (sign(*[("one two three four", 0.99)] * 5), "too_much_text"),
        (sign(("© A. Photographer", 0.99)), "watermark"),
        (sign(("SALE", 0.99), ("www.example.org", 0.5)), "watermark"),
        (sign(("<|image_1|>", 0.99)), "text_has_placeholders"),
        (dict.fromkeys(sign()), "not_annotated"),
    ],
)
def test_what_cannot_be_read_or_should_not_be_drawn_is_skipped(ocr: dict[str, Any], reason: str) -> None:
    assert skipped(rendering(languages=["en"]), row(values={"ocr": ocr})) == {"text_rendering": reason}


def test_limits_are_the_recipes() -> None:
    two = row(values={"ocr": sign(("SURE", 0.99), ("SMUDGE", 0.7))})
    said = make(rendering(max_unread=0.6), two)["text_rendering"].instruction
    assert '"SURE"' in said
    assert "SMUDGE" not in said
    assert make(rendering(marks=True), row(values={"ocr": sign(("© A. Photographer", 0.99))}))
    assert make(rendering(languages=["en"]), row(values={"ocr": sign(("OPEN", 0.99))}))  # too short to tell


def test_ocrs_own_columns_are_what_is_read() -> None:
    """The real annotator on a sign that OpenCV letters: found, quoted, placed."""
    from tests.pipelines.annotating import batch, run
    from tests.pipelines.annotators.registry import fetched
    from x2i.pipelines.annotators.ocr import OCR

    image = np.full((240, 480, 3), 235, np.uint8)
    cv2.putText(image, "FRESH BREAD", (40, 130), cv2.FONT_HERSHEY_DUPLEX, 1.8, (20, 20, 20), 3, cv2.LINE_AA)
    data = encode(image, "png")
    table = run(fetched(OCR(OCR.Config())), batch([data]))
    on = row(text="A bakery's sign.", values={"ocr": table.to_pylist()[0]}, picture=Picture(data, "png", 480, 240))
    task = rendering()
    assert {column.partition(".")[2] for column in task.reads} <= set(OCR.columns.names)
    sample = make(task, on)["text_rendering"]
    assert '"FRESH BREAD"' in sample.instruction
    x1, y1, x2, y2 = sample.provenance["parameters"]["lines"][0]["box"]
    assert (image[y1:y2, x1:x2] < 128).sum() == (image < 128).sum()  # every letter is in the box
