"""Selection over a real lake: each rule, its order, its reasons; and what a wrong recipe is told."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.pipelines.builds import crops, recipe
from x2i.base.errors import RecipeError
from x2i.corpus.lake import Lake
from x2i.pipelines import recipe as recipes
from x2i.pipelines.engine.build import plan_units
from x2i.pipelines.engine.inline import Inline
from x2i.pipelines.engine.progress import Quiet
from x2i.pipelines.engine.sweep import annotate
from x2i.pipelines.engine.todo import by_source
from x2i.pipelines.quickstart import write_photographs
from x2i.pipelines.select.query import select


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's folder, annotated once, in this process."""
    root = tmp_path_factory.mktemp("selected")
    write_photographs(root / "photos")
    plan = recipes.load(recipe(root, decode={"max_pixels": 100_000_000}))
    lake = Lake(plan.recipe.lake)
    annotate(plan, lake, plan_units(plan, lake, Quiet()), Inline(plan), Quiet())
    return root


def verdicts(root: Path, tmp_path: Path, **rules: Any) -> dict[str, dict[str, Any]]:
    plan = recipes.load(recipe(root, decode={"max_pixels": 100_000_000}, select=rules))
    lake = Lake(plan.recipe.lake)
    out = tmp_path / "verdicts.parquet"
    select(plan, lake, by_source(plan, plan_units(plan, lake, Quiet())), out)
    return {row["location"]: row for row in pq.read_table(out).to_pylist()}


def reasons(found: dict[str, dict[str, Any]]) -> Counter[str]:
    return Counter(v["reason"] for v in found.values() if not v["kept"])


def test_every_row_has_one_verdict_and_the_sum_holds(root: Path, tmp_path: Path) -> None:
    found = verdicts(root, tmp_path, where={"large": "image.width > 400"}, dedup={"perceptual": {"bits": 8}})
    assert len(found) == 28
    kept = sum(v["kept"] for v in found.values())
    assert kept + sum(reasons(found).values()) == 28
    assert all((v["reason"] is None) == v["kept"] for v in found.values())


def test_rules_act_in_order_and_the_first_broken_one_is_the_reason(root: Path, tmp_path: Path) -> None:
    found = verdicts(
        root, tmp_path, where={"large": "image.width > 400", "tall": "image.height > 400"}, dedup={"exact": True}
    )
    assert found["trouble_html.jpg"]["reason"] == "not_an_image"
    assert found["trouble_no_text.jpg"]["reason"] == "missing_text"  # it is narrow too, but the text comes first
    assert found["coins.png"]["reason"] == "large"  # 384 x 303 breaks both
    assert found["chelsea.png"]["reason"] == "tall"
    assert found["coins.png"]["detail"] == "image.width > 400"


def test_a_condition_on_a_null_does_not_hold(root: Path, tmp_path: Path) -> None:
    found = verdicts(root, tmp_path, where="image.icc = 'Adobe RGB (1998)'", dedup={"exact": False})
    assert {n for n, v in found.items() if v["kept"]} == {"rocket.jpg", "trouble_exact_copy.jpg"}
    assert set(reasons(found)) == {"where", "missing_text", "not_an_image", "truncated", "too_many_pixels"}


def test_rows_without_text_can_be_kept(root: Path, tmp_path: Path) -> None:
    assert verdicts(root, tmp_path, require_text=False)["trouble_no_text.jpg"]["kept"]


def test_duplicates_fall_to_the_best_and_say_to_whom(root: Path, tmp_path: Path) -> None:
    best = ["image.width * image.height", "-quality.blockiness"]
    found = verdicts(root, tmp_path, dedup={"perceptual": {"bits": 8}, "best": best})
    names = {v["row_id"]: n for n, v in found.items()}
    pairs = {n: (v["reason"], names[v["survivor"]]) for n, v in found.items() if v["survivor"]}
    assert pairs == {
        "trouble_exact_copy.jpg": ("duplicate_exact", "rocket.jpg"),
        "trouble_recompressed.jpg": ("duplicate_near", "china.jpg"),
        "trouble_exif_rotated.jpg": ("duplicate_near", "coffee.png"),  # upright before it is hashed
    }
    assert all(found[names[v["survivor"]]]["kept"] for v in found.values() if v["survivor"])
    turned = verdicts(root, tmp_path, dedup={"perceptual": {"bits": 8}, "best": ["-image.width"]})
    assert turned["china.jpg"]["reason"] == "duplicate_near"
    assert turned["trouble_recompressed.jpg"]["kept"]


def test_duplicates_of_a_row_that_fell_stay(root: Path, tmp_path: Path) -> None:
    """Only rows that stand compete: a copy is not dropped in favour of one that a condition removed."""
    where = {"not_the_original": "rows.location != 'rocket.jpg'"}
    found = verdicts(root, tmp_path, where=where, dedup={"perceptual": {"bits": 8}})
    assert found["trouble_exact_copy.jpg"]["kept"]


