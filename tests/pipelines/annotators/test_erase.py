"""`erase`: objects of photographs, by masks and by boxes, filled by OpenCV and by a pipeline of real architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.pipelines.annotating import batch, item, photo, run
from tests.pipelines.annotators import stable_diffusion
from tests.pipelines.drawn import code, ellipse
from x2i.base.errors import X2IError
from x2i.pipelines.annotators.base import Batch
from x2i.pipelines.annotators.erase import Erase, EraseConfig
from x2i.pipelines.images import decode, read_header

pytest.importorskip("pycocotools.mask")

#: The cup and the spoon of the photograph `coffee`, by eye, as shares.
CUP, SPOON = [0.28, 0.04, 0.69, 0.78], [0.535, 0.595, 0.685, 0.825]


def asked(name: str, objects: list[tuple[str, list[float]]], scale: float = 1.0) -> Batch:
    """A photograph with phrases, their boxes, and elliptic masks at another scale."""
    pixels = item(photo(name)).pixels
    assert pixels is not None
    size = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
    columns: dict[str, Any] = {
        "grounding.boxes": [[box for _, box in objects]],
        "grounding.phrases": [[phrase for phrase, _ in objects]],
        "masks.masks": [[code(ellipse(size, box)) for _, box in objects]],
        "masks.box_index": [list(range(len(objects)))],
    }
    return batch([photo(name)], columns=columns)


def erased(given: Batch, **config: Any) -> dict[str, Any]:
    (row,) = run(Erase(EraseConfig(**config)), given).to_pylist()
    return dict(row)


def opened(data: bytes) -> np.ndarray:
    return decode(data, read_header(data))


@pytest.mark.parametrize("method", ["telea", "ns"])
def test_the_object_is_gone_and_all_else_is_as_it_was(method: str) -> None:
    given = asked("coffee", [("a spoon", SPOON)], scale=0.5)
    row = erased(given, method=method)
    before = given[0].pixels
    assert before is not None
    after, white = opened(row["image"]), opened(row["mask"])[..., 0]
    assert (row["status"], row["phrase"], row["index"], row["by"]) == ("erased", "a spoon", [0], f"opencv {method}")
    inside = ellipse(before.shape[1::-1], SPOON)
    assert row["area"] == pytest.approx(inside.mean(), rel=0.05)
    assert set(np.unique(white)) == {0, 255}
    assert (white[inside] == 255).mean() > 0.99  # the hole covers it, with a rim
    assert (white > 0).mean() < 1.6 * inside.mean()
    difference = np.abs(after.astype(int) - before).max(axis=2)
    assert difference[white == 0].mean() < 4  # only JPEG
    assert difference[inside].mean() > 15
    spoon, filled = (p[inside].mean(axis=0) for p in (before, after))
    assert spoon[1] / spoon[0] > 0.55 and filled[1] / filled[0] < 0.35  # grey metal, then the red of the saucer


def test_only_the_part_round_the_hole_is_looked_at_and_that_changes_nothing() -> None:
    from x2i.pipelines.annotators.erase import _carried

    picture = opened(photo("chelsea"))
    hole = ellipse(picture.shape[1::-1], [0.3, 0.3, 0.4, 0.5])
    whole = cv2.inpaint(picture, hole.astype(np.uint8), 4.0, cv2.INPAINT_TELEA)
    assert np.array_equal(_carried(picture, hole, 4.0, cv2.INPAINT_TELEA), whole)


def test_what_is_too_large_or_cut_off_by_the_edge_stays() -> None:
    objects = [("a cup", CUP), ("a corner", [0.0, 0.6, 0.1, 1.0]), ("a crumb", [0.9, 0.9, 0.91, 0.92])]
    assert erased(asked("coffee", objects)) == dict.fromkeys(Erase.columns.names) | {"status": "none_fits"}
    assert erased(asked("coffee", [*objects, ("a spoon", SPOON)]))["index"] == [3]
    assert erased(asked("coffee", objects), area=(0.1, 0.5))["phrase"] == "a cup"
    assert erased(asked("coffee", []))["status"] == "no_boxes"


def test_all_boxes_of_a_phrase_go_together() -> None:
    other = [0.05, 0.4, 0.2, 0.6]
    row = erased(asked("coffee", [("spoons", SPOON), ("a cup", CUP), ("spoons", other)]))
    assert row["index"] == [0, 2]
    white = opened(row["mask"])[..., 0] > 0
    size = (white.shape[1], white.shape[0])
    assert white[ellipse(size, SPOON)].all() and white[ellipse(size, other)].all()


def test_boxes_alone_with_a_noun_if_there_is_one_only() -> None:
    config: dict[str, Any] = {"boxes": "faces.boxes", "phrases": None, "noun": "face", "masks": None}
    face = [0.36, 0.12, 0.52, 0.36]
    row = erased(batch([photo("astronaut")], columns={"faces.boxes": [[face]]}), **config)
    white = opened(row["mask"])[..., 0] > 0
    height, width = white.shape
    x1, y1, x2, y2 = (round(s * n) for s, n in zip(face, (width, height) * 2, strict=True))
    assert white[y1:y2, x1:x2].all() and row["phrase"] == "face"
    two = batch([photo("astronaut")], columns={"faces.boxes": [[face, [0.6, 0.6, 0.7, 0.7]]]})
    assert erased(two, **config)["status"] == "none_fits"


def test_which_object_goes_depends_on_the_image_alone() -> None:
    objects = [("a spoon", SPOON), ("a thing", [0.05, 0.4, 0.2, 0.6]), ("a mark", [0.4, 0.88, 0.6, 0.98])]
    given = asked("coffee", objects)
    annotator = Erase(EraseConfig())
    drawn = []
    for number in range(12):
        given[0].image_id = f"{number:064x}"
        drawn.append(annotator(given).to_pylist()[0])
    assert len({r["phrase"] for r in drawn}) == 3
    given[0].image_id = f"{5:064x}"
    assert annotator(given).to_pylist()[0] == drawn[5]


def test_large_pictures_are_kept_smaller() -> None:
    row = erased(asked("coffee", [("a spoon", SPOON)]), side=300)
    assert max(opened(row["image"]).shape[:2]) == 300
    assert opened(row["image"]).shape == opened(row["mask"]).shape


def test_a_configuration_without_names_is_refused() -> None:
    with pytest.raises(ValueError, match="noun"):
        EraseConfig(phrases=None)
    assert Erase(EraseConfig()).weights() == []
    (weights,) = Erase(EraseConfig(backend="diffusers")).weights()
    assert weights.licence and weights.size
    assert Erase(EraseConfig(phrases=None, noun="face", masks=None, boxes="faces.boxes")).reads == ("faces.boxes",)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers")
    return stable_diffusion.saved(tmp_path_factory.mktemp("pipeline"), inpaints=True)


def model(path: Path, **config: Any) -> dict[str, Any]:
    return {"backend": "diffusers", "weights": str(path), "size": 64, "steps": 2, **config}


def test_a_diffusers_pipeline_fills_the_hole_and_nothing_else(tiny: Path) -> None:
    given = asked("coffee", [("a spoon", SPOON)])
    row = erased(given, **model(tiny))
    assert row["by"] == f"diffusers {tiny}"
    before, after, white = given[0].pixels, opened(row["image"]), opened(row["mask"])[..., 0] > 0
    assert before is not None
    difference = np.abs(after.astype(int) - before).max(axis=2)
    assert difference[~white].mean() < 4 and difference[white].mean() > 20
    again = erased(given, **model(tiny))
    assert again == row  # seeded by the image
    assert erased(given, **model(tiny, prompt="zzz"))["image"] != row["image"]
    given[0].image_id = "1" * 64
    assert erased(given, **model(tiny))["image"] != row["image"]


def test_half_precision_comes_near(tiny: Path) -> None:
    given = asked("coffee", [("a spoon", SPOON)])
    full, half = (opened(erased(given, **model(tiny, precision=p))["image"]).astype(int) for p in ("fp32", "bf16"))
    assert 0 < np.abs(full - half).mean() < 2


def test_a_picture_that_the_safety_checker_refuses_is_none(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    annotator = Erase(EraseConfig(**model(tiny)))
    annotator.setup()
    monkeypatch.setattr(annotator._pipeline.pipeline, "run_safety_checker", lambda image, *_: (image, [True]))
    assert annotator(asked("coffee", [("a spoon", SPOON)])).to_pylist()[0]["status"] == "flagged"


def test_a_pipeline_that_is_not_whole_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(X2IError, match="no model_index.json"):
        Erase(EraseConfig(**model(tmp_path))).setup()
    broken = stable_diffusion.broken(tiny, tmp_path / "sd")
    with pytest.raises(X2IError, match=r"no whole UNet2DConditionModel: it lacks conv_in\.weight"):
        Erase(EraseConfig(**model(broken))).setup()
