"""Edits of real photographs: what stays the same to the last bit, what is said of colours, which picture is the answer."""

from __future__ import annotations

import colorsys
import re
from typing import Any

import cv2
import duckdb
import numpy as np
import pyarrow as pa
import pytest
from PIL import ImageColor

from tests.pipelines.annotating import batch, photo
from tests.pipelines.annotators.registry import fetched
from tests.pipelines.builds import recipe
from tests.pipelines.drawn import code, ellipse
from tests.pipelines.tasks.annotated import make, skipped
from tests.pipelines.tasks.inline import build
from tests.pipelines.tasks.rows import PHOTOS, pixels, row
from x2i.base.errors import RecipeError
from x2i.corpus.sample import Picture, Sample
from x2i.corpus.verify import verify
from x2i.pipelines import recipe as recipes
from x2i.pipelines.annotators.erase import Erase, EraseConfig
from x2i.pipelines.annotators.faces import Faces, FacesConfig
from x2i.pipelines.images import encode, resize
from x2i.pipelines.regions import Region, numbered, read, things
from x2i.pipelines.tasks import _recolour
from x2i.pipelines.tasks._backgrounds import blurred, cover_of, fitted, without
from x2i.pipelines.tasks._masks import place_of
from x2i.pipelines.tasks._nouns import bare, definite, indefinite
from x2i.pipelines.tasks._styles import STYLES
from x2i.pipelines.tasks.base import Found, Selected, Skipped
from x2i.pipelines.tasks.editing import GROUPED, OF_SUBJECTS, Editing, EditingConfig

#: Shares of `coffee` (a red cup and saucer, a spoon) and of `chelsea` (a cat's head), by eye.
SAUCER, SPOON, CAT = [0.13, 0.45, 0.79, 0.98], [0.535, 0.595, 0.685, 0.825], [0.2, 0.05, 0.75, 0.85]
MASKED = tuple(k for k in ("remove_object", "add_object", "recolour", "recolour_all", *OF_SUBJECTS))
#: Hue circles as colorsys has them, in degrees: what anyone would call these names.
HSV = {
    "red": (345, 20), "orange": (15, 45), "yellow": (42, 72), "green": (70, 170), "turquoise": (160, 200),
    "blue": (195, 265), "purple": (255, 330),
}  # fmt: skip


def editing(*kinds: str, **config: Any) -> Editing:
    return Editing(EditingConfig(tasks=kinds or ("style", "unstyle", "recolour_all"), **config))


