"""Subjects of a picture: what is cut out is what the boxes and masks say, and the caption has it in its place."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.pipelines.drawn import ellipse
from tests.pipelines.tasks.regions import PLACES, TEXTS, seen, values
from tests.pipelines.tasks.rows import pixels, row
from x2i.base.config import parse_config
from x2i.base.errors import RecipeError
from x2i.corpus.sample import PLACEHOLDER, Sample, placeholder
from x2i.pipelines import recipe as recipes
from x2i.pipelines.boxes import edges, nested
from x2i.pipelines.images import encode
from x2i.pipelines.masks import cut_out
from x2i.pipelines.regions import apart
from x2i.pipelines.tasks import _spans
from x2i.pipelines.tasks._regions import regions
from x2i.pipelines.tasks.base import Selected, Skipped
from x2i.pipelines.tasks.subject import Subject, SubjectConfig

ONE, SEVERAL = "subject_to_image", "subjects_to_image"


def made(on: Selected, *tasks: Any, **more: Any) -> list[Sample | Skipped]:
    given = {"most": 9, "area": (0.001, 0.9), "min_side": 1, "tasks": tasks or (ONE,)} | more
    return list(Subject(SubjectConfig(**given)).build(on))


def samples(on: Selected, *tasks: Any, **more: Any) -> list[Sample]:
    found = made(on, *tasks, **more)
    assert all(isinstance(s, Sample) for s in found), found
    return [s for s in found if isinstance(s, Sample)]


def subjects(sample: Sample) -> list[dict[str, Any]]:
    return list(sample.provenance["parameters"]["subjects"])


def bare(instruction: str) -> str:
    return PLACEHOLDER.sub(r"<\1>", instruction)


def test_a_cut_out_is_the_masked_object_on_white() -> None:
    on = seen("astronaut.png")
    size = on.picture.width, on.picture.height
    found = samples(on, margin=0)
    assert {subjects(s)[0]["object"] for s in found} == {p for p, _, _ in PLACES["astronaut.png"]}
    for sample in found:
        (subject,) = subjects(sample)
        mask = ellipse(size, PLACES["astronaut.png"][subject["box_index"]][1])
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        part = np.s_[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
        expected = np.where(mask[part][..., None], on.pixels[part], 255)
        assert np.array_equal(pixels(sample.input_images[0]), expected)
        assert sample.output_image == on.picture and sample.provenance["untouched"]
        assert sample.mask is None


def test_margins_are_white_and_sides_bounded() -> None:
    on = seen("astronaut.png")
    for sample in samples(on, margin=0.25, side=100):
        cut = pixels(sample.input_images[0])
        height, width = cut.shape[:2]
        assert max(height, width) == 100
        rim = round(0.25 * 100 / 1.5) - 2
        assert (cut[:rim] == 255).all() and (cut[:, -rim:] == 255).all()
        assert (cut[height // 2, width // 2] != 255).any()
    assert made(on, min_side=600) == [Skipped(ONE, "too_few_pixels")]


def test_the_caption_has_pictures_in_place_of_the_phrases() -> None:
    on = seen("astronaut.png")
    (sample,) = samples(on, SEVERAL, in_caption=1)
    assert [s["object"] for s in subjects(sample)] == ["a smiling woman", "a space shuttle", "her helmet"]
    assert [int(n) for n in PLACEHOLDER.findall(sample.instruction)] == [1, 2, 3]
    # what stands between the phrases is left as it was
    assert " stands before " in sample.instruction and " beside her." in sample.instruction
    for one in samples(on, in_caption=1):
        start, end = _spans.only(
            TEXTS["astronaut.png"].replace("A smiling", "a smiling"), subjects(one)[0]["object"]
        ) or (0, 0)
        rest = TEXTS["astronaut.png"][:start], TEXTS["astronaut.png"][end:]
        assert all(part in one.instruction for part in rest)
        assert end > start and PLACEHOLDER.findall(one.instruction) == ["1"]


def test_beside_the_caption_subjects_are_listed_by_name() -> None:
    (sample,) = samples(seen("astronaut.png"), SEVERAL, in_caption=0)
    said = bare(sample.instruction)
    assert TEXTS["astronaut.png"] in said
    for number, subject in enumerate(subjects(sample), 1):
        assert re.search(rf"{subject['object']}[^<]*<{number}>", said)
    # a phrase that the caption does not have cannot be replaced there
    (other,) = samples(seen("astronaut.png", text="In space."), SEVERAL, in_caption=1)
    assert not other.provenance["parameters"]["in_caption"] and "In space." in other.instruction


@pytest.mark.parametrize("number", range(20))
def test_every_wording_makes_an_instruction(number: int) -> None:
    for name in PLACES:
        for sample in samples(seen(name, seed=number), min_side=1):
            assert placeholder(1) in sample.instruction and "{" not in sample.instruction
            assert sample.input_images and sample.key


def test_spans_are_replaced_in_any_script() -> None:
    text = "Ein Café; le CAFÉ? A 🐈 und ein Cafébesuch: 一辆红色汽车停在路边"
    assert _spans.only(text, "Ein café") == (0, 8)
    assert _spans.only(text, "Café") is None  # twice as a word of its own
    assert _spans.only(text, "cat") is None
    span = _spans.only(text, "红色汽车")
    assert span is not None and text[slice(*span)] == "红色汽车"
    cat = _spans.only(text, "🐈")
    assert cat is not None
    out = _spans.replaced(text, [span, cat], ["<2>", "<1>"])
    assert out == "Ein Café; le CAFÉ? A <1> und ein Cafébesuch: 一辆<2>停在路边"
    assert _spans.only("a T-shirt and a shirt", "shirt") == (16, 21)
    assert _spans.only("the man's hat", "the man") == (0, 7)
    assert _spans.disjoint([(3, 5), (0, 3)]) and not _spans.disjoint([(0, 4), (3, 5)])


def test_spans_of_a_column_tell_equal_phrases_apart() -> None:
    text = "🚀 a cup, and another: a cup."
    given = values("coffee.png")
    given["grounding"] |= {"phrases": ["a cup", "a spoon"], "phrase_index": [1, 0]}
    given["entities"] = {
        "noun_chunks": [{"text": "a spoon", "start": 0, "end": 1}, {"text": "a cup", "start": 22, "end": 27}]
    }
    on = seen("coffee.png", text=text, values=given)
    cup = next(s for s in samples(on, in_caption=1, spans="entities.noun_chunks") if subjects(s)[0]["box_index"] == 0)
    assert "🚀 a cup, and another: " in cup.instruction and cup.provenance["parameters"]["in_caption"]
    without = next(s for s in samples(on, in_caption=1) if subjects(s)[0]["box_index"] == 0)
    assert not without.provenance["parameters"]["in_caption"]


def test_boxes_of_grit_bring_their_characters() -> None:
    caption = " A cup, a cup and a spoon 🥄"
    boxes = {c: box for c, (_, box, _) in zip("cs", PLACES["coffee.png"], strict=True)}
    meta = {
        "caption": caption,
        "noun_chunks": [
            [8, 13, *boxes["c"], 0.9],
            [18, 25, -0.001, *boxes["s"][1:], 0.8],
            [1, 6, 0.0, 0.0, 1.0, 1.0, 0.9],  # the whole picture
            "no box",
        ],
    }
    on = row("coffee.png", text=caption.strip(), meta=meta)
    found = samples(on, boxes="rows.meta.noun_chunks", masks=None, margin=0, in_caption=1, area=(0.01, 0.8))
    by_index = {subjects(s)[0]["box_index"]: s for s in found}
    assert set(by_index) == {0, 1}
    assert subjects(by_index[0])[0]["object"] == "a cup" and subjects(by_index[1])[0]["box"][0] == 0.0
    assert "A cup, " in by_index[0].instruction and " and a spoon 🥄" in by_index[0].instruction
    assert Subject(SubjectConfig(boxes="rows.meta.noun_chunks", masks=None)).reads == {}
    assert made(row(), boxes="rows.meta.noun_chunks", masks=None) == [Skipped(ONE, "not_annotated")]


def test_rectangles_without_masks_need_no_model_hub() -> None:
    face = [0.36, 0.12, 0.52, 0.36]
    found = {"boxes": [face, [0.0, 0.0, 0.05, 0.05]], "scores": [0.99, 0.95]}
    config: dict[str, Any] = {"boxes": "faces.boxes", "name": "a person", "masks": None, "margin": 0.5}
    on = row("astronaut.png", text="An astronaut.", values={"faces": found})
    (sample,) = samples(on, area=(0.01, 0.8), **config)
    x1, y1, x2, y2 = (round(v * 512) for v in face)
    room = round(0.5 * (y2 - y1))
    expected = on.pixels[max(0, y1 - room) : y2 + room, x1 - room : x2 + room].astype(int)
    assert np.abs(pixels(sample.input_images[0]) - expected).mean() < 3  # a JPEG
    assert "a person" in sample.instruction and "An astronaut." in sample.instruction
    assert made(on, area=(0.01, 0.1), **config) == [Skipped(ONE, "too_large")]  # with its margin
    reads = Subject(SubjectConfig(**config)).reads
    assert reads == {"faces.boxes": "faces: {kind: faces}", "faces.scores": "faces: {kind: faces}"}
    people = [{"box": face, "score": 0.9, "keypoints": []}]
    posed = row("astronaut.png", text="An astronaut.", values={"pose": {"people": people}})
    assert samples(posed, **(config | {"boxes": "pose.people"}))
    assert list(Subject(SubjectConfig(**(config | {"boxes": "pose.people"}))).reads) == ["pose.people"]


def test_passers_by_are_left_out_where_no_phrase_says_who_is_meant() -> None:
    boxes = [[0.36, 0.12, 0.52, 0.36], [0.7, 0.1, 0.78, 0.2], [0.1, 0.5, 0.24, 0.7]]
    on = row("astronaut.png", text="Astronauts.", values={"faces": {"boxes": boxes, "scores": [0.9, 0.99, 0.95]}})
    config: dict[str, Any] = {"boxes": "faces.boxes", "name": "a face", "masks": None}
    assert {subjects(s)[0]["box_index"] for s in samples(on, **config)} == {0, 2}
    (both,) = samples(on, SEVERAL, **config)
    assert [s["box_index"] for s in subjects(both)] == [0, 2]
    assert len(samples(on, of_largest=0, **config)) == 3


def test_repainted_cut_outs_are_the_input_and_the_picture_stays() -> None:
    other = np.full((40, 30, 3), 90, np.uint8)
    given = values("coffee.png") | {"repaint": {"images": [None, encode(other, "png")]}}
    on = seen("coffee.png", values=given)
    (sample,) = samples(on, repaint="repaint.images")
    assert subjects(sample)[0]["object"] == "a spoon" and sample.provenance["parameters"]["repainted"]
    assert np.abs(pixels(sample.input_images[0]).astype(int) - 90).max() <= 1
    assert sample.output_image == on.picture
    none = given | {"repaint": {"images": [None, None]}}
    assert made(seen("coffee.png", values=none), repaint="repaint.images") == [Skipped(ONE, "not_repainted")]
    assert "repaint.images" in Subject(SubjectConfig(repaint="repaint.images")).reads


def test_mirrored_cut_outs() -> None:
    on = seen("coffee.png")
    plain, mirrored = ({s.key: s for s in samples(on, flip=share)} for share in (0, 1))
    assert plain.keys() == mirrored.keys()
    for key, sample in mirrored.items():
        first, second = pixels(plain[key].input_images[0]), pixels(sample.input_images[0])
        assert np.array_equal(first[:, ::-1], second) and subjects(sample)[0]["flipped"]


def test_nested_boxes_are_not_two_subjects() -> None:
    given = values("astronaut.png")
    given["grounding"]["boxes"].append([0.31, 0.05, 0.6, 0.2])
    given["grounding"]["phrases"].append("her hair")
    given["grounding"]["scores"].append(0.65)
    masks = given["masks"]
    masks |= {"masks": [*masks["masks"], masks["masks"][1]], "box_index": [0, 1, 2, 3], "predicted_iou": [0.9] * 4}
    (sample,) = samples(seen("astronaut.png", values=given), SEVERAL)
    assert "her hair" not in [s["object"] for s in subjects(sample)]
    (pair,) = samples(seen("astronaut.png", values=given), SEVERAL, max_subjects=2)
    assert [s["object"] for s in subjects(pair)] == ["a smiling woman", "a space shuttle"]  # the two surest
    assert made(seen("chelsea.png"), SEVERAL) == [Skipped(SEVERAL, "one_subject")]


def test_phrases_with_several_boxes_make_no_subject_but_the_same_thing_found_twice_does() -> None:
    assert [subjects(s)[0]["object"] for s in samples(seen("chelsea.png"))] == ["a cat"]
    twice = values("chelsea.png")
    x1, y1, x2, y2 = twice["grounding"]["boxes"][0]
    twice["grounding"]["boxes"][1] = [x1 + 0.01, y1, x2, y2]
    found = samples(seen("chelsea.png", values=twice))
    assert sorted((subjects(s)[0]["object"], subjects(s)[0]["box_index"]) for s in found) == [
        ("a cat", 2),
        ("green eyes", 0),
    ]


def test_unfit_ones_are_skipped_with_the_reason_of_the_one_that_got_furthest() -> None:
    on = seen("coffee.png")
    assert made(row(text=None)) == [Skipped(ONE, "no_text")]
    assert made(row(text="<|image_1|>")) == [Skipped(ONE, "text_has_placeholders")]
    assert made(row()) == [Skipped(ONE, "not_annotated")]
    assert made(on, min_score=0.9) == [Skipped(ONE, "unsure_box")]
    assert made(on, area=(0.5, 0.9)) == [Skipped(ONE, "too_small")]
    assert made(on, area=(0.0, 0.01)) == [Skipped(ONE, "too_large")]
    assert made(on, min_iou=0.99) == [Skipped(ONE, "poor_mask")]
    assert made(seen("astronaut.png"), max_edges=0, min_score=0.75) == [Skipped(ONE, "at_the_edge")]
    chelsea = values("chelsea.png")
    chelsea["grounding"]["phrases"] = ["eyes", "eyes", "the photo", "it"]
    assert made(seen("chelsea.png", values=chelsea)) == [Skipped(ONE, "several_boxes")]
    poor = values("coffee.png")
    poor["masks"] |= {"box_index": [5, 6]}
    assert made(seen("coffee.png", values=poor)) == [Skipped(ONE, "no_mask")]
    assert {m.task_type for m in made(row(), ONE, SEVERAL)} == {ONE, SEVERAL}


def test_the_seed_draws_which_subject_and_content_decides_all_else() -> None:
    on = seen("astronaut.png")
    drawn = {subjects(samples(replace(on, seed=n), most=1)[0])[0]["object"] for n in range(12)}
    assert len(drawn) == 3
    first, again = (samples(on, ONE, SEVERAL) for _ in range(2))
    assert [s.members() for s in first] == [s.members() for s in again]
    assert len({s.key for s in first}) == len(first) == 4


def test_recipes_and_configurations_that_cannot_work_are_refused() -> None:
    given = recipes.Recipe(
        name="r", lake="l", out="o", sources=[{"kind": "folder", "path": "."}],
        annotators={"grounding": {"phrases": ["cat"]}}, tasks={"subject": None},
    )  # fmt: skip
    with pytest.raises(RecipeError, match=r"e\.g\. `masks: \{kind: masks, boxes: grounding\.boxes\}`"):
        recipes.make(given)
    for wrong in ({"boxes": "grounding"}, {"repaint": "repaint"}, {"boxes": "rows.meta.x", "spans": "entities.x"}):
        with pytest.raises(RecipeError, match=r"boxes|repaint|spans"):
            parse_config(SubjectConfig, wrong, "tasks.subject")


def test_a_wording_without_its_pictures_is_refused(tmp_path: Any) -> None:
    file = tmp_path / "words.yaml"
    file.write_text("in_caption: Draw this.\nplace: '{image}'\nbeside: '{subjects}: {text}'\nlisted: '{image}'\n")
    with pytest.raises(RecipeError, match=r"words\.yaml: in_caption: 'Draw this\.' lacks \{text\}"):
        Subject(SubjectConfig(instructions=str(file)))


def test_boxes_and_cut_outs_are_what_their_numbers_say() -> None:
    assert nested((0, 0, 0.5, 0.5), (0.1, 0.1, 0.2, 0.2)) == pytest.approx(1)
    assert nested((0, 0, 0.2, 0.2), (0.1, 0, 0.3, 0.2)) == pytest.approx(0.5)
    assert nested((0, 0, 0.2, 0.2), (0.2, 0, 0.3, 0.2)) == 0
    assert [edges(b) for b in ((0, 0, 1, 1), (0.1, 0, 0.9, 0.9), (0.1, 0.1, 0.9, 0.9))] == [4, 1, 0]
    found = regions(seen("chelsea.png"), "grounding.boxes", masks="masks") or []
    assert [r.number for r in apart(found, 0.8)] == [2]  # the cat is surest, and has the rest in it
    rng = np.random.default_rng(1)
    picture = rng.integers(0, 255, (20, 30, 3), np.uint8)
    mask = np.zeros((20, 30), bool)
    mask[5:9, 10:20] = True
    mask[19, 0] = True  # a speck far from the box
    cut = cut_out(picture, (0.3, 0.2, 0.7, 0.5), mask, 0.1)
    assert cut is not None and cut[0].shape == (6, 12, 3) and cut[1].sum() == 40
    assert np.array_equal(cut[0][1:-1, 1:-1], picture[5:9, 10:20]) and (cut[0][~cut[1]] == 255).all()
    assert cut_out(picture, (0.0, 0.0, 0.2, 0.2), mask, 0.0) is None
