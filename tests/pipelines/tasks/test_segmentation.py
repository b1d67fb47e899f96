"""Segmentation by words: what is named is painted, the mask says where, and nothing else changes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.pipelines.drawn import ellipse
from tests.pipelines.tasks.regions import PLACES, seen, values
from tests.pipelines.tasks.rows import pixels, row
from x2i.base.config import parse_config
from x2i.base.errors import RecipeError
from x2i.corpus.sample import Sample
from x2i.pipelines import recipe as recipes
from x2i.pipelines.images import encode
from x2i.pipelines.regions import VAGUE, is_vague
from x2i.pipelines.tasks._masks import painted
from x2i.pipelines.tasks._nouns import inside
from x2i.pipelines.tasks.base import Selected, Skipped
from x2i.pipelines.tasks.few_shot import FewShot, FewShotConfig
from x2i.pipelines.tasks.segmentation import COLOURS, Segmentation, SegmentationConfig


def made(on: Selected, *tasks: Any, **more: Any) -> list[Sample | Skipped]:
    given = {"most": 9, "area": (0.001, 0.9), "tasks": tasks or ("referring_segmentation",)} | more
    return list(Segmentation(SegmentationConfig(**given)).build(on))


def samples(on: Selected, *tasks: Any, **more: Any) -> dict[str, Sample]:
    """By what is painted."""
    found = made(on, *tasks, **more)
    assert all(isinstance(s, Sample) for s in found), found
    return {s.provenance["parameters"]["object"]: s for s in found if isinstance(s, Sample)}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_mask_is_painted_and_no_other_pixel_changes(name: str, alpha: float) -> None:
    on = seen(name)
    for sample in samples(on, alpha=alpha, min_change=0).values():
        white = pixels(sample.mask)[..., 0] == 255
        output = pixels(sample.output_image)
        assert sample.input_images == (on.picture,)
        assert np.array_equal(output[~white], on.pixels[~white])
        expected = alpha * np.array(COLOURS["blue"]) + (1 - alpha) * on.pixels[white]
        assert np.abs(output[white] - expected).max() <= 0.5
        assert sample.provenance["parameters"]["share"] == round(float(white.mean()), 4)
        assert not sample.provenance["untouched"]


def test_a_phrase_with_several_boxes_paints_them_all_and_says_so() -> None:
    on = seen("chelsea.png")
    eyes = samples(on)["green eyes"]
    size = on.picture.width, on.picture.height
    both = ellipse(size, PLACES["chelsea.png"][0][1]) | ellipse(size, PLACES["chelsea.png"][1][1])
    assert np.array_equal(pixels(eyes.mask)[..., 0] == 255, both)
    task = Segmentation(SegmentationConfig())
    for what, key in (("green eyes", ".several"), ("a cat", "")):
        texts = task.instructions.texts[f"referring_segmentation{key}"]
        said = {t.format(image="<img><|image_1|></img>", object=what, colour="blue") for t in texts}
        assert samples(on)[what].instruction in said


def test_masks_of_another_size_cover_the_same_place() -> None:
    small, same = (samples(seen("astronaut.png", scale)) for scale in (0.25, 1.0))
    for what, sample in small.items():
        first, second = (pixels(s.mask)[..., 0] > 0 for s in (sample, same[what]))
        assert (first & second).sum() / (first | second).sum() > 0.95


def test_each_object_is_one_sample_with_its_own_key_and_the_seed_chooses() -> None:
    on = seen("astronaut.png")
    every = samples(on)
    assert set(every) == {"a space shuttle", "a smiling woman", "her helmet"}
    assert len({s.key for s in every.values()}) == 3
    drawn = {next(iter(samples(replace(on, seed=n), most=1))) for n in range(24)}
    assert drawn == set(every)
    assert [s.members() for s in samples(on).values()] == [s.members() for s in every.values()]


def test_a_phrase_is_painted_whole_or_not_at_all() -> None:
    changed = values("chelsea.png")
    changed["grounding"]["scores"] = [0.8, 0.3, 0.2, 0.9]
    assert made(seen("chelsea.png", values=changed)) == [Skipped("referring_segmentation", "unsure_box")]
    changed = values("chelsea.png")
    changed["masks"]["predicted_iou"] = [0.9, 0.5, 0.99, 0.9]
    assert set(samples(seen("chelsea.png", values=changed))) == {"a cat"}
    changed["masks"]["box_index"] = [0, 1, 7, 8]
    assert made(seen("chelsea.png", values=changed)) == [Skipped("referring_segmentation", "poor_mask")]


def test_what_cannot_be_painted_is_skipped_with_a_reason() -> None:
    task = "referring_segmentation"
    empty: dict[str, list[Any]] = {"boxes": [], "phrases": [], "scores": []}
    masks: dict[str, list[Any]] = {"masks": [], "box_index": [], "predicted_iou": []}
    assert made(row()) == [Skipped(task, "not_annotated")]
    assert made(row(values={"grounding": empty})) == [Skipped(task, "not_annotated")]
    assert made(row(values={"grounding": empty, "masks": masks})) == [Skipped(task, "no_box")]
    assert made(seen("coffee.png"), area=(0.5, 0.9)) == [Skipped(task, "too_small")]
    assert made(seen("coffee.png"), area=(0.0, 0.01)) == [Skipped(task, "too_large")]
    marked = values("coffee.png")
    marked["grounding"]["phrases"] = ["<|image_2|> cup", "it"]
    assert made(seen("coffee.png", values=marked)) == [Skipped(task, "vague_phrase")]


def test_a_thing_is_not_painted_in_its_own_colour() -> None:
    blue = np.zeros((60, 80, 3), np.uint8)
    blue[..., 2] = 250
    flat = row()
    flat.picture = replace(flat.picture, data=encode(blue, "png"), width=80, height=60)
    flat.values = values("coffee.png")
    assert made(flat) == [Skipped("referring_segmentation", "of_that_colour_already")]
    for sample in samples(flat, colours=("blue", "red")).values():
        assert sample.provenance["parameters"]["colour"] == "red"
        assert "red" in sample.instruction and "blue" not in sample.instruction


def test_classes_of_a_map_are_painted_by_their_first_name() -> None:
    labels = np.zeros((75, 113), np.uint8)  # a quarter of chelsea's sides
    labels[:30] = 2
    labels[60:, 50:] = 126
    said = [
        {"id": 2, "name": "sky", "area": 0.4},
        {"id": 0, "name": "wall", "area": 0.5},
        {"id": 126, "name": "animal, animate being;beast", "area": 0.1},
    ]
    on = row(values={"semantic": {"map": encode(labels, "png"), "labels": said}})
    found = samples(on, "semantic_segmentation")
    assert set(found) == {"sky", "wall", "animal"}
    covered = sum((pixels(s.mask)[..., 0] == 255).astype(int) for s in found.values())
    assert (covered == 1).all()  # every pixel has one class
    sky = pixels(found["sky"].mask)[..., 0] == 255
    assert sky[:118].all() and not sky[122:].any()
    assert "sky" in found["sky"].instruction
    assert found["animal"].provenance["parameters"]["class"] == 126


def test_reasoning_takes_its_question_from_a_column() -> None:
    with pytest.raises(RecipeError, match="question"):
        parse_config(SegmentationConfig, {"tasks": ["reasoning_segmentation"]}, "tasks.segmentation")
    kind, column = "reasoning_segmentation", "asked.questions"
    asked = ["What does it see with?", None, "Which animal is this?", None]
    given = values("chelsea.png") | {"asked": {"questions": asked}}
    found = samples(seen("chelsea.png", values=given), kind, question=column)
    assert set(found) == {"green eyes", "a cat"}
    assert "What does it see with?" in found["green eyes"].instruction
    assert "green eyes" not in found["green eyes"].instruction
    # one question a row: of several phrases it is not known which it asks for
    several = seen("coffee.png", meta={"question": "What holds the coffee?"})
    assert made(several, kind, question="rows.meta.question") == [Skipped(kind, "several_objects")]
    one = values("coffee.png")
    one["masks"]["predicted_iou"][1] = 0.1
    alone = seen("coffee.png", values=one, meta={"question": "What holds the coffee?"})
    assert (
        "What holds the coffee?" in samples(alone, kind, question="rows.meta.question")["a cup of espresso"].instruction
    )
    assert made(seen("coffee.png"), kind, question="rows.meta.question") == [Skipped(kind, "no_question")]


def test_a_recipe_without_the_annotators_is_refused_with_the_remedy() -> None:
    def given(annotators: dict[str, Any], **task: Any) -> recipes.Recipe:
        return recipes.Recipe(
            name="r", lake="l", out="o", sources=[{"kind": "folder", "path": "."}],
            annotators=annotators, tasks={"segmentation": task},
        )  # fmt: skip

    with pytest.raises(RecipeError, match=r"e\.g\. `grounding: \{kind: grounding\}`"):
        recipes.make(given({}))
    fixed: dict[str, Any] = {"grounding": {"phrases": ["cat"]}}
    with pytest.raises(RecipeError, match=r"e\.g\. `masks: \{kind: masks, boxes: grounding\.boxes\}`"):
        recipes.make(given(fixed))
    plan = recipes.make(given(fixed | {"masks": None}))
    assert plan.heavy_reads()["masks"][1] == ["masks"]
    with pytest.raises(RecipeError, match=r"e\.g\. `semantic: \{kind: semantic\}`"):
        recipes.make(given({}, tasks=["semantic_segmentation"]))


def test_it_can_be_shown_by_an_example() -> None:
    few = FewShot(FewShotConfig(of={"segmentation": {"area": [0.001, 0.9]}}))
    assert few.task_types() == ["few_shot_referring_segmentation"]
    shown = few._made(seen("chelsea.png"))["referring_segmentation"]
    assert isinstance(shown, Sample) and json.loads(dict(shown.members())["json"])["mask"].endswith("mask.png")


def test_paint_is_exact_and_vague_phrases_are_known() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (9, 7, 3), np.uint8)
    mask = rng.random((9, 7)) < 0.4
    before = picture.copy()
    out = painted(picture, mask, (255, 0, 10), 0.25)
    assert np.array_equal(picture, before) and np.array_equal(out[~mask], picture[~mask])
    assert np.array_equal(out[mask], np.rint(0.25 * np.array([255, 0, 10]) + 0.75 * picture[mask]))
    assert all(is_vague(p) for p in ("It", "the background", "a photo", "this one", "", "—"))
    assert not any(is_vague(p) for p in ("a photo frame", "the cat", "ein Auto", "红色汽车"))
    assert len(set(VAGUE)) == len(VAGUE)
    assert [inside(p) for p in ("A cat", "Her hat", "An", "Anna's hat", "a cat", "Äpfel")] == [
        "a cat", "her hat", "an", "Anna's hat", "a cat", "Äpfel",
    ]  # fmt: skip