def scene(name: str = "coffee.png", objects: dict[str, list[float]] | None = None, side: int = 300) -> Selected:
    """A photograph as it is stored (smaller than its original), with phrases and masks; `erase` saw the original."""
    objects = objects or {"a red saucer": SAUCER, "a spoon": SPOON}
    original = pixels(row(name).picture)
    scale = side / min(original.shape[:2])
    small = resize(original, *(round(n * scale) for n in original.shape[1::-1]))
    phrases, boxes = list(objects), list(objects.values())
    size = (original.shape[1] // 2, original.shape[0] // 2)
    masks = {"masks": [code(ellipse(size, b)) for b in boxes], "box_index": list(range(len(boxes)))}
    columns = {"grounding.boxes": [boxes], "grounding.phrases": [phrases]} | {
        f"masks.{k}": [v] for k, v in masks.items()
    }
    (erased,) = Erase(EraseConfig(area=(0.001, 0.06)))(batch([photo(name.split(".")[0])], columns=columns)).to_pylist()
    values = {"grounding": {"phrases": phrases, "boxes": boxes}, "masks": masks, "erase": erased}
    stored = Picture(encode(small, "jpg"), "jpg", small.shape[1], small.shape[0])
    return row(name, picture=stored, values=values, text="A cup of coffee on a table")


def grouped(selected: Selected) -> Selected:
    selected.groups = tuple(Found(kind, (row("china.jpg"),), {}) for kind in GROUPED)
    return selected


@pytest.mark.parametrize("name", STYLES)
def test_a_style_changes_the_picture_the_same_way_each_time_and_at_every_size(name: str) -> None:
    style, picture = STYLES[name], resize(pixels(row("chelsea.png").picture), 300, 200)
    drawn = style.parameters(np.random.default_rng(0))
    before = picture.copy()
    after = style.apply(picture, **drawn)
    assert after.shape == picture.shape and after.dtype == np.uint8
    assert np.array_equal(picture, before)
    assert np.abs(after.astype(int) - picture).mean() > 4
    assert np.array_equal(style.apply(picture, **drawn), after)
    if style.colour:
        assert (
            np.abs(cv2.cvtColor(after, cv2.COLOR_RGB2LAB).astype(int) - cv2.cvtColor(picture, cv2.COLOR_RGB2LAB))[
                ..., 1:
            ].mean()
            > 1
        )
    for odd in ((1, 1), (2, 90), (70, 3), (33, 47)):
        assert style.apply(np.ascontiguousarray(picture[: odd[0], : odd[1]]), **drawn).shape[:2] == odd


def test_styles_are_what_they_are_called() -> None:
    picture = pixels(row("coffee.png").picture)
    after = {n: s.apply(picture, **s.parameters(np.random.default_rng(1))) for n, s in STYLES.items()}
    for name in ("black_and_white", "halftone", "pencil_sketch", "line_drawing", "charcoal"):
        assert np.array_equal(after[name][..., 0], after[name][..., 2]), name
    assert np.array_equal(255 - after["negative"], picture)
    red, green, blue = after["sepia"].reshape(-1, 3).mean(axis=0)
    assert red > green > blue
    assert len(np.unique(after["posterise"])) <= 5
    assert after["pencil_sketch"].mean() > 170 and after["oil_painting"].mean() == pytest.approx(picture.mean(), abs=4)
    corner, middle = np.s_[:20, :20], np.s_[190:210, 290:310]
    lost = [after["dark_corners"][part].mean() / picture[part].mean() for part in (corner, middle)]
    assert lost[0] < 0.45 < 0.97 < lost[1]
    blocks = after["pixelate"]
    assert (np.diff(blocks.astype(int), axis=1) == 0).all(axis=2).mean() > 0.85
    for tone in (60, 128, 200):  # a print covers as much of the paper as the tone is dark
        flat = np.full((256, 256, 3), tone, np.uint8)
        assert STYLES["halftone"].apply(flat, 0.03).mean() == pytest.approx(tone, abs=12)


def test_the_photograph_is_the_answer_to_a_style_that_goes() -> None:
    made = make(editing("style", "unstyle"), row("coffee.png"))
    forward, back = made["style"], made["unstyle"]
    photograph = row("coffee.png").picture
    assert (forward.input_images[0], back.output_image) == (photograph, photograph)
    assert back.provenance["untouched"] is True and forward.provenance["untouched"] is False
    assert forward.mask is None and back.mask is None
    for sample in made.values():
        drawn = dict(sample.provenance["parameters"])
        assert "{" not in sample.instruction
        styled = forward.output_image if sample is forward else back.input_images[0]
        expected = STYLES[drawn.pop("style")].apply(pixels(photograph), **drawn)
        assert np.abs(pixels(styled).astype(int) - expected).mean() < 4  # JPEG


def test_grey_photographs_lose_no_colour() -> None:
    colours = tuple(n for n, s in STYLES.items() if s.colour)
    assert skipped(editing("style", styles=colours), row("camera.png")) == {"style": "already_grey"}
    assert "style" in make(editing("style", styles=(*colours, "negative")), row("camera.png"))


def test_an_edit_changes_nothing_outside_its_mask() -> None:
    made = make(editing(*MASKED), grouped(scene()))
    assert set(made) == set(MASKED)
    for kind, sample in made.items():
        assert sample.mask is not None and sample.output_image is not None
        mask = pixels(sample.mask)[..., 0]
        assert set(np.unique(mask)) == {0, 255}
        before, after = pixels(sample.input_images[0]), pixels(sample.output_image)
        difference = np.abs(before.astype(int) - after).max(axis=2)
        assert before.shape == after.shape and mask.shape == before.shape[:2]
        assert not difference[mask == 0].any(), kind
        assert (difference[mask > 0] > 4).mean() > 0.8, kind
        real = kind not in ("remove_object", "background_plain", "background_blur", "background_swap")
        assert (sample.output_image == scene().picture) is real, kind
        assert ({"image_1", "image_2"} <= set(re.findall(r"image_\d", sample.instruction))) is (kind in GROUPED)


def test_an_object_is_taken_away_and_put_back_where_it_was() -> None:
    made = make(editing("remove_object", "add_object"), scene())
    away, back = made["remove_object"], made["add_object"]
    assert "the spoon" in away.instruction.lower() and "a spoon" in back.instruction.lower()
    assert "at the bottom" in back.instruction
    assert (away.output_image, away.mask) == (back.input_images[0], back.mask)
    assert away.provenance["parameters"]["by"] == "opencv telea"
    inside = ellipse((away.mask.width, away.mask.height), SPOON) if away.mask else np.zeros(0)
    assert (pixels(away.mask)[..., 0][inside] > 0).mean() > 0.98
    nothing = scene(objects={"a red saucer": SAUCER})
    assert skipped(editing("remove_object", "add_object"), nothing) == {
        "remove_object": "none_fits",
        "add_object": "none_fits",
    }


@pytest.mark.parametrize("seed", range(4))
def test_colours_are_what_they_are_said_to_be(seed: int) -> None:
    """Judged by the hue circle of colorsys, of which the family knows nothing."""
    selected = scene()
    selected.seed = seed
    for kind, sample in make(editing("recolour", "recolour_all"), selected).items():
        about = sample.provenance["parameters"]
        assert about["from"] in sample.instruction and about["to"] in sample.instruction
        inside = pixels(sample.mask)[..., 0] > 0
        for picture, name in ((sample.input_images[0], about["from"]), (sample.output_image, about["to"])):
            r, g, b = np.median(pixels(picture)[inside], axis=0) / 255
            hue, least, most = colorsys.rgb_to_hsv(r, g, b)[0] * 360, *HSV[name]
            assert (least <= hue <= most) if least < most else (hue >= least or hue <= most), (kind, name, hue)
        assert about["to"] == "red"


def test_a_phrase_that_says_another_colour_is_not_believed() -> None:
    task = editing("recolour", object=(0.1, 0.5))
    sample = make(task, scene(objects={"her red saucer": SAUCER}))["recolour"]
    assert "the saucer" in sample.instruction.lower() and "her" not in sample.instruction
    assert skipped(task, scene(objects={"a blue saucer": SAUCER})) == {"recolour": "colour_disagrees"}
    assert skipped(task, scene(objects={"a crumb": [0.9, 0.9, 0.92, 0.92]})) == {"recolour": "no_fitting_object"}
    grey = scene("camera.png", {"a coat": [0.3, 0.3, 0.6, 0.8]})
    assert skipped(editing("recolour", "recolour_all"), grey) == {
        "recolour": "no_coloured_object",
        "recolour_all": "no_clear_colour",
    }


def test_names_are_those_of_the_web() -> None:
    """The colours that HTML calls by these words, and by these with dark, light, medium or deep before them."""
    known = ("red", "orange", "yellow", "green", "turquoise", "blue", "pink", "black", "white")
    for html in list(ImageColor.colormap):  # whose values turn from text to tuples as colours are asked for
        word = re.sub(r"^(dark|light|medium|deep|pale|dim|royal|sky|midnight|forest|lime|hot)+", "", html)
        if word in known and html not in ("lightyellow",) and "slate" not in html:
            rgb = np.array([[ImageColor.getrgb(html)]], np.uint8)
            assert _recolour.NAMES[_recolour.names_of(rgb)[0, 0]] == word, html
    rgb = np.array([[(90, 55, 25), (130, 60, 170), (128, 128, 128)]], np.uint8)
    assert [_recolour.NAMES[i] for i in _recolour.names_of(rgb)[0]] == ["brown", "purple", "grey"]


def test_a_turned_colour_keeps_its_light_and_shade() -> None:
    picture = pixels(row("coffee.png").picture)
    where = ellipse(picture.shape[1::-1], SAUCER)
    turned = _recolour.turned(picture, where, "red", "blue", 0.6)
    assert turned is not None
    light = [
        cv2.cvtColor(p.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[..., 0][where] for p in (picture, turned.pixels)
    ]
    assert np.abs(light[0] - light[1]).mean() < 1.5
    assert np.array_equal(turned.pixels[~where], picture[~where])
    assert _recolour.turned(picture, where, "red", "orange", 0.6) is None  # a neighbour
    assert _recolour.turned(picture, where, "red", "yellow", 0.6) is None  # as dark as this, yellow is olive


def test_a_subject_stands_before_a_plain_background() -> None:
    made = make(editing("background_plain", "background_scene", gradient=0), scene())
    plain = made["background_plain"]
    picture, original = pixels(plain.output_image), pixels(plain.input_images[0])
    (colour,) = plain.provenance["parameters"]["colours"]
    assert colour in plain.instruction and "the red saucer" in plain.instruction.lower()
    inside = ellipse((picture.shape[1], picture.shape[0]), SAUCER)
    deep = cv2.erode(inside.astype(np.uint8), np.ones((9, 9))) > 0
    far = cv2.dilate(inside.astype(np.uint8), np.ones((9, 9))) == 0
    assert np.array_equal(picture[deep], original[deep])
    assert len(np.unique(picture[far], axis=0)) <= 3  # what was nearly so before keeps its value
    assert "A cup of coffee on a table." in made["background_scene"].instruction
    mute = scene()
    mute.text = None
    assert skipped(editing("background_scene"), mute) == {"background_scene": "no_text"}
    assert skipped(editing("background_plain"), row()) == {"background_plain": "not_annotated"}
    assert skipped(editing("background_plain", subject=(0.6, 0.9)), scene()) == {"background_plain": "no_subject"}


def test_a_blurred_background_has_none_of_its_subject() -> None:
    picture = np.full((120, 120, 3), (0, 0, 255), np.uint8)
    subject = ellipse((120, 120), [0.3, 0.3, 0.7, 0.7])
    picture[subject] = (255, 0, 0)
    assert np.array_equal(blurred(picture, subject, 5.0)[~subject], picture[~subject])
    filled = without(picture, subject)
    assert filled[..., 0].max() < 30 and np.array_equal(filled[~subject], picture[~subject])
    cover = cover_of(subject)
    assert not cover[~subject].any() and (cover == 1).mean() > 0.7 * subject.mean()
    assert fitted(picture[:40], (77, 31)).shape == (31, 77, 3)


def test_two_photographs_become_one_and_one_becomes_two() -> None:
    made = make(editing(*GROUPED), grouped(scene()))
    swap, back = made["background_swap"], made["background_return"]
    china = row("china.jpg").picture
    assert swap.input_images == (scene().picture, china)
    assert back.input_images[0] == swap.output_image and back.output_image == scene().picture
    inside = ellipse((scene().picture.width, scene().picture.height), SAUCER)
    deep = cv2.erode(inside.astype(np.uint8), np.ones((9, 9))) > 0
    alone = pixels(back.input_images[1]).astype(int)
    assert np.abs(alone - pixels(scene().picture))[~inside].mean() < 4  # JPEG
    assert np.abs(alone - pixels(scene().picture))[deep].mean() > 15
    for sample in made.values():
        assert sample.provenance["others"][0]["location"] == "china.jpg"
    lost = scene()
    lost.groups = (Found("background_swap", (), {}, "source_changed"),)
    assert skipped(editing(*GROUPED), lost) == {
        "background_swap": "other_source_changed",
        "background_return": "not_drawn",
    }


def test_a_label_map_has_subjects_too() -> None:
    original = row("chelsea.png")
    labels = np.where(ellipse((original.picture.width // 2, original.picture.height // 2), CAT), 126, 3)
    named = [
        {"id": 3, "name": "floor, flooring", "area": 0.6},
        {"id": 126, "name": "animal, animate being", "area": 0.4},
    ]
    original.values = {"semantic": {"map": encode(labels.astype(np.uint8), "png"), "labels": named}}
    task = editing("background_blur", semantic="semantic")
    assert set(task.reads) == {"semantic.map", "semantic.labels"}
    assert "the animal" in make(task, original)["background_blur"].instruction.lower()
    assert skipped(editing("background_blur", semantic="semantic", subjects=("car",)), original) == {
        "background_blur": "no_subject"
    }


def test_others_are_the_next_rows_in_an_order_of_their_own() -> None:
    def found(images: list[str], seed: int = 0) -> dict[str, str]:
        connection = duckdb.connect()
        connection.register("kept", pa.table({"row_id": [f"r{i}" for i in images], "image_id": images}))
        groups = editing("background_swap", share=1.0).groups(connection, seed)
        return {g.anchor: g.others[0] for g in groups}

    images = [f"{i:064x}" for i in range(40)]
    pairs = found(images)
    assert len(pairs) == 40 and all(a != b for a, b in pairs.items())
    assert found(images[::-1]) == pairs != found(images, seed=1)
    assert found(images[:1]) == {}


def test_a_phrase_is_all_its_boxes_and_has_all_their_masks() -> None:
    masks = [ellipse((40, 30), b) for b in ([0, 0, 0.4, 0.4], [0.6, 0.6, 1, 1], [0.3, 0.3, 0.5, 0.5])]

    def seen(*index: int) -> list[Region]:
        return things(read((40, 30), None, ["dogs", "a cat", "dogs"], numbered([code(masks[i]) for i in index], index)))

    dogs, cat = seen(0, 1, 2)
    assert (dogs.phrase, dogs.index, cat.index) == ("dogs", (0, 2), (1,))
    assert np.array_equal(dogs.mask, masks[0] | masks[2])
    (only,) = seen(0, 1)
    assert only.phrase == "a cat"
    assert [place_of(ellipse((40, 30), b)) for b in ([0, 0.4, 0.2, 0.6], [0.8, 0, 1, 0.2], [0.4, 0, 0.6, 0.3])] == [
        "left",
        "right",
        "top",
    ]
    assert [place_of(m) for m in (masks[2], ellipse((40, 30), [0.4, 0.8, 0.7, 1]))] == ["middle", "bottom"]


@pytest.mark.parametrize(
    ("phrase", "noun", "the", "a"),
    [
        ("A red car", "red car", "the red car", "a red car"),
        ("his old umbrella", "old umbrella", "the old umbrella", "an old umbrella"),
        ("two men", "two men", "the two men", "two men"),
        ("Trees", "Trees", "Trees", "Trees"),
        ("the trees in a park", "trees in a park", "the trees in a park", "trees in a park"),
        ("glass", "glass", "the glass", "a glass"),
        ("Eileen Collins", "Eileen Collins", "Eileen Collins", "Eileen Collins"),
        ("the", "the", "the the", "a the"),
    ],
)
def test_phrases_get_their_articles(phrase: str, noun: str, the: str, a: str) -> None:
    assert (bare(phrase), definite(phrase), indefinite(phrase)) == (noun, the, a)


def test_colour_words_are_found() -> None:
    assert _recolour.coloured_words("big, Gray and violet cat") == ("big, and cat", ["grey", "purple"])


def test_a_recipe_is_refused_with_the_remedy(tmp_path: Any) -> None:
    (tmp_path / "photos").mkdir()
    for kind, told in (
        ("add_object", r"erase\.image.*erase: \{kind: erase"),
        ("recolour", r"masks\.masks.*masks: \{kind: masks"),
        ("background_plain", r"masks\.masks"),
    ):
        with pytest.raises(RecipeError, match=told):
            recipes.load(recipe(tmp_path, tasks={"editing": {"tasks": [kind]}}))
    recipes.load(recipe(tmp_path, tasks={"editing": None}))
    with pytest.raises(RecipeError, match="no style 'sephia'; there are sepia"):
        editing(styles=("sephia",))


def test_without_a_model_hub_faces_go_and_come_back(tmp_path: Any) -> None:
    fetched(Faces(FacesConfig()))
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("astronaut.png", "coffee.png"):
        (folder / name).write_bytes(PHOTOS[name])
        (folder / f"{name[:-4]}.txt").write_text(f"The photograph {name}.")
    corpus = build(
        recipe(
            tmp_path,
            annotators={
                "faces": None,
                "erase": {"boxes": "faces.boxes", "phrases": None, "noun": "face", "masks": None},
            },
            select={},
            tasks={"editing": {"tasks": ["style", "remove_object", "add_object"]}},
        )
    )
    assert verify(tmp_path / "corpus").ok
    samples: dict[str, list[Sample]] = {}
    for sample in corpus:
        samples.setdefault(sample.task_type, []).append(sample)
    assert {k: len(v) for k, v in samples.items()} == {"style": 2, "remove_object": 1, "add_object": 1}
    (away,) = samples["remove_object"]
    assert "the face" in away.instruction and away.mask is not None
    assert pixels(away.mask)[..., 0].mean() / 255 == pytest.approx(0.03, abs=0.02)


def test_what_no_one_asked_for_is_not_made() -> None:
    assert all(isinstance(m, Skipped | Sample) for m in editing().build(row()))
    assert editing().reads == {}
