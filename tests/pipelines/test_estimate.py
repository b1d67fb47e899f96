"""`x2i plan`: says what is cached and what would run, estimates from a sample, and touches nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pipelines.builds import build, bytes_of, crops, recipe, x2i
from x2i.pipelines import recipe as recipes
from x2i.pipelines.engine.build import plan_units
from x2i.pipelines.engine.estimate import Estimate, estimate
from x2i.pipelines.engine.intervals import Interval, mean_of, share_of
from x2i.pipelines.engine.progress import Quiet

CASCADE: dict[str, Any] = {"quality": {}, "phash": {"where": "quality.sharpness > 500"}}


def look(path: Path, sample: int = 12) -> Estimate:
    plan = recipes.load(path)
    return estimate(plan, plan_units(plan, None, Quiet()), sample)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for file in crops(tmp_path / "photos", 40).iterdir():
        os.utime(file, (1_000_000_000, 1_000_000_000))  # the sample is drawn by the files' states: always the same one
    return tmp_path


def test_nothing_is_written_and_everything_is_to_run(root: Path) -> None:
    path = recipe(root, annotators=CASCADE, select={})
    before = bytes_of(root)
    found = look(path)
    assert bytes_of(root) == before
    steps = {s.name: s for s in found.steps}
    assert (found.rows, found.sample) == (40, 12)
    assert steps["quality"].to_run == Interval(40, 40, 40)
    assert steps["phash"].to_run is not None
    assert 0 <= steps["phash"].to_run.low < steps["phash"].to_run.value < steps["phash"].to_run.high <= 40
    assert steps["quality"].seconds_per_row is not None
    assert found.kept == share_of(12, 12)
    assert found.samples_per_row is not None
    assert 2.5 <= found.samples_per_row <= 4, "four tasks; flat crops give less"
    assert found.seconds is not None
    assert found.seconds.low < found.seconds.value < found.seconds.high
    assert 1 < found.decodes / 12 <= 2, "a cascade looks twice at what it lets through"


def test_the_interval_holds_what_the_build_then_finds(root: Path) -> None:
    path = recipe(root, annotators=CASCADE, select={})
    found = look(path, 24)
    result = build(path)
    step = next(s for s in found.steps if s.name == "phash")
    assert step.to_run is not None
    assert step.to_run.low <= result["computed"]["phash"] <= step.to_run.high
    assert found.corpus_bytes is not None
    size = sum(p.stat().st_size for p in (root / "corpus").rglob("*.tar"))
    assert found.corpus_bytes.low <= size * 1.05
    assert size * 0.5 <= found.corpus_bytes.high
    done = look(path, 0)
    assert [(s.cached, s.to_run) for s in done.steps if s.name != "phash"] == [(40, Interval(0, 0, 0))] * 2
    assert done.units_to_read == 0


def test_what_cannot_run_is_named_with_all_that_waits_for_it(root: Path) -> None:
    annotators = {"nsfw": {"weights": "./no/such.onnx"}, "phash": {"where": "nsfw.score < 0.5"}, "quality": {}}
    rules = {"where": {"safe": "nsfw.score < 0.5", "sharp": "quality.sharpness >= 0"}}
    path = recipe(root, annotators=annotators, select=rules)
    done = x2i("plan", path, "--json", "--sample", "4")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "./no/such.onnx" in found["annotators"]["nsfw"]["unavailable"]
    assert found["annotators"]["phash"]["unavailable"] == "waits for nsfw"
    assert found["annotators"]["quality"]["unavailable"] is None
    assert found["not_judged"] == ["safe"]
    assert found["kept"]["value"] == 1

    failed = x2i("build", path)
    assert failed.returncode == 1
    assert "nothing was started" in failed.stderr
    assert "./no/such.onnx" in failed.stderr
    assert "these would run: image, quality" in failed.stderr.replace("\n", " ")
    assert "Traceback" not in failed.stderr
    assert not (root / "lake").exists()


def test_an_empty_sample_and_people(root: Path) -> None:
    done = x2i("plan", recipe(root), "--sample", "0")
    assert done.returncode == 0
    assert "40 rows in" in done.stderr


def test_intervals_are_the_published_ones() -> None:
    wilson = share_of(81, 263)  # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I
    assert (round(wilson.low, 4), round(wilson.high, 4)) == (0.2553, 0.3662)
    assert share_of(0, 20).low == 0
    assert round(share_of(0, 20).high, 4) == 0.1611
    values = np.random.default_rng(3).normal(5, 2, 10)
    from scipy import stats

    low, high = stats.t.interval(0.95, 9, values.mean(), stats.sem(values))
    found = mean_of(list(values))
    assert (found.value, found.low, found.high) == pytest.approx((values.mean(), low, high))


def test_a_source_that_is_not_there_does_not_hide_what_is_missing_of_weights(tmp_path: Path) -> None:
    done = x2i("plan", recipe(tmp_path, annotators={"nsfw": {"weights": "./no/such.onnx"}}, select={}))
    assert done.returncode == 2
    assert "./no/such.onnx" in done.stderr
    assert "no such folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_recipe_of_all_annotators_can_be_planned_where_nothing_is_there() -> None:
    """It says what is missing of each, without a stack trace, and what would run without."""
    done = x2i("plan", Path("configs/corpora/x2i_full.yaml").resolve(), "--json", "--sample", "0")
    assert done.returncode in (0, 2), done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads(done.stdout)["annotators"]
    assert len(found) >= 23
    if found["clip"]["unavailable"]:  # no hub's cache here
        assert "1,710 MB, MIT" in found["clip"]["unavailable"]
        assert found["classes"]["unavailable"].startswith("waits for")
    assert found["nsfw"]["unavailable"] is None
