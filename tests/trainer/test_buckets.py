"""Buckets: the samples of a step have one size, near to their own, and nothing else about the plan changes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.trainer import corpora
from tests.trainer.test_table import rows_of, stage, write
from x2i import corpus
from x2i.base.config import parse_config
from x2i.base.errors import RecipeError
from x2i.corpus.manifest import SCHEMA
from x2i.model.pixels import crop
from x2i.trainer import ledger
from x2i.trainer.buckets import kept, nearest, sizes_of
from x2i.trainer.config import Reading, RunConfig
from x2i.trainer.data import SampleReader
from x2i.trainer.loader import Loader
from x2i.trainer.mixture import held_out_of, plan_of, table_of
from x2i.trainer.plan import BucketPlan
from x2i.trainer.progress import Silent
from x2i.trainer.run import train

BUCKETS = ((16, 16), (24, 16), (16, 24))
SIZES = ((640, 480), (480, 480), (300, 500), (1000, 998))  # one wide, two square, one tall


def shaped(folder: Path) -> corpus.Corpus:
    rows = rows_of(range(300))
    for place, row in enumerate(rows):
        size = dict(zip(("width", "height"), SIZES[place // 3 % 4], strict=True))
        if row["output_size"] is None:
            row["input_sizes"] = [size, {"width": 9, "height": 900}]
        else:
            row["output_size"] = size
    return write(folder, rows)


def bucket_of(row: dict[str, Any]) -> tuple[int, int]:
    size = row["output_size"] or row["input_sizes"][0]
    return {640: (24, 16), 480: (16, 16), 300: (16, 24), 1000: (16, 16)}[size["width"]]


def test_the_nearest_aspect_counts_and_then_the_largest_size_that_is_filled() -> None:
    buckets = ((512, 512), (1024, 1024), (768, 512), (512, 768))
    pictures = [(600, 600), (2000, 2000), (100, 100), (1024, 1000), (900, 600), (1, 900), (5000, 100)]
    widths, heights = np.array(pictures, float).T
    assert nearest(widths, heights, buckets).tolist() == [0, 1, 0, 0, 2, 3, 2]


def test_a_conversation_has_the_size_of_its_first_picture() -> None:
    sizes = [{"width": 5, "height": 6}, {"width": 7, "height": 8}]
    rows: list[dict[str, Any]] = [{"output_size": None, "input_sizes": n} for n in ([], sizes, [], sizes[1:])]
    rows[2]["output_size"] = rows[3]["output_size"] = sizes[0]
    fields = [SCHEMA.field(n) for n in ("output_size", "input_sizes")]
    widths, heights = sizes_of(pa.Table.from_pylist(rows, pa.schema(fields)))
    assert (widths.tolist(), heights.tolist()) == ([1, 5, 5, 5], [1, 6, 6, 6])


def test_a_bucket_of_next_to_nothing_is_served_by_its_neighbour() -> None:
    shares = {0: 0.6, 1: 0.3999, 2: 0.0001}
    assert kept(shares, ((16, 16), (24, 16), (32, 16)), 0.001) == {0: 0, 1: 1, 2: 1}
    assert kept(shares, ((16, 16), (24, 16), (32, 16)), 2) == {0: 0, 1: 0, 2: 0}


def test_a_crop_of_any_shape_keeps_the_aspect() -> None:
    y, x = np.mgrid[:60, :90].astype(np.uint8)
    cut = crop(np.stack([x, y, x], 2), 20, 40, 0.5, 1.0, 0.0).astype(int)
    assert cut.shape == (20, 40, 3)  # half of 90 x 45, at the right, at the top
    assert abs(cut[10, 0, 0] - 45) < 2 and abs(cut[10, -1, 0] - 89) < 2
    assert abs(cut[0, 5, 1] - 0) < 2 and abs(cut[-1, 5, 1] - 22) < 2


def test_the_samples_of_a_step_share_a_bucket_and_each_is_in_its_own(tmp_path: Path) -> None:
    opened = shaped(tmp_path / "shaped")
    of = stage(buckets=BUCKETS, mixture={"deblur": 1, "describe": 1})
    table = table_of([opened], [of], 0.2)
    plan = plan_of(table, of, 0)
    assert isinstance(plan, BucketPlan)
    rows = opened.manifest.to_pylist()
    steps = [plan.step(n) for n in range(1024)]
    dealt: Counter[str] = Counter()
    sizes: Counter[Any] = Counter()
    for number, step in enumerate(steps):
        assert [draw.index for draw in step] == list(range(number * 8, number * 8 + 8))
        assert {draw.size for draw in step} == {bucket_of(rows[d.sample]) for d in step} and len({*step}) == 8
        dealt.update(draw.stratum for draw in step)
        sizes[step[0].size] += 1
    assert dealt["deblur"] / 8192 == pytest.approx(0.5, abs=0.03)
    for size in BUCKETS:  # as much as of the samples
        shares = [[bucket_of(rows[s]) == size for s in table.train[name]] for name in plan.strata]
        assert sizes[size] == pytest.approx(1024 * np.mean([np.mean(s) for s in shares]), abs=1)
    for stratum, samples in table.train.items():
        if stratum in plan.strata:
            drawn = Counter(d.sample for step in steps for d in step if d.stratum == stratum)
            assert drawn.keys() == set(samples)
            by_bucket: dict[Any, set[int]] = {}
            for sample, count in drawn.items():
                by_bucket.setdefault(bucket_of(rows[sample]), set()).add(count)
            assert all(
                max(counts) - min(counts) <= 1 for counts in by_bucket.values()
            )  # whole epochs, but for the last
    again = plan_of(table_of([opened], [of], 0.2), of, 0)
    assert all(again.step(n) == steps[n] for n in np.random.default_rng(0).permutation(1024)[:200].tolist())
    assert plan.draw(77) == steps[9][5]
    spare = plan.spare(steps[9][5], 1)
    assert (spare.size, spare.index, spare.stratum) == (steps[9][5].size, 77, steps[9][5].stratum)
    assert bucket_of(rows[spare.sample]) == spare.size


def test_a_few_samples_in_a_bucket_of_others_are_not_repeated_over_and_over(tmp_path: Path) -> None:
    rows = rows_of(range(3000))
    wide = [n for n, row in enumerate(rows) if row["task_type"] == "describe"]
    for place, row in enumerate(
        rows
    ):  # deblur: one that is tall among squares; describe: all wide but one that is tall
        tall = place in (0, wide[0])
        shape = {"width": 300 if tall else 640 if row["task_type"] == "describe" else 480, "height": 480}
        row["output_size"], row["input_sizes"] = (None, [shape]) if row["output_size"] is None else (shape, [])
    of = stage(buckets=BUCKETS, mixture={"deblur": 1, "describe": 1e-6}, batch=64)
    table = table_of([write(tmp_path / "rare", rows)], [of], 0)
    plan = plan_of(table, of, 0)
    assert isinstance(plan, BucketPlan) and plan.sizes == [(16, 16)]  # tall and wide ones would not get half a step
    drawn = Counter(d.sample for n in range(200) for d in plan.step(n) if d.stratum == "deblur")
    assert drawn.keys() == set(table.train["deblur"]) and max(drawn.values()) - min(drawn.values()) <= 1
    even = plan_of(table, of.model_copy(update={"mixture": {"deblur": 1.0, "describe": 1.0}}), 0)
    assert isinstance(even, BucketPlan) and even.sizes == [(16, 16), (24, 16)]
    drawn = Counter(d.sample for n in range(400) for d in even.step(n) if d.stratum == "describe")
    assert drawn.keys() == set(table.train["describe"]) and max(drawn.values()) < 2 * min(drawn.values())


def test_stages_may_have_buckets_of_their_own_or_none(tmp_path: Path) -> None:
    opened = shaped(tmp_path / "shaped")
    stages = [stage(buckets=BUCKETS), stage(), stage(buckets=((16, 16), (32, 16))), stage(buckets=BUCKETS)]
    table, alone = table_of([opened], stages, 0.2), table_of([opened], stages[1:2], 0.2)
    assert len(table.buckets) == 2
    for number in range(20):
        assert plan_of(table, stages[1], 0).step(number) == plan_of(alone, stages[1], 0).step(number)
        assert plan_of(table, stages[3], 0).step(number) == plan_of(table, stages[0], 0).step(number)
        assert {d.size for d in plan_of(table, stages[2], 0).step(number)} <= {(16, 16), (32, 16)}
    held = {task: list(samples) for task, samples in held_out_of(table, stages[0]).items()}
    assert held == {task: list(samples) for task, samples in held_out_of(alone, stages[0]).items()}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 crops, half of them wide."""
    made = list(corpora.samples(24))
    for place in range(0, len(made), 6):
        made[place : place + 3] = corpora.widened(made[place : place + 3])
    return corpora.write(tmp_path_factory.mktemp("pictures") / "corpus", made)