def test_deduplication_can_be_off(root: Path, tmp_path: Path) -> None:
    found = verdicts(root, tmp_path, dedup={"exact": False})
    assert found["trouble_exact_copy.jpg"]["kept"]
    assert found["trouble_recompressed.jpg"]["kept"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"select": {"where": {"x": "nsfw.score < 0.5"}}},
            ["select.where.x", "nsfw", "image, phash, quality", "add it under `annotators`"],
        ),
        ({"select": {"where": {"x": "quality.sharpnes > 1"}}}, ["select.where.x", "sharpness"]),
        ({"select": {"where": {"x": "quality.sharpness >"}}}, ["select.where.x", "syntax error"]),
        ({"select": {"where": {"x": "quality.sharpness"}}}, ["select.where.x", "not a yes or no"]),
        ({"select": {"dedup": {"best": ["quality.beauty"]}}}, ["select.dedup.best", "beauty"]),
        ({"annotators": {}, "select": {"dedup": {"perceptual": {"bits": 3}}}}, ["select.dedup.perceptual", "phash"]),
        ({"annotators": {"phsh": {}}}, ["annotators.phsh", "did you mean 'phash'"]),
        ({"annotators": {"quality": {"shorter_sid": 3}}}, ["annotators.quality", "did you mean 'shorter_side'"]),
        ({"tasks": {"control": {"low": [1, 500]}}}, ["tasks.control", "low must end before high begins"]),
        ({"tasks": {"kontrol": {}}}, ["tasks.kontrol", "did you mean 'control'"]),
        ({"taskz": {}}, ["taskz", "did you mean 'tasks'"]),
        ({"output": {"scores": ["quality.x"]}}, ["output.scores", "quality.sharpness"]),
        ({"output": {"scores": ["image.format"]}}, ["output.scores", "of numbers", "image.width"]),
        ({"select": {"where": {"x": "count(*) > 3"}}}, ["select.where.x", "a function over all rows"]),
        ({"select": {"dedup": {"best": ["max(image.width)"]}}}, ["select.dedup.best", "a function over all rows"]),
        (
            {"select": {"quotas": {"q": {"by": "count(*)", "most": 3}}}},
            ["select.quotas.q.by", "a function over all rows"],
        ),
        (
            {"tasks": {"restoration": {"tasks": ["derain"]}, "more": {"kind": "restoration", "tasks": ["derain"]}}},
            ["'derain' is made by tasks.", "`tasks` of each"],
        ),
        ({"tasks": {"fs": {"kind": "few_shot", "of": {"kontrol": {}}}}}, ["tasks.fs: of.kontrol", "mean 'control'"]),
        ({"sources": [{"kind": "foldr", "path": "x"}]}, ["sources.0.kind", "did you mean 'folder'"]),
        ({"sources": []}, ["sources"]),
        ({"name": "a b"}, ["name"]),
        ({"decode": {"max_pixels": 0}}, ["decode.max_pixels", "greater than 0"]),
    ],
)
def test_a_wrong_recipe_is_refused_with_file_key_and_remedy(
    tmp_path: Path, changes: dict[str, Any], told: list[str]
) -> None:
    path = recipe(tmp_path, **changes)
    with pytest.raises(RecipeError) as refused:
        recipes.load(path)
    assert str(path) in str(refused.value)
    for part in told:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("lake", {"lake": "{root}/corpus"}),
        ("lake", {"lake": "{root}/corpus/lake"}),
        ("sources.0.path", {"out": "{root}/photos"}),
        ("sources.0.path", {"sources": [{"kind": "webdataset", "path": "{root}/corpus/in/*.tar"}]}),
        ("sources.0.path", {"sources": [{"kind": "parquet", "path": ["{root}/a.parquet", "{root}/corpus/b.parquet"]}]}),
    ],
)
def test_what_a_build_would_wipe_out_is_refused(tmp_path: Path, key: str, changes: dict[str, Any]) -> None:
    path = recipe(tmp_path, **json.loads(json.dumps(changes).replace("{root}", str(tmp_path))))
    with pytest.raises(RecipeError, match="give `out` a folder of its own") as refused:
        recipes.load(path)
    assert f"{path}: {key}: " in str(refused.value)


def test_a_source_that_cannot_be_listed_is_named_with_recipe_and_place(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    with pytest.raises(RecipeError, match=r"sources\.0 \(folder\): .*photos: no such folder") as refused:
        plan_units(recipes.load(path), None, Quiet())
    assert str(path) in str(refused.value)


def test_conditions_cannot_smuggle_comments_or_quotes(root: Path, tmp_path: Path) -> None:
    found = verdicts(root, tmp_path, where={"it's": "image.format = 'PNG' -- only these"}, dedup={"exact": False})
    assert {v["image"]["format"] for v in found.values() if v["kept"]} == {"PNG"}
    assert reasons(found)["it's"] > 0


def test_near_duplicate_captions_fall_to_the_better_row(tmp_path: Path) -> None:
    crops(tmp_path / "photos", 6)
    for i, said in enumerate(
        [
            "A brown dog runs over the wet grass of a park",
            "A brown dog runs over the wet grass of a park.",
            "Two men fish",
            "",
            "Two boats",
            "A cat",
        ]
    ):
        (tmp_path / "photos" / f"{i:04d}.txt").write_text(said)
    rules = {"dedup": {"text": {"similarity": 0.8}, "best": ["texts.chars"]}, "require_text": False}
    plan = recipes.load(recipe(tmp_path, annotators={"texts": {}}, select=rules))
    lake = Lake(plan.recipe.lake)
    units = plan_units(plan, lake, Quiet())
    annotate(plan, lake, units, Inline(plan), Quiet())
    select(plan, lake, by_source(plan, units), tmp_path / "v.parquet")
    found = {row["location"]: row for row in pq.read_table(tmp_path / "v.parquet").to_pylist()}
    assert [n for n, r in found.items() if not r["kept"]] == ["0000.jpg"]
    fell = found["0000.jpg"]
    assert (fell["stage"], fell["reason"], fell["survivor"]) == (
        "duplicate",
        "duplicate_text",
        found["0001.jpg"]["row_id"],
    )
    with pytest.raises(RecipeError, match=r"select.dedup.text: needs the annotator `texts`"):
        recipes.load(recipe(tmp_path, annotators={}, select={"dedup": {"text": {}}}))
