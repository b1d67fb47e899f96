"""Diagnoses: the answer names the damage that the picture has, the rejected one another, and no twin gives it away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import pytest

from tests.pipelines.tasks.annotated import make
from tests.pipelines.tasks.rows import PHOTOS, pixels, row
from tests.pipelines.tasks.test_restoration import whole
from x2i.base.config import parse_config
from x2i.base.errors import RecipeError
from x2i.corpus.sample import Sample
from x2i.pipelines.images import encode
from x2i.pipelines.tasks.base import Selected, Skipped
from x2i.pipelines.tasks.diagnose import CLEAN, Diagnose, DiagnoseConfig, Kind
from x2i.pipelines.tasks.restoration import Restoration, RestorationConfig

ALL = get_args(Kind)
DEFAULT = ("deblur", "denoise", "colorize", "inpaint")


def of(**config: Any) -> Diagnose:
    return Diagnose(DiagnoseConfig(**config))


def told(task: Diagnose, on: Selected) -> dict[str, Sample]:
    """Its samples by what is wrong."""
    made = [m for m in task.build(on) if isinstance(m, Sample)]
    assert {m.task_type for m in made} <= {"diagnose"} == set(task.task_types())
    assert len({m.key for m in made}) == len(made)
    return {m.provenance["parameters"]["degradation"]: m for m in made}


def reasons(task: Diagnose, on: Selected) -> list[str]:
    return [m.reason for m in task.build(on) if isinstance(m, Skipped)]


def grey(name: str = "chelsea.png") -> Selected:
    """The photograph without its colours, as a picture of its own."""
    image = cv2.cvtColor(row(name).pixels, cv2.COLOR_RGB2GRAY)
    data = encode(np.repeat(image[..., None], 3, axis=2), "png")
    on = row(name)
    return row(name, picture=type(on.picture)(data, "png", on.picture.width, on.picture.height))


def test_each_answer_is_one_of_its_damages_wordings() -> None:
    task, on = of(tasks=ALL), whole()
    made = told(task, on)
    assert list(made) == [*ALL, CLEAN]
    texts = task.instructions.texts
    for kind, sample in made.items():
        question, answer = sample.messages
        assert question["role"] == "user" and question["content"].removeprefix("<image>") in texts["question"]
        assert answer == {"role": "assistant", "content": answer["content"]} and answer["content"] in texts[kind]
        assert sample.output_image is None and sample.rejected_response is None
        assert (sample.input_images[0].data == PHOTOS["chelsea.png"]) == (kind == CLEAN)
    every = [text for kind in (*ALL, CLEAN) for text in texts[kind]]
    assert len(set(every)) == len(every), "a wording answers two questions"


def test_the_record_is_what_ms_swift_reads() -> None:
    for kind, sample in told(of(rejected=True), row()).items():
        record = json.loads(dict(sample.members())["json"])
        assert record["task_type"] == "diagnose" and "output_image" not in record and "mask" not in record
        assert "".join(m["content"] for m in record["messages"]).count("<image>") == len(record["images"]) == 1
        assert isinstance(record["rejected_response"], str)
        extension = "png" if kind in ("inpaint", CLEAN) else "jpg"  # as restoration writes its inputs
        assert [s for s, _ in sample.members()] == ["json", f"input_1.{extension}"]


def test_the_damage_is_not_the_one_that_restoration_draws() -> None:
    kinds = [k for k in ALL if k != "colorize"]  # grey has nothing to draw
    same = dict.fromkeys(kinds, 0)
    for seed in range(4):
        on = whole(seed=seed)
        ours, theirs = told(of(tasks=kinds, clean=False), on), make(Restoration(RestorationConfig(tasks=kinds)), on)
        assert list(ours) == list(theirs)
        for kind in kinds:
            same[kind] += ours[kind].input_images[0].data == theirs[kind].input_images[0].data
    coarse = {"deblur", "jpeg_artifacts"}  # two draws of a score of kernels, or qualities, may be the same
    assert {kind for kind, times in same.items() if times} <= coarse
    assert max(same.values()) <= 1


def test_the_parameters_tell_the_damage() -> None:
    made = told(of(), row())
    kernel = made["deblur"].provenance["parameters"]["kernel"]
    again = cv2.GaussianBlur(row().pixels, (kernel, kernel), 0)
    assert np.abs(pixels(made["deblur"].input_images[0]).astype(int) - again).mean() < 3
    x, y, width, height = made["inpaint"].provenance["parameters"]["hole"]
    assert (pixels(made["inpaint"].input_images[0])[y : y + height, x : x + width] == 0).all()
    assert made[CLEAN].provenance["parameters"] == {"degradation": CLEAN}


def test_a_sample_is_a_function_of_row_seed_and_its_damage() -> None:
    made = {k: s.members() for k, s in told(of(tasks=ALL), whole()).items()}
    assert {k: s.members() for k, s in told(of(tasks=ALL), whole()).items()} == made
    for kind in ALL:
        assert told(of(tasks=(kind,), clean=False), whole())[kind].members() == made[kind]
    assert told(of(), row(seed=1))["denoise"].members() != told(of(), row())["denoise"].members()
    with_worse = told(of(tasks=ALL, rejected=True), whole())
    assert [s.messages for s in with_worse.values()] == [s.messages for s in told(of(tasks=ALL), whole()).values()]


def test_a_worse_answer_is_that_of_another_damage() -> None:
    task = of(tasks=ALL, rejected=True, instructions="diagnose_plain")
    named = {text: kind for kind in (*ALL, CLEAN) for text in task.instructions.texts[kind]}
    seen: dict[str, set[str]] = {kind: set() for kind in (*ALL, CLEAN)}
    for seed in range(60):
        on = whole("coffee.png", seed=seed)
        for kind in seen:
            rng = on.generator(f"diagnose {kind}")
            worse = task._worse(kind, list(seen), rng)
            assert worse is not None
            seen[kind].add(named[worse])
    for kind, others in seen.items():
        assert kind not in others and len(others) > 6
    assert "motion_deblur" not in seen["deblur"] and "denoise" not in seen["low_light"], "that would be true, too"
    assert CLEAN in seen["deblur"]
    assert {s.rejected_response in named for s in told(task, whole()).values()} == {True}


def test_a_grey_photograph_neither_loses_colours_nor_is_called_faultless() -> None:
    task = of(rejected=True, instructions="diagnose_plain")
    assert list(told(task, grey())) == ["deblur", "denoise", "inpaint"]
    assert reasons(task, grey()) == ["colorize_already_grey", "clean_already_grey"]
    lost = task.instructions.texts["colorize"]
    for seed in range(20):
        on = grey()
        on.seed = seed
        assert not {s.rejected_response for s in told(task, on).values()} & set(lost), "it is grey indeed"
    assert list(told(of(tasks=("deblur",)), grey())) == ["deblur", CLEAN]


def test_reasons_of_restoration_are_passed_on() -> None:
    flat = row()
    flat.__dict__["pixels"] = np.zeros((64, 64, 3), np.uint8)
    flat.picture = type(flat.picture)(encode(flat.pixels, "png"), "png", 64, 64)
    assert reasons(of(tasks=("deblur", "inpaint")), flat) == ["deblur_nothing_changed", "inpaint_nothing_changed"]
    assert reasons(of(tasks=("inpaint_object",), clean=False), row()) == ["inpaint_object_not_annotated"]
    only = of(tasks=("deblur", "denoise"), clean=False, rejected=True)
    assert reasons(only, flat) == ["deblur_nothing_changed", "denoise_no_worse_answer"]
    assert of(tasks=("inpaint_object",)).reads == Restoration(RestorationConfig(tasks=("inpaint_object",))).reads


def test_strengths_are_restorations_own() -> None:
    shared = {"tasks": ["outpaint"], "noise": [60.0, 60.0], "instructions": "restoration_plain"}
    task = Diagnose(parse_config(DiagnoseConfig, {"restoration": shared, "tasks": ["denoise"]}, "tasks.diagnose"))
    assert told(task, row())["denoise"].provenance["parameters"] == {"degradation": "denoise", "sigma": 60.0}
    assert task.fingerprint != of(tasks=("denoise",)).fingerprint
    assert of(restoration={"masks": "things"}, tasks=("inpaint_object",)).reads.keys() == {
        "things.masks",
        "things.area",
    }
    with pytest.raises(RecipeError, match="blurr"):
        parse_config(DiagnoseConfig, {"restoration": {"blurr": [0.1, 0.2]}}, "tasks.diagnose")
    with pytest.raises(RecipeError, match="tasks"):
        parse_config(DiagnoseConfig, {"tasks": ["super_resolution"]}, "tasks.diagnose")


def test_worse_answers_need_another_answer() -> None:
    with pytest.raises(RecipeError, match="no other answer is wrong of deblur"):
        of(tasks=("deblur",), clean=False, rejected=True)
    with pytest.raises(RecipeError, match="no other answer is wrong of deblur"):
        of(tasks=("deblur", "motion_deblur"), clean=False, rejected=True)
    assert len(told(of(tasks=("deblur",), rejected=True), row())) == 2


def test_the_plain_wordings_are_one_each() -> None:
    texts = of(instructions="diagnose_plain").instructions.texts
    assert all(len(texts[key]) == 1 for key in ("question", CLEAN, *DEFAULT))
    assert all(len(texts[key]) > 1 for key in set(texts) - {"question", CLEAN, *DEFAULT})


def test_wordings_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("question: Was fehlt?\ndeblur: Die Schärfe.")
    made = told(of(instructions=str(tmp_path / "mine.yaml")), row())["deblur"]
    assert [m["content"] for m in made.messages] == ["<image>Was fehlt?", "Die Schärfe."]
