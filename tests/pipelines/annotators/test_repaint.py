"""`repaint`: cut-outs of photographs, painted anew by pipelines of real architecture with random weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pipelines.annotating import batch, photo, run
from tests.pipelines.annotators.stable_diffusion import broken, saved
from tests.pipelines.drawn import ellipse
from tests.pipelines.tasks.regions import PLACES, seen, values
from x2i.base.errors import X2IError
from x2i.corpus.sample import Sample
from x2i.pipelines.annotators.base import Batch
from x2i.pipelines.annotators.repaint import Repaint, RepaintConfig
from x2i.pipelines.images import decode, read_header
from x2i.pipelines.masks import bounded, cut_out
from x2i.pipelines.tasks.subject import Subject, SubjectConfig

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def inpainter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("inpaint"), inpaints=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("plain"), inpaints=False)


def asked(*names: str, **changes: Any) -> Batch:
    """Photographs with the boxes, phrases and masks of `tests.pipelines.tasks.regions`."""
    found = [values(f"{name}.png") for name in names]
    columns: dict[str, Any] = {
        f"{annotator}.{column}": [f[annotator][column] for f in found]
        for annotator, column in (
            ("grounding", "boxes"), ("grounding", "phrases"), ("masks", "masks"), ("masks", "box_index"),
        )
    }  # fmt: skip
    return batch([photo(name) for name in names], columns=columns | changes)


def of(path: Path, **config: Any) -> Repaint:
    return Repaint(RepaintConfig(**({"weights": str(path), "size": 64, "steps": 2, "area": (0.001, 0.9)} | config)))


def opened(data: bytes) -> np.ndarray:
    return decode(data, read_header(data))


def test_the_subject_is_painted_anew_on_white(inpainter: Path) -> None:
    given = asked("astronaut", "coffee")
    table = run(of(inpainter, grow=0.0), given)
    for name, item, row in zip(("astronaut", "coffee"), given, table.to_pylist(), strict=True):
        places = PLACES[f"{name}.png"]
        assert row["index"] == list(range(len(places))) and row["flagged"] == 0
        picture = item.pixels
        assert picture is not None
        for (_, box, _), data in zip(places, row["images"], strict=True):
            cut = cut_out(picture, box, ellipse(picture.shape[1::-1], box), 0.05)
            assert cut is not None
            before, after = bounded(cut[0], 64), opened(data)
            assert after.shape == before.shape and max(after.shape) == 64
            white = bounded(np.where(cut[1], 255, 0).astype(np.uint8)[..., None].repeat(3, 2), 64)[..., 0] < 128
            assert after[white].mean() > 240  # white, but for JPEG at the rim
            assert np.abs(after[~white].astype(int) - before[~white]).mean() > 10


def test_what_is_drawn_depends_on_the_picture_and_the_box_alone(inpainter: Path) -> None:
    annotator = of(inpainter)
    together = run(annotator, asked("astronaut", "coffee")).to_pylist()
    alone = asked("coffee")
    alone[0].image_id = f"{1:064x}"  # as in the batch
    assert annotator(alone).to_pylist() == [together[1]]
    alone[0].image_id = f"{2:064x}"
    assert annotator(alone).to_pylist()[0]["images"] != together[1]["images"]
    fewer = of(inpainter, most=1)
    assert run(fewer, asked("astronaut", "coffee")).to_pylist()[1]["images"] == [together[1]["images"][0], None]


def test_only_boxes_that_may_be_subjects_are_repainted(inpainter: Path) -> None:
    (row,) = run(of(inpainter), asked("chelsea")).to_pylist()
    assert row["index"] == [0, 1, 2] and row["images"][3] is None  # "it" is no subject
    (row,) = run(of(inpainter, area=(0.1, 0.9), most=1), asked("chelsea")).to_pylist()
    assert row["index"] == [2]
    lost = {"masks.box_index": [[0, 3]], "masks.masks": [values("chelsea.png")["masks"]["masks"][:2]]}
    (row,) = run(of(inpainter), asked("chelsea", **lost)).to_pylist()
    assert row["index"] == [0]
    nothing: dict[str, Any] = {
        c: [[]] for c in ("grounding.boxes", "grounding.phrases", "masks.masks", "masks.box_index")
    }
    assert run(of(inpainter), asked("chelsea", **nothing)).to_pylist() == [{"images": [], "index": [], "flagged": 0}]
    assert run(of(inpainter), Batch([], asked("chelsea").columns.slice(0, 0))).num_rows == 0


def test_image_to_image_paints_the_whole_cut_out(plain: Path) -> None:
    (weak,) = run(of(plain, method="image", strength=0.5), asked("coffee")).to_pylist()
    (strong,) = run(of(plain, method="image", strength=1.0), asked("coffee")).to_pylist()
    assert weak["index"] == strong["index"] == [0, 1]
    assert [opened(d).shape for d in weak["images"]] == [opened(d).shape for d in strong["images"]]
    assert weak["images"] != strong["images"]
    (other,) = run(of(plain, method="image", strength=0.5, prompt="zzz {object}"), asked("coffee")).to_pylist()
    assert other["images"] != weak["images"]


def test_rectangles_need_no_masks_and_no_phrases(inpainter: Path) -> None:
    given = batch([photo("astronaut")], columns={"faces.boxes": [[[0.36, 0.12, 0.52, 0.36]]]})
    config: dict[str, Any] = {"boxes": "faces.boxes", "phrases": None, "name": "a person", "masks": None}
    annotator = of(inpainter, **config)
    assert annotator.reads == ("faces.boxes",)
    (row,) = run(annotator, given).to_pylist()
    assert row["index"] == [0] and max(opened(row["images"][0]).shape) == 64
    with pytest.raises(ValueError, match="name"):
        RepaintConfig(phrases=None)
    with pytest.raises(ValueError, match="more steps"):
        RepaintConfig(steps=2, strength=0.4)


def test_what_the_safety_checker_refuses_is_counted(inpainter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    annotator = of(inpainter)
    annotator.setup()
    monkeypatch.setattr(annotator._pipeline.pipeline, "run_safety_checker", lambda image, *_: (image, [True]))
    assert annotator(asked("coffee")).to_pylist() == [{"images": [None, None], "index": [], "flagged": 2}]


def test_subjects_are_what_was_repainted(inpainter: Path) -> None:
    (row,) = run(of(inpainter), asked("coffee")).to_pylist()
    on = seen("coffee.png", values=values("coffee.png") | {"repaint": row})
    task = Subject(SubjectConfig(repaint="repaint.images", tasks=("subjects_to_image",), area=(0.001, 0.9)))
    (sample,) = task.build(on)
    assert isinstance(sample, Sample)
    for picture, data in zip(sample.input_images, row["images"], strict=True):
        assert np.abs(opened(picture.data).astype(int) - opened(data)).mean() < 4
    assert sample.output_image == on.picture


def test_pipelines_that_are_not_whole_or_cannot_do_it_are_refused(inpainter: Path, plain: Path, tmp_path: Path) -> None:
    for method, path in (("inpaint", inpainter), ("image", plain)):
        with pytest.raises(X2IError, match=r"no model_index\.json"):
            of(tmp_path, method=method).setup()
        part = broken(path, tmp_path / method)
        with pytest.raises(X2IError, match=r"repaint: .* no whole UNet2DConditionModel: it lacks conv_in\.weight"):
            of(part, method=method).setup()
    index = plain / "model_index.json"
    odd = tmp_path / "odd"
    shutil.copytree(plain, odd)
    (odd / index.name).write_text(index.read_text().replace("StableDiffusionPipeline", "DanceDiffusionPipeline"))
    with pytest.raises(X2IError, match="no pipeline from image to image"):
        of(odd, method="image").setup()


def test_says_where_its_weights_come_from() -> None:
    for method, spec in (("inpaint", "stable-diffusion-inpainting"), ("image", "stable-diffusion-v1-5")):
        (weights,) = Repaint(RepaintConfig(method=method)).weights()
        assert weights.spec == f"stable-diffusion-v1-5/{spec}" and weights.licence and (weights.size or 0) > 1e9
