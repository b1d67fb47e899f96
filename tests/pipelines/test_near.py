"""The steps that compare pictures, in a selection over a real lake: benchmarks, look-alikes by an embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import pyarrow.parquet as pq
import pytest

from tests.pipelines.annotators.registry import ready
from tests.pipelines.builds import recipe
from x2i.base.errors import RecipeError
from x2i.corpus.lake import Lake
from x2i.pipelines import recipe as recipes
from x2i.pipelines.annotators.classes import Classes
from x2i.pipelines.engine.build import plan_units
from x2i.pipelines.engine.inline import Inline
from x2i.pipelines.engine.progress import Quiet
from x2i.pipelines.engine.sweep import annotate
from x2i.pipelines.engine.todo import by_source
from x2i.pipelines.images import decode, encode, read_header
from x2i.pipelines.quickstart import photographs
from x2i.pipelines.select.query import select

NAMES = ("chelsea.png", "coffee.png", "astronaut.png", "rocket.jpg", "page.png")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five photographs, one of them a second time in the mirror; a benchmark with another of them, mirrored, too."""
    ready(Classes(Classes.Config()))
    root = tmp_path_factory.mktemp("near")
    (root / "photos").mkdir()
    (root / "benchmark").mkdir()
    for name in NAMES:
        pixels = decode(photographs()[name], read_header(photographs()[name]))
        (root / "photos" / name).write_bytes(photographs()[name])
        mirrored = encode(cv2.flip(pixels, 1), "jpg")
        if name == "chelsea.png":
            (root / "photos" / "mirrored.jpg").write_bytes(mirrored)
        if name == "coffee.png":
            (root / "benchmark" / "cup.jpg").write_bytes(mirrored)
            (root / "benchmark" / "same.jpg").write_bytes(encode(pixels[10:-10, 10:-10].copy(), "jpg", 60))
    plan = loaded(root)
    annotate(plan, Lake(plan.recipe.lake), plan_units(plan, None, Quiet()), Inline(plan), Quiet())
    return root


def loaded(root: Path, **rules: Any) -> recipes.Plan:
    rules = {"require_text": False} | rules
    return recipes.load(recipe(root, annotators={"phash": {}, "classes": {}}, select=rules))


def fallen(root: Path, tmp_path: Path, **rules: Any) -> dict[str, tuple[Any, ...]]:
    plan = loaded(root, **rules)
    out = tmp_path / "verdicts.parquet"
    select(plan, Lake(plan.recipe.lake), by_source(plan, plan_units(plan, None, Quiet())), out)
    rows = pq.read_table(out).to_pylist()
    assert [p.name for p in tmp_path.iterdir()] == ["verdicts.parquet"], "something was left behind"
    names = {r["row_id"]: r["location"] for r in rows}
    return {
        r["location"]: (r["stage"], r["reason"], r["detail"], names.get(r["survivor"])) for r in rows if not r["kept"]
    }


def test_pictures_near_to_a_benchmark_fall_with_the_image_that_they_are_near_to(root: Path, tmp_path: Path) -> None:
    names = {"held_out": str(root / "benchmark")}
    found = fallen(root, tmp_path, decontaminate={"benchmarks": names, "perceptual": {"bits": 10}})
    assert set(found) == {"coffee.png"}
    stage, reason, detail, survivor = found["coffee.png"]
    assert (stage, reason, survivor) == ("contaminated", "held_out", None)
    assert detail.endswith("of 64 bits from held_out/same.jpg")
    by_look = {"benchmarks": names, "perceptual": None, "semantic": {"similarity": 0.85}}
    found = fallen(root, tmp_path, decontaminate=by_look)
    assert set(found) == {"coffee.png"}
    assert found["coffee.png"][2].startswith("cosine 0.")


def test_look_alikes_by_an_embedding_fall_to_the_better_one(root: Path, tmp_path: Path) -> None:
    found = fallen(root, tmp_path, dedup={"semantic": {"similarity": 0.85}, "best": ["rows.location = 'mirrored.jpg'"]})
    assert set(found) == {"chelsea.png"}
    stage, reason, detail, survivor = found["chelsea.png"]
    assert (stage, reason, survivor) == ("duplicate", "duplicate_semantic", "mirrored.jpg")
    assert detail.startswith("cosine 0.")
    assert fallen(root, tmp_path, dedup={"perceptual": {"bits": 8}}) == {}, "a pHash sees no mirror"


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"decontaminate": {"benchmarks": {"coco": "nowhere"}}}, "benchmarks.coco: nowhere: no such folder"),
        (
            {"dedup": {"semantic": {"column": "clip.embedding"}}},
            "add it under `annotators`, e.g. `clip: {kind: classes}`",
        ),
        ({"dedup": {"semantic": {"column": "classes.vector"}}}, "classes has no column 'vector'; it has labels"),
        ({"dedup": {"semantic": {"column": "classes.top"}}}, "classes.top is no embedding, but string"),
        ({"dedup": {"text": {"similarity": 0.9}}}, "select.dedup.text: needs the annotator `texts`"),
    ],
)
def test_what_is_missing_is_said_before_anything_starts(root: Path, rules: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as error:
        loaded(root, **rules)
    assert told in str(error.value)
