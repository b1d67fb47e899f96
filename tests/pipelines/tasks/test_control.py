"""Control maps: they fit their picture, agree with plain references, and go both ways."""

from __future__ import annotations

import io
import json
import math
from typing import Any, get_args

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.pipelines.tasks.annotated import STANDING, annotated, make, person, skipped
from tests.pipelines.tasks.rows import PHOTOS, pixels, row
from x2i.base.config import parse_config
from x2i.base.errors import RecipeError
from x2i.corpus.sample import Sample
from x2i.pipelines import recipe as recipes
from x2i.pipelines.images import encode
from x2i.pipelines.tasks.control import KINDS, Control, ControlConfig, TaskType

NAMES = ["chelsea.png", "astronaut.png", "coffee.png", "china.jpg", "rocket.jpg"]
ALL = get_args(TaskType)
EVERYTHING = Control(ControlConfig(tasks=ALL))


def of(*tasks: Any, **more: Any) -> Control:
    return Control(ControlConfig(tasks=tasks, **more))


def grey(sample: Sample) -> np.ndarray:
    return pixels(sample.input_images[0])[..., 0]


def png(data: bytes) -> np.ndarray:
    """A PNG's own values, 16 bits too, as Pillow reads them."""
    return np.asarray(Image.open(io.BytesIO(data)))


def f1(found: np.ndarray, wanted: np.ndarray) -> float:
    """Agreement of two edge maps, pixel by pixel."""
    both = float(((found > 0) & (wanted > 0)).sum())
    return 2 * both / float((found > 0).sum() + (wanted > 0).sum())


@pytest.mark.parametrize("name", NAMES)
def test_every_map_goes_both_ways_and_is_as_large_as_the_picture(name: str) -> None:
    made = make(EVERYTHING, row(name, values=annotated(name)))
    assert set(made) == set(ALL)
    for sample in made.values():
        (shown,) = sample.input_images
        assert sample.output_image is not None
        assert (shown.width, shown.height) == (sample.output_image.width, sample.output_image.height)
    for kind in KINDS:
        there, back = made[f"{kind}_to_image"], made[f"image_to_{kind}"]
        assert there.provenance["parameters"] == back.provenance["parameters"]
        assert there.output_image is not None
        assert there.output_image.data == PHOTOS[name]
        assert there.provenance["untouched"] is True
        assert back.output_image == there.input_images[0]  # the very same map
        assert back.input_images == (there.output_image,)
        assert back.provenance["untouched"] is False


@pytest.mark.parametrize("name", NAMES)
def test_canny_of_the_stored_output_is_the_stored_map(name: str) -> None:
    sample = make(of("canny_to_image"), row(name))["canny_to_image"]
    stored = sample.provenance["parameters"]
    again = cv2.Canny(cv2.cvtColor(pixels(sample.output_image), cv2.COLOR_RGB2GRAY), stored["low"], stored["high"])
    assert f1(again, grey(sample)) == 1.0
    assert np.array_equal(again, grey(sample))
    # Pillow decodes the same bytes all but alike: a reader's own extraction still finds these edges
    assert sample.output_image is not None
    theirs = np.asarray(Image.open(io.BytesIO(sample.output_image.data)).convert("L"))
    assert f1(cv2.Canny(theirs, stored["low"], stored["high"]), grey(sample)) > 0.9


def test_sketch_is_thresholded_inverted_softened_hed() -> None:
    sample = make(of("sketch_to_image"), row(values=annotated()))["sketch_to_image"]
    threshold = sample.provenance["parameters"]["threshold"]
    assert 110 <= threshold <= 160
    stored = png(annotated()["hed"]["map"])
    hed = cv2.resize(stored, (451, 300), interpolation=cv2.INTER_LINEAR)
    lines = np.where(hed >= threshold, 0.0, 255.0)
    framed = np.pad(lines, 1, mode="reflect")
    weights = np.outer([1, 2, 1], [1, 2, 1]) / 16
    soft = sum(weights[i, j] * framed[i : i + 300, j : j + 451] for i in range(3) for j in range(3))
    assert np.abs(grey(sample) - soft).max() <= 1
    assert (grey(sample) < 128).mean() > 0.005


def test_a_faint_edge_map_gives_no_sketch_and_no_hed() -> None:
    faint = encode(np.full((300, 451), 0, np.uint8), "png")
    on = row(values={"hed": {"map": faint}})
    assert skipped(of("sketch_to_image", "image_to_hed"), on) == {
        "sketch_to_image": "too_few_edges",
        "image_to_hed": "too_few_edges",
    }


