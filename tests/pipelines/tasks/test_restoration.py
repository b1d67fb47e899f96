"""Damages: the stored parameters give them again, holes are where the masks say, and each does what its name says."""

from __future__ import annotations

import io
from typing import Any, get_args

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from tests.pipelines.tasks.annotated import make, skipped
from tests.pipelines.tasks.rows import PHOTOS, pixels, row
from x2i.base.config import parse_config
from x2i.base.errors import RecipeError
from x2i.corpus.sample import Picture, Sample
from x2i.pipelines import recipe as recipes
from x2i.pipelines.images import encode
from x2i.pipelines.tasks import _damage, _holes
from x2i.pipelines.tasks.base import Selected, Skipped
from x2i.pipelines.tasks.restoration import Kind, Restoration, RestorationConfig

ALL = get_args(Kind)
HOLES = ("inpaint", "inpaint_freeform", "inpaint_object", "outpaint")


def of(*tasks: Any, **more: Any) -> Restoration:
    return Restoration(RestorationConfig(tasks=tasks, **more))


def disc(height: int, width: int) -> tuple[np.ndarray, dict[str, Any]]:
    """An object as the annotator `masks` stores it, and its pixels."""
    there = np.zeros((height, width), np.uint8)
    cv2.circle(there, (width // 3, height // 2), height // 5, 1, -1)
    code = coco.encode(np.asfortranarray(there))
    stored = {"size": [height, width], "counts": code["counts"].decode("ascii")}
    return there > 0, {"masks": [stored], "area": [float(there.mean())]}


def whole(name: str = "chelsea.png", **changes: Any) -> Selected:
    """A row that every task can be made of."""
    on = row(name, **changes)
    on.values["masks"] = disc(on.picture.height // 2, on.picture.width // 2)[1]
    return on


def one(kind: str, on: Selected, **more: Any) -> tuple[Sample, np.ndarray, dict[str, Any]]:
    """The sample of a task, its damaged picture, and its parameters."""
    sample = make(of(kind, **more), on)[kind]
    return sample, pixels(sample.input_images[0]), sample.provenance["parameters"]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(a.astype(float) - b).mean()))


@pytest.mark.parametrize("name", ["chelsea.png", "china.jpg", "coffee.png"])
def test_every_task_damages_the_input_and_leaves_the_output_alone(name: str) -> None:
    on = whole(name)
    made = make(of(*ALL), on)
    assert set(made) == set(ALL)
    for kind, sample in made.items():
        assert sample.output_image is not None
        assert sample.output_image.data == PHOTOS[name]
        assert sample.provenance["untouched"] is True
        (given,) = sample.input_images
        assert (given.extension == "png") == (kind in (*HOLES, "super_resolution"))
        assert (sample.mask is not None) == (kind in HOLES)
        if kind != "super_resolution":
            assert (given.width, given.height) == (on.picture.width, on.picture.height)
            assert psnr(pixels(given), on.pixels) < 42, kind


def test_the_whole_family_is_a_pure_function_of_row_and_seed() -> None:
    again = {k: s.members() for k, s in make(of(*ALL), whole()).items()}
    assert {k: s.members() for k, s in make(of(*ALL), whole()).items()} == again
    # a task's draws do not depend on which other tasks are made
    assert {k: make(of(k), whole())[k].members() for k in ALL} == again
    other = {k: s.provenance["parameters"] for k, s in make(of(*ALL), whole(seed=1)).items()}
    first = {k: s.provenance["parameters"] for k, s in make(of(*ALL), whole()).items()}
    assert all(first[k] != other[k] for k in ALL if k != "colorize")


def test_motion_blur_is_the_mean_of_shifted_pictures() -> None:
    _, damaged, stored = one("motion_deblur", whole())
    assert np.abs(damaged - _damage.motion_blur(whole().pixels, **stored).astype(float)).mean() < 2  # but for JPEG
    clean = whole().pixels.astype(np.float32)
    for length, angle, step in ((7, 0.0, (0, 1)), (5, 90.0, (-1, 0)), (9, 45.0, None)):
        found = _damage.motion_blur(whole().pixels, length, angle)[40:-40, 40:-40]
        half = (length - 1) / 2
        positions = np.arange(-half, half + 0.01, 0.05)
        radians = np.radians(angle)
        mean = np.zeros_like(clean)
        for along in positions:
            move = np.array([[1, 0, along * np.cos(radians)], [0, 1, -along * np.sin(radians)]], np.float32)
            mean += cv2.warpAffine(clean, move, clean.shape[1::-1])
        expected = (mean / len(positions))[40:-40, 40:-40]
        assert np.abs(found - expected).mean() < 0.6, step


@pytest.mark.parametrize("angle", [0, 17.3, 45, 90, 133.7, 180])
@pytest.mark.parametrize("length", [1, 3, 4.5, 20.2])
def test_a_line_kernel_is_a_line_of_that_length_and_angle(length: float, angle: float) -> None:
    kernel = _damage.line_kernel(length, angle)
    assert kernel.sum() == pytest.approx(1, abs=1e-5)
    assert kernel.shape[0] == kernel.shape[1]
    assert kernel.shape[0] % 2 == 1
    assert np.allclose(kernel, kernel[::-1, ::-1], atol=1e-5)  # no shift of the picture
    offsets = np.arange(len(kernel)) - len(kernel) // 2
    x, y = np.meshgrid(offsets, -offsets)
    along = x * np.cos(np.radians(angle)) + y * np.sin(np.radians(angle))
    across = -x * np.sin(np.radians(angle)) + y * np.cos(np.radians(angle))
    assert (kernel * across**2).sum() < 0.3
    # the variance of an even spread over length - 1 pixels, and of the splat
    assert (kernel * along**2).sum() == pytest.approx((length - 1) ** 2 / 12, abs=0.35 + 0.02 * length)


def test_gaussian_and_poisson_noise_have_the_stored_strength() -> None:
    grey = np.full((400, 400, 3), 128, np.uint8)
    on = row("chelsea.png", picture=Picture(encode(grey, "png"), "png", 400, 400))
    _, noisy, stored = one("denoise", on)
    assert set(stored) == {"sigma"}
    exact = _damage.gaussian_noise(grey, stored["sigma"], np.random.default_rng(0)).astype(float)
    assert exact.std() == pytest.approx(stored["sigma"], rel=0.03)
    assert noisy[..., 1].std() == pytest.approx(stored["sigma"], rel=0.3)
    _, noisy, stored = one("denoise", on, poisson=1.0)
    assert set(stored) == {"photons"}
    for level in (20, 128, 220):
        shot = _damage.poisson_noise(np.full((400, 400, 3), level, np.uint8), 400, np.random.default_rng(0))
        assert shot.mean() == pytest.approx(level, rel=0.01)
        assert shot.std() == pytest.approx(255 * np.sqrt(level / 255 / 400), rel=0.05)  # grows with the light


def test_rain_only_lightens_and_falls_as_its_parameters_say() -> None:
    on = whole("coffee.png")
    _, damaged, stored = one("derain", on)
    fresh = on.generator("derain")  # the same draws in the same order give the same rain
    fresh.uniform()
    fresh.integers(1, 4)
    fresh.uniform(size=3 * len(stored["layers"]))
    again = _damage.rain(on.pixels, stored["tilt"], stored["layers"], fresh)
    assert np.abs(again - damaged.astype(float)).mean() < 2  # but for JPEG
    assert np.abs(again - on.pixels.astype(float)).mean() > 2

    dark = np.full((400, 600, 3), 40, np.uint8)
    layer: list[_damage.Streaks] = [{"length": 30.0, "width": 1.5, "cover": 0.08, "strength": 0.6}]
    for tilt in (-25.0, 0.0, 25.0):
        rain = _damage.rain(dark, tilt, layer, np.random.default_rng(1))[..., 0].astype(np.float32) - 40
        assert rain.min() >= 0
        assert 60 < rain.max() <= 0.6 * (230 - 40) + 1
        assert 0.04 < (rain > 10).mean() < 0.16
        # the structure tensor's main direction is across the streaks
        dx, dy = cv2.Sobel(rain, cv2.CV_32F, 1, 0), cv2.Sobel(rain, cv2.CV_32F, 0, 1)
        across = 0.5 * np.degrees(np.arctan2(2 * (dx * dy).mean(), (dx * dx).mean() - (dy * dy).mean()))
        assert across == pytest.approx(tilt, abs=3)


def test_low_light_is_gain_times_value_to_the_gamma() -> None:
    on = whole()
    _, damaged, stored = one("low_light", on)
    expected = stored["gain"] * (on.pixels / 255.0) ** stored["gamma"] * 255
    assert np.abs(cv2.GaussianBlur(damaged, (0, 0), 3).astype(float) - cv2.GaussianBlur(expected, (0, 0), 3)).mean() < 2
    still = _damage.low_light(on.pixels, 2.5, 0.8, 1e9, 0.0, np.random.default_rng(0))
    assert np.abs(still - 0.8 * (on.pixels / 255.0) ** 2.5 * 255).max() <= 1.0
    assert damaged.mean() < 0.5 * on.pixels.mean()


def test_jpeg_artefacts_are_the_files_own() -> None:
    sample, damaged, stored = one("jpeg_artifacts", whole())
    assert 5 <= stored["quality"] <= 30
    tables = Image.open(io.BytesIO(sample.input_images[0].data)).quantization  # type: ignore[attr-defined]
    scale = 5000 / stored["quality"] if stored["quality"] < 50 else 200 - 2 * stored["quality"]
    assert tables[0][0] == int((16 * scale + 50) // 100)  # the standard's luma table begins with 16
    assert np.array_equal(damaged, pixels(Picture(encode(whole().pixels, "jpg", stored["quality"]), "jpg", 451, 300)))


def test_super_resolution_has_a_small_picture_or_an_enlarged_one() -> None:
    on = whole("coffee.png")
    _, small, stored = one("super_resolution", on)
    factor = stored["factor"]
    assert small.shape[:2] == (round(400 / factor), round(600 / factor))
    expected = Image.fromarray(on.pixels).resize(small.shape[1::-1], Image.Resampling.BICUBIC)
    assert np.array_equal(small, np.asarray(expected))
    _, large, again = one("super_resolution", on, enlarged=True)
    assert again["factor"] == factor
    assert large.shape == on.pixels.shape
    assert psnr(large, on.pixels) > 20
    tiny = row("chelsea.png", picture=Picture(encode(on.pixels[:100, :100], "png"), "png", 100, 100))
    assert skipped(of("super_resolution"), tiny) == {"super_resolution": "too_small"}
    assert one("super_resolution", tiny, factor=(2, 2), min_small=50)[1].shape == (50, 50, 3)


@pytest.mark.parametrize("kind", HOLES)
def test_holes_are_black_and_where_the_mask_is_white(kind: str) -> None:
    on = whole("coffee.png")
    sample, damaged, _ = one(kind, on)
    assert sample.mask is not None
    assert sample.mask.extension == "png"
    mask = pixels(sample.mask)
    assert set(np.unique(mask)) == {0, 255}
    hole = mask[..., 0] > 0
    assert 0.01 < hole.mean() < 0.97
    assert (damaged[hole] == 0).all()
    assert np.array_equal(damaged[~hole], on.pixels[~hole])
    members = [name for name, _ in sample.members()]
    assert members == ["json", "input_1.png", "output.png", "mask.png"]


def test_free_form_strokes_cover_about_what_was_asked_and_can_be_drawn_again() -> None:
    shares = []
    for seed in range(12):
        sample, _, stored = one("inpaint_freeform", whole(seed=seed))
        hole = pixels(sample.mask)[..., 0] > 0
        assert np.array_equal(_holes.painted_strokes((451, 300), stored["strokes"]), hole)
        assert stored["share"] == pytest.approx(hole.mean(), abs=1e-3)
        shares.append(stored["share"])
    assert min(shares) >= 0.05
    assert max(shares) < 0.5
    assert np.std(shares) > 0.03


def test_an_object_is_left_out_with_a_rim() -> None:
    there, stored = disc(150, 225)
    on = row("chelsea.png", values={"masks": stored})
    sample, _, parameters = one("inpaint_object", on)
    hole = pixels(sample.mask)[..., 0] > 0
    at_size = cv2.resize(there.astype(np.uint8), (451, 300), interpolation=cv2.INTER_NEAREST) > 0
    assert hole[at_size].all()
    rim = cv2.distanceTransform((~at_size).astype(np.uint8), cv2.DIST_L2, 5)[hole]
    assert rim.max() == pytest.approx(parameters["grow"], abs=2)
    assert parameters["object"] == 0
    task = of("inpaint_object")
    assert skipped(task, row("chelsea.png", values={"masks": {"masks": [], "area": []}})) == {
        "inpaint_object": "no_fitting_object"
    }
    large = {"masks": stored["masks"], "area": [0.9]}
    assert skipped(task, row("chelsea.png", values={"masks": large})) == {"inpaint_object": "no_fitting_object"}
    unseen = {"masks": None, "area": None}
    assert skipped(task, row("chelsea.png", values={"masks": unseen})) == {"inpaint_object": "not_annotated"}


def test_a_recipe_without_masks_is_refused_with_the_remedy() -> None:
    def recipe(annotators: dict[str, Any]) -> recipes.Recipe:
        tasks = {"restoration": {"tasks": ["inpaint_object"]}}
        content = {"name": "t", "lake": "l", "out": "o", "sources": [{"kind": "folder", "name": "p", "path": "."}]}
        return parse_config(recipes.Recipe, content | {"annotators": annotators, "tasks": tasks}, "r.yaml")

    with pytest.raises(RecipeError, match=r"`masks: \{kind: masks, boxes: grounding.boxes\}`"):
        recipes.make(recipe({}), "r.yaml")
    plan = recipes.make(recipe({"grounding": {"phrases": ["cat"]}, "masks": {"boxes": "grounding.boxes"}}), "r.yaml")
    assert [columns for _, columns in plan.heavy_reads().values()] == [["masks"]]
    assert Restoration(RestorationConfig()).reads == {}


def test_the_published_phrases() -> None:
    made = make(of(*ALL, wording="multigen"), whole())
    said = {k: s.instruction for k, s in made.items()}
    image = "<img><|image_1|></img>"
    assert said["deblur"] == f"deblur image to clean image {image}"
    assert said["colorize"] == f"gray image to color image {image}"
    assert said["inpaint"] == f"image inpainting {image}"
    assert said["outpaint"] == f"image outpainting {image}"


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 2), (17, 17)])
def test_specks_and_strips_break_nothing(size: tuple[int, int]) -> None:
    tiny = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    on = row(
        "chelsea.png", picture=Picture(encode(tiny, "png"), "png", size[1], size[0]), values={"masks": disc(20, 20)[1]}
    )
    made = list(of(*ALL).build(on))
    assert len(made) == len(ALL)
    for sample in made:
        if isinstance(sample, Skipped):
            assert sample.task_type in ("super_resolution", "colorize") or sample.reason == "nothing_changed"
        elif sample.mask is not None:
            assert (sample.mask.width, sample.mask.height) == size[::-1]


def test_ranges_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a range is \[least, most\], but 30 is more than 5"):
        RestorationConfig(jpeg_quality=(30, 5))
    with pytest.raises(ValueError, match="hole"):
        RestorationConfig(hole=(0.2, 1.5))


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (40, 90, 200)])
def test_what_a_damage_leaves_as_it_was_is_no_sample(colour: tuple[int, int, int]) -> None:
    plain = np.full((48, 64, 3), colour, np.uint8)
    made = {
        m.task_type: m for m in of(*ALL).build(row(picture=Picture(encode(plain, "png"), "png", 64, 48), values={}))
    }
    for kind in ("deblur", "motion_deblur", "jpeg_artifacts"):  # nothing to blur, nothing to lose
        assert made[kind] == Skipped(kind, "nothing_changed")
    for kind, sample in made.items():
        if isinstance(sample, Sample) and kind != "super_resolution":
            (given,) = sample.input_images
            assert abs(pixels(given).astype(int) - plain).max() > 3, kind