@pytest.mark.parametrize("min_crop", [1.0, 0.5])
def test_pictures_are_read_at_the_size_of_their_bucket(pictures: Path, min_crop: float) -> None:
    of = stage(buckets=BUCKETS, mixture={"deblur": 1, "text_to_image": 1}, min_crop=min_crop, steps=20)
    table = table_of([corpus.open(pictures)], [of], 0.2)
    reader = SampleReader(table)
    shapes: set[Any] = set()
    for examples in Loader(reader, plan_of(table, of, 0), of, 0, Reading()):
        (shape,) = {image.shape for e in examples for image in (*e.inputs, e.output) if image is not None}
        shapes.add(shape)
        for example in (e for e in examples if e.inputs):
            assert example.output is not None
            blurred, sharp = example.inputs[0].astype(float), example.output.astype(float)
            assert np.corrcoef(blurred.ravel(), sharp.ravel())[0, 1] > 0.7
    reader.close()
    assert shapes == {(16, 16, 3), (16, 24, 3)}


def test_a_run_with_buckets_goes_on_exactly(pictures: Path, tmp_path: Path) -> None:
    class Cut(Silent):
        def step(self, stage: str, done: int, loss: float, by_task: dict[str, float]) -> None:
            if done == 4:
                raise MemoryError

    def config(name: str, **changes: Any) -> RunConfig:
        content = corpora.run_content(pictures, tmp_path / name, preview={"per_task": 0})
        content["stages"] = [{**content["stages"][0], "buckets": BUCKETS, "steps": 8} | changes]
        return parse_config(RunConfig, content, "test")

    straight = train(config("straight"))
    with pytest.raises(MemoryError):
        train(config("cut"), progress=Cut())
    resumed = train(config("cut"))
    name = "model.safetensors"
    assert (resumed.checkpoint / name).read_bytes() == (straight.checkpoint / name).read_bytes()
    assert len(ledger.files_of(resumed.output)) >= 2
    with pytest.raises(RecipeError, match=r"stages\.0\.buckets: \[24, 18\]: height 18"):
        train(config("wrong", buckets=[[16, 16], [24, 18]]))