def test_normals_are_sobels_of_the_raw_depth() -> None:
    values = annotated()["depth"]
    sample = make(of("normals_to_image"), row(values={"depth": values}))["normals_to_image"]
    assert sample.provenance["parameters"] == {"z": pytest.approx(0.2 * math.pi), "background": 0.02}
    stored = png(values["map"])
    raw: np.ndarray = 1 + stored / 65535 * 20
    framed = np.pad(raw, 1, mode="reflect")
    height, width = raw.shape

    def shifted(dy: int, dx: int) -> np.ndarray:
        return framed[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]

    x, y = np.zeros_like(raw), np.zeros_like(raw)
    for i, weight in ((-1, 1), (0, 2), (1, 1)):
        x += weight * (shifted(i, 1) - shifted(i, -1))
        y += weight * (shifted(1, i) - shifted(-1, i))
    far = (raw - raw.min()) / np.ptp(raw) < 0.02
    x, y = np.where(far, 0, x), np.where(far, 0, y)
    vectors = np.stack([x, y, np.full_like(x, 0.2 * math.pi)], 2)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    found = cv2.resize(pixels(sample.input_images[0]), (width, height), interpolation=cv2.INTER_AREA)
    assert np.abs(found.astype(float) - (vectors * 127.5 + 127.5)).mean() < 1.5
    unit = np.linalg.norm(pixels(sample.input_images[0]) / 127.5 - 1, axis=2)
    assert np.abs(unit - 1).max() < 0.02
    relief = make(of("normals_to_image", normal_z=2 * math.pi), row(values={"depth": values}))["normals_to_image"]
    assert pixels(relief.input_images[0])[..., 2].mean() > pixels(sample.input_images[0])[..., 2].mean()


def test_depth_is_stretched_and_near_is_white_even_from_metres() -> None:
    values = annotated()["depth"]
    white = grey(make(of("depth_to_image"), row(values={"depth": values}))["depth_to_image"])
    assert (white.min(), white.max()) == (0, 255)
    metres = values | {"near_is": "black"}
    black = grey(make(of("depth_to_image"), row(values={"depth": metres}))["depth_to_image"])
    assert np.corrcoef(white.ravel(), black.ravel())[0, 1] < -0.5  # what was far is near
    stored = png(values["map"])
    disparity: np.ndarray = 1 / (1 + stored / 65535 * 20)
    share = cv2.resize((disparity - disparity.min()) / np.ptp(disparity), (451, 300)) * 255
    assert np.abs(black - share).mean() < 2
    flat = values | {"minimum": 3.0, "maximum": 3.0}
    assert skipped(of("depth_to_image"), row(values={"depth": flat})) == {"depth_to_image": "flat_depth"}


def test_skeletons_have_openposes_colours() -> None:
    canvas = pixels(make(of("skeleton_to_image"), row(values=annotated()))["skeleton_to_image"].input_images[0])
    height, width = canvas.shape[:2]

    def between(a: int, b: int) -> list[int]:
        (x1, y1), (x2, y2) = STANDING[a], STANDING[b]
        return canvas[int((y1 + y2) / 2 * height), int((x1 + x2) / 2 * width)].tolist()

    # limbs at 60 %, in OpenPose's table of colours: neck to right shoulder, right upper leg, neck to nose
    assert between(1, 2) == [153, 0, 0]
    assert between(8, 9) == [0, 153, 51]
    assert between(1, 0) == [0, 0, 153]
    assert (canvas.max(axis=2) > 0).mean() < 0.05

    without = row(values={"pose": {"people": [person(missing=(9,))], "layout": "coco18"}})
    canvas = pixels(make(of("skeleton_to_image"), without)["skeleton_to_image"].input_images[0])
    assert between(8, 9) == between(9, 10) == [0, 0, 0]
    none = {"pose": {"people": [], "layout": "coco18"}}
    assert skipped(of("image_to_skeleton"), row(values=none)) == {"image_to_skeleton": "no_people"}


