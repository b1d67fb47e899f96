"""What workers take: GPUs in fractions where there are some, CPUs where there are none; pools are given back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.builds import crops, recipe
from x2i.corpus.lake import Lake
from x2i.pipelines import recipe as recipes
from x2i.pipelines.annotators import nsfw
from x2i.pipelines.engine import sweep as sweeping
from x2i.pipelines.engine.build import plan_units
from x2i.pipelines.engine.inline import Inline
from x2i.pipelines.engine.progress import Quiet
from x2i.pipelines.engine.resources import demand
from x2i.pipelines.engine.worker import Place

#: Ray is told of a GPU that is not there: its book-keeping is the same, and these annotators use none.
BUILD = """
import json, sys
import ray
ray.init("local", num_cpus=2, num_gpus=1, include_dashboard=False, object_store_memory=80 * 2**20, logging_level="ERROR")
from x2i.pipelines import recipe
from x2i.pipelines.engine import resources
from x2i.pipelines.engine.build import build

kinds, pools = [], []
run = resources.Engine.run

def noted(self, kind, models, jobs, revive):
    yield from run(self, kind, models, jobs, revive)
    kinds.append([*kind, self._places(kind)])
    pools.append(id(self._pool[2]))

resources.Engine.run = noted
result = build(recipe.load(sys.argv[1]), workers=2)
print(json.dumps({"kinds": kinds, "pools": len(set(pools)), "computed": result.computed, "decoded": result.decoded}))
"""


def test_fractions_of_a_gpu_are_asked_for_and_given_back(tmp_path: Path) -> None:
    crops(tmp_path / "photos", 9)
    annotators = {"phash": {"gpus": 0.5, "cpus": 0.5}, "quality": {"gpus": 0.5, "cpus": 0.5}}
    path = recipe(tmp_path, annotators=annotators, select={}, tasks={"text_to_image": {}})
    done = subprocess.run([sys.executable, "-c", BUILD, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kinds"] == [[1, 0, 2], [0.5, 0.5, 2], [1, 0, 2]], (
        "headers, then half a GPU for each of two, then assembly"
    )
    assert found["pools"] == 3
    assert found["computed"] == {"image": 9, "phash": 9, "quality": 9}
    assert found["decoded"] == 9, "the two share a worker, and an image is decoded once"


def test_a_cpu_is_never_made_to_wait_for_a_gpu() -> None:
    class Config(nsfw.NSFWConfig):
        device: str = "cpu"

    assert demand(nsfw.NSFW(nsfw.NSFWConfig(gpus=0.25, cpus=3)))[:2] == (3.0, 0.25)
    assert demand(nsfw.NSFW(Config(gpus=0.25)))[:2] == (1.0, 0.0)


@pytest.mark.parametrize("place", [Place(threads=3), Place(overlap=True), Place(threads=2, overlap=True)])
def test_threads_and_overlap_change_no_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Place) -> None:
    crops(tmp_path / "photos", 30)

    def values(lake: str, chosen: Place | None) -> list[Any]:
        plan = recipes.load(recipe(tmp_path, lake=str(tmp_path / lake), select={}))
        units = plan_units(plan, None, Quiet())
        if chosen is not None:
            monkeypatch.setattr(sweeping, "Place", lambda *a, **k: chosen)
            monkeypatch.setattr("x2i.pipelines.engine.inline.replace", lambda a, **k: a)
            monkeypatch.setattr("x2i.pipelines.engine.annotate.CHUNK_ROWS", 4)
        folder = Lake(plan.recipe.lake)
        sweeping.annotate(plan, folder, units, Inline(plan), Quiet())
        import pyarrow.parquet as pq

        return [pq.read_table(folder.file(c, u.id)).to_pylist() for c in plan.columns() for u in units]

    assert values("plain", None) == values("fast", place)
