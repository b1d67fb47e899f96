"""Task builders on real photographs: what the sample says of itself is what its pixels show."""

from __future__ import annotations

import json
from typing import Any

import cv2
import numpy as np
import pytest

from x2i.corpus.sample import PLACEHOLDER, Picture, Sample
from x2i.pipelines.images import decode, read_header
from x2i.pipelines.quickstart import photographs
from x2i.pipelines.tasks.base import Selected, Skipped, Task
from x2i.pipelines.tasks.control import Control
from x2i.pipelines.tasks.published import Published
from x2i.pipelines.tasks.restoration import Restoration
from x2i.pipelines.tasks.text_to_image import TextToImage

PHOTOS = photographs()


def row(name: str = "chelsea.png", seed: int = 0, **changes: Any) -> Selected:
    data = PHOTOS[name]
    header = read_header(data)
    picture = Picture(data, name[-3:], header.width, header.height)
    values: dict[str, Any] = {"text": "A cat.", "meta": {}, "values": {}, "seed": seed} | changes
    return Selected(row_id="ab" * 16, image_id="cd" * 32, source="s", location=name, picture=picture, **values)


def make(task: Task, on: Selected) -> dict[str, Sample]:
    made = {s.task_type: s for s in task.build(on) if isinstance(s, Sample)}
    assert set(made) <= set(task.task_types()) or isinstance(task, Published)
    return made


def pixels(picture: Picture) -> np.ndarray:
    return decode(picture.data, read_header(picture.data))


FAMILIES = [TextToImage(TextToImage.Config()), Control(Control.Config()), Restoration(Restoration.Config())]


@pytest.mark.parametrize("task", FAMILIES, ids=lambda t: t.name)
def test_samples_are_pure_functions_of_row_and_seed(task: Task) -> None:
    first, again = make(task, row()), make(task, row())
    assert {k: s.members() for k, s in first.items()} == {k: s.members() for k, s in again.items()}
    assert set(first) == set(task.task_types())
    for sample in first.values():
        assert sample.output_image is not None
        assert sample.output_image.data == PHOTOS["chelsea.png"]
        numbers = sorted({int(n) for n in PLACEHOLDER.findall(sample.instruction)})
        assert numbers == list(range(1, len(sample.input_images) + 1))
        record = json.loads(dict(sample.members())["json"])
        assert record["provenance"]["image_id"] == "cd" * 32
        assert [n.split(".")[0] for n in record["input_images"]] == [sample.key] * len(sample.input_images)
        for picture in sample.input_images:
            assert (picture.width, picture.height) == (451, 300)
            assert pixels(picture).shape[:2] == (300, 451)


def test_the_recipes_seed_changes_the_parameters() -> None:
    task = Restoration(Restoration.Config())
    drawn = [{k: s.provenance["parameters"] for k, s in make(task, row(seed=n)).items()} for n in (0, 1)]
    assert drawn[0]["inpaint"] != drawn[1]["inpaint"]


def test_canny_is_cv2s_with_the_stored_thresholds() -> None:
    sample = make(Control(Control.Config()), row())["canny_to_image"]
    stored = sample.provenance["parameters"]
    grey = cv2.cvtColor(pixels(sample.output_image), cv2.COLOR_RGB2GRAY)  # type: ignore[arg-type]
    assert np.array_equal(pixels(sample.input_images[0])[..., 0], cv2.Canny(grey, stored["low"], stored["high"]))


def test_damage_is_what_the_parameters_say() -> None:
    made = make(Restoration(Restoration.Config()), row())
    clean = pixels(made["inpaint"].output_image)  # type: ignore[arg-type]
    damaged = {name: pixels(sample.input_images[0]) for name, sample in made.items()}
    parameters = {name: sample.provenance["parameters"] for name, sample in made.items()}

    x, y, w, h = parameters["inpaint"]["hole"]
    hole = np.zeros(clean.shape[:2], bool)
    hole[y : y + h, x : x + w] = True
    assert (damaged["inpaint"][hole] == 0).all()
    assert np.array_equal(damaged["inpaint"][~hole], clean[~hole])

    x, y, w, h = parameters["outpaint"]["kept"]
    kept = np.zeros(clean.shape[:2], bool)
    kept[y : y + h, x : x + w] = True
    assert np.array_equal(damaged["outpaint"][kept], clean[kept])
    assert (damaged["outpaint"][~kept] == 0).all()

    k = parameters["deblur"]["kernel"]
    assert k % 2 == 1
    assert np.abs(damaged["deblur"].astype(int) - cv2.GaussianBlur(clean, (k, k), 0)).mean() < 2
    noise = damaged["denoise"].astype(float) - clean
    assert noise[50:-50, 50:-50].std() == pytest.approx(parameters["denoise"]["sigma"], rel=0.2)
    assert np.ptp(damaged["colorize"], axis=2).max() <= 2


def test_what_makes_no_sense_is_skipped_with_a_reason() -> None:
    grey = list(Restoration(Restoration.Config(tasks=("colorize",))).build(row("camera.png")))
    assert grey == [Skipped("colorize", "already_grey")]
    blank = cv2.imencode(".png", np.full((64, 64, 3), 128, np.uint8))[1].tobytes()
    flat = row()
    flat.picture = Picture(blank, "png", 64, 64)
    assert list(Control(Control.Config()).build(flat)) == [Skipped("canny_to_image", "too_few_edges")]
    t2i = TextToImage(TextToImage.Config(max_chars=10))
    assert list(t2i.build(row(text=None))) == [Skipped("text_to_image", "no_text")]
    assert list(t2i.build(row(text="x" * 11))) == [Skipped("text_to_image", "text_too_long")]
    assert list(t2i.build(row(text="<|image_1|>"))) == [Skipped("text_to_image", "text_has_placeholders")]


def test_a_caption_with_braces_or_placeholders_cannot_break_an_instruction() -> None:
    sample = make(Control(Control.Config()), row(text="{image} {0} %s"))["canny_to_image"]
    assert "{image} {0} %s" in sample.instruction
    odd = list(Control(Control.Config()).build(row(text="look: <img><|image_2|></img>")))
    assert odd == [Skipped("canny_to_image", "text_has_placeholders")]


def test_published_samples_go_through_word_for_word() -> None:
    picture = row().picture
    meta = {"task_type": "text_to_iamge", "instruction": "Join <img><|image_1|></img> and <img><|image_2|></img>."}
    (sample,) = Published(Published.Config()).build(row(meta=meta, inputs=(picture, picture)))
    assert isinstance(sample, Sample)
    assert sample.task_type == "text_to_iamge"  # the published typo is kept
    assert sample.instruction == meta["instruction"]
    assert len(sample.input_images) == 2
    assert list(Published(Published.Config()).build(row(meta=meta))) == [
        Skipped("published", "placeholders_do_not_fit")
    ]
    assert list(Published(Published.Config()).build(row())) == [Skipped("published", "not_x2i")]
