"""What CONTRIBUTING.md shows works as written: each example is put into a file, and used through a recipe."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.pipelines.builds import crops, recipe
from x2i.corpus.lake import Column, Lake
from x2i.corpus.sample import Sample
from x2i.pipelines import annotators, sources, tasks
from x2i.pipelines import recipe as recipes
from x2i.pipelines.engine.assemble import Outcome, _samples
from x2i.pipelines.engine.build import plan_units
from x2i.pipelines.engine.chosen import Heavy, Others
from x2i.pipelines.engine.inline import Inline
from x2i.pipelines.engine.progress import Quiet
from x2i.pipelines.engine.sweep import annotate

ROOT = Path(__file__).parents[1]


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three examples, each as one new file where the registry looks."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    for package, name in ((annotators, "aspect"), (sources, "list"), (tasks, "mirror")):
        (code,) = (b for b in blocks if b.startswith(f'"""`{name}`'))
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}.py").write_text(code)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])


@pytest.mark.usefixtures("examples")
def test_the_examples_work_as_they_stand(tmp_path: Path) -> None:
    photos = crops(tmp_path / "photos", 3)
    lines = [f"{p}\tpicture {p.stem}" for p in sorted(photos.glob("*.jpg"))] + ["/no/such.jpg\tgone"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    path = recipe(
        tmp_path,
        sources=[{"kind": "list", "name": "mine", "path": str(tmp_path / "list.txt")}],
        annotators={"aspect": None},
        select={"where": {"not_a_banner": "aspect.ratio < 3"}},
        tasks={"mirror": None},
    )
    plan = recipes.load(path)
    lake = Lake(plan.recipe.lake)
    (unit,) = plan_units(plan, lake, Quiet())
    annotate(plan, lake, [unit], Inline(plan), Quiet())
    aspect = next(a for a in plan.annotators if a.name == "aspect")
    values = pq.read_table(lake.file(Column("aspect", aspect.fingerprint), unit.id)).to_pylist()
    assert [v["ratio"] for v in values] == [1, 1, 1, None]
    assert values[3]["error"] == "missing_image"
    rows = pq.read_table(lake.file(Column("rows", plan.sources[0].fingerprint), unit.id)).to_pylist()
    got = next(iter(plan.sources[0].read(unit)))
    columns = {a.name: lake.file(Column(a.name, a.fingerprint), unit.id) for a in plan.annotators}
    row = rows[0] | {name: pq.read_table(path).to_pylist()[0] for name, path in columns.items()}
    heavy = Heavy(plan, {unit.id: unit})
    with Others(plan, {unit.id: unit}, heavy, [row], tmp_path) as others:
        (sample,) = _samples(plan, row, got, heavy, others, Outcome())
    assert isinstance(sample, Sample)
    assert sample.task_type == "mirror"


def test_every_room_of_the_table_is_there() -> None:
    table = re.findall(r"^\| `(x2i/\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert sorted(table) == sorted(f"x2i/{p.parent.name}" for p in (ROOT / "x2i").glob("*/__init__.py"))