def test_cocos_seventeen_keypoints_draw_the_same_skeleton() -> None:
    names = ["nose", "eye_l", "eye_r", "ear_l", "ear_r", "shoulder_l", "shoulder_r", "elbow_l", "elbow_r"]
    names += ["wrist_l", "wrist_r", "hip_l", "hip_r", "knee_l", "knee_r", "ankle_l", "ankle_r"]
    openpose = ["nose", "neck", "shoulder_r", "elbow_r", "wrist_r", "shoulder_l", "elbow_l", "wrist_l", "hip_r"]
    openpose += ["knee_r", "ankle_r", "hip_l", "knee_l", "ankle_l", "eye_r", "eye_l", "ear_r", "ear_l"]
    places = dict(zip(openpose, STANDING, strict=True))
    places["neck"] = ((0.40 + 0.60) / 2, 0.26)  # between the shoulders
    of18 = {"people": [person([places[n] for n in openpose])], "layout": "coco18"}
    of17 = {"people": [person([places[n] for n in names])], "layout": "coco17"}
    drawn = [make(of("skeleton_to_image"), row(values={"pose": v}))["skeleton_to_image"] for v in (of18, of17)]
    assert drawn[0].input_images == drawn[1].input_images


def test_boxes_are_painted_large_to_small_in_their_phrases_colours() -> None:
    sample = make(of("boxes_to_image"), row(values=annotated()))["boxes_to_image"]
    stored = sample.provenance["parameters"]
    canvas = pixels(sample.input_images[0])
    colour = {p: tuple(bytes.fromhex(c[1:])) for p, c in stored["colours"].items()}
    assert set(colour) == {"an eye", "a cat"}  # the whole picture is no box
    assert tuple(canvas[150, 225]) == colour["an eye"]  # the small one lies on the large one
    assert tuple(canvas[200, 100]) == colour["a cat"]
    assert tuple(canvas[20, 20]) == colour["an eye"]
    assert tuple(canvas[299, 450]) == (0, 0, 0)
    for (x1, y1, x2, y2), phrase in zip(stored["boxes"], stored["phrases"], strict=True):
        assert 0 <= x1 < x2 <= 451 and 0 <= y1 < y2 <= 300
        assert tuple(canvas[y2 - 1, x2 - 1]) in (colour[phrase], colour["an eye"])
    # a phrase keeps its colour from picture to picture
    alone = {"grounding": {"boxes": [[0.1, 0.1, 0.3, 0.3]], "phrases": ["a cat"]}}
    again = make(of("boxes_to_image"), row("coffee.png", values=alone))["boxes_to_image"].provenance["parameters"]
    assert again["colours"]["a cat"] == stored["colours"]["a cat"]


def test_semantic_maps_keep_the_palettes_exact_colours() -> None:
    sample = make(of("semantic_to_image"), row(values=annotated()))["semantic_to_image"]
    assert sample.provenance["parameters"]["colours"]["building"] == "#b47878"
    found = {tuple(c) for c in pixels(sample.input_images[0]).reshape(-1, 3).tolist()}
    assert found == {(120, 120, 120), (180, 120, 120), (6, 230, 230), (80, 50, 50)}  # nothing is mixed at borders
    one = annotated()["semantic"] | {"map": encode(np.full((9, 9), 2, np.uint8), "png")}
    assert skipped(of("image_to_semantic"), row(values={"semantic": one})) == {"image_to_semantic": "one_class"}


def test_a_share_of_the_captions_is_left_out_by_the_seed() -> None:
    task = of("canny_to_image", empty_text=0.3)
    on, said = row(text="Qwerty"), []
    for on.seed in range(60):
        said.append(make(task, on)["canny_to_image"].instruction)
    assert 8 <= sum("Qwerty" not in s for s in said) <= 30
    on.seed = 0
    assert make(task, on)["canny_to_image"].instruction == said[0]
    bare = make(of("canny_to_image"), row(text=None))["canny_to_image"].instruction
    assert "None" not in bare and "{" not in bare


def test_multigens_phrases_are_word_for_word() -> None:
    on = row(values=annotated(), text="a cat on a sofa")
    said = {t: s.instruction for t, s in make(of(*ALL, wording="multigen"), on).items()}
    image = "<img><|image_1|></img>"
    assert said["canny_to_image"] == f"canny edge to image {image} a cat on a sofa"
    assert said["hed_to_image"].startswith("hed edge to image ")
    assert said["sketch_to_image"].startswith("sketch to image ")
    assert said["depth_to_image"].startswith("depth map to image ")
    assert said["normals_to_image"].startswith("normal surface map to image ")
    assert said["semantic_to_image"].startswith("segmentation map to image ")
    assert said["boxes_to_image"].startswith("bounding box to image ")
    assert said["skeleton_to_image"].startswith("human pose skeleton to image ")


def test_a_caption_column_of_choice() -> None:
    task = of("canny_to_image", text="caption.long")
    assert task.reads == {"caption.long": "caption: {kind: caption}"}
    assert "A long one." in make(task, row(values={"caption": {"long": "A long one."}}))["canny_to_image"].instruction


def test_rows_that_an_annotator_did_not_see_are_skipped() -> None:
    unseen = {name: dict.fromkeys(columns) for name, columns in annotated().items()}
    reasons = skipped(EVERYTHING, row(values=unseen))
    assert set(reasons.values()) == {"not_annotated"}
    assert len(reasons) == len(ALL) - 2  # Canny needs nobody
    placeholders = {"grounding": {"boxes": [[0.1, 0.1, 0.3, 0.3]], "phrases": ["<|image_2|>"]}}
    assert skipped(of("boxes_to_image"), row(values=placeholders)) == {"boxes_to_image": "text_has_placeholders"}


def recipe(annotators: dict[str, Any], **control: Any) -> recipes.Recipe:
    content = {"name": "t", "lake": "lake", "out": "out", "sources": [{"kind": "folder", "name": "p", "path": "."}]}
    return parse_config(recipes.Recipe, content | {"annotators": annotators, "tasks": {"control": control}}, "r.yaml")


@pytest.mark.parametrize(
    ("task", "remedy"),
    [
        ("hed_to_image", "hed: {kind: edges, model: hed}"),
        ("image_to_sketch", "hed: {kind: edges, model: hed}"),
        ("soft_edges_to_image", "edges: {kind: edges, model: pidinet}"),
        ("normals_to_image", "depth: {kind: depth}"),
        ("skeleton_to_image", "pose: {kind: pose}"),
        ("image_to_boxes", "grounding: {kind: grounding}"),
        ("semantic_to_image", "semantic: {kind: semantic}"),
    ],
)
def test_a_recipe_without_the_annotator_is_refused_with_the_remedy(task: str, remedy: str) -> None:
    with pytest.raises(RecipeError, match="there is no annotator") as refused:
        recipes.make(recipe({}, tasks=[task]), "r.yaml")
    assert f"r.yaml: tasks.control: reads {remedy.partition(':')[0]}." in str(refused.value)
    assert f"`{remedy}`" in str(refused.value)


def test_the_remedies_make_a_recipe_that_is_taken() -> None:
    annotators: dict[str, Any] = {
        "hed": {"kind": "edges", "model": "hed"},
        "edges": {"kind": "edges", "model": "pidinet"},
        "depth": {"kind": "depth"},
        "pose": {"kind": "pose"},
        "grounding": {"kind": "grounding", "phrases": ["cat"]},
        "semantic": {"kind": "semantic"},
    }
    plan = recipes.make(recipe(annotators, tasks=list(ALL)), "r.yaml")
    heavy = {name: columns for name, (_, columns) in plan.heavy_reads().items()}
    assert heavy == {name: ["map"] for name in ("hed", "edges", "depth", "semantic")}
    assert recipes.make(recipe({}), "r.yaml").tasks[0].task_types() == ["canny_to_image"]
    other = recipes.make(recipe({"edges": {"model": "hed"}}, tasks=["hed_to_image"], hed="edges.map"), "r.yaml")
    assert set(other.tasks[0].reads) == {"edges.map"}


def test_unknown_tasks_and_thresholds_that_cross_are_refused() -> None:
    with pytest.raises(RecipeError, match="canny_to_image"):
        recipes.make(recipe({}, tasks=["cany_to_image"]), "r.yaml")
    with pytest.raises(RecipeError, match="low must end before high begins"):
        recipes.make(recipe({}, low=[50, 200]), "r.yaml")
    with pytest.raises(RecipeError, match=r"a range is \[least, most\]"):
        recipes.make(recipe({}, sketch=[160, 110]), "r.yaml")


def test_words_of_a_source_stay_words() -> None:
    values = annotated() | {"grounding": {"boxes": [[0.1, 0.1, 0.5, 0.5]], "phrases": ["{image} {0}"]}}
    made = make(of("image_to_boxes", "canny_to_image"), row(values=values, text="{text} %s"))
    assert "{image} {0} (#" in made["image_to_boxes"].instruction
    assert "{text} %s" in made["canny_to_image"].instruction
    assert json.loads(dict(made["image_to_boxes"].members())["json"])["task_type"] == "image_to_boxes"
