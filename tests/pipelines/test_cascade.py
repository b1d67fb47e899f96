"""Annotators in cascade: who runs on which rows, what is computed again, and that history leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.pipelines.builds import crops, recipe
from x2i.base.errors import RecipeError
from x2i.corpus.lake import Lake
from x2i.pipelines import annotators as annotator_files
from x2i.pipelines import recipe as recipes
from x2i.pipelines.engine import annotate as engine
from x2i.pipelines.engine.build import plan_units, record
from x2i.pipelines.engine.inline import Inline
from x2i.pipelines.engine.progress import Quiet
from x2i.pipelines.engine.sweep import Annotated, annotate
from x2i.pipelines.engine.todo import by_source, passes
from x2i.pipelines.recipe import Plan
from x2i.pipelines.select.query import select

COUNTING = '''
import pyarrow as pa
from x2i.pipelines.annotators.base import Annotator, AnnotatorConfig

SEEN = []

class Words(Annotator):
    """Reads the text and another annotator's column; keeps count of what it saw."""
    name = "words"
    needs = "row"
    columns = pa.schema({"count": pa.int32(), "times": pa.float32(), "blob": pa.binary()})
    heavy = frozenset({"blob"})

    @property
    def reads(self):
        return ("rows.text", "quality.sharpness")

    def __call__(self, batch):
        SEEN.extend(i.text for i in batch)
        counts = [len((i.text or "").split()) for i in batch]
        sharp = batch.columns["quality.sharpness"].to_pylist()
        return pa.table({"count": pa.array(counts, pa.int32()), "blob": [b"x"] * len(batch),
                         "times": pa.array([c * s for c, s in zip(counts, sharp)], pa.float32())})
'''


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A further annotator, `words`; the texts that it has seen."""
    import importlib
    import sys

    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "words.py").write_text(COUNTING)
    monkeypatch.setattr(annotator_files, "__path__", [*annotator_files.__path__, str(folder)])
    yield importlib.import_module("x2i.pipelines.annotators.words").SEEN
    sys.modules.pop("x2i.pipelines.annotators.words")


def run(root: Path, **changes: Any) -> tuple[Plan, Lake, Annotated]:
    plan = recipes.load(recipe(root, **{"select": {}} | changes))
    lake = Lake(plan.recipe.lake)
    units = plan_units(plan, lake, Quiet())
    done = annotate(plan, lake, units, Inline(plan), Quiet())
    record(plan, lake, units)
    return plan, lake, done


def verdicts(plan: Plan, lake: Lake, out: Path) -> list[dict[str, Any]]:
    select(plan, lake, by_source(plan, plan_units(plan, lake, Quiet())), out)
    return pq.read_table(out).to_pylist()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    crops(tmp_path / "photos", 18)
    return tmp_path


def over(limit: float) -> dict[str, Any]:
    return {"quality": {}, "phash": {"where": f"quality.sharpness > {limit}"}}


def test_a_where_lets_rows_through_and_a_wider_one_costs_only_what_is_new(root: Path) -> None:
    sharp = sorted(
        v["quality"]["sharpness"] for v in verdicts(*run(root, annotators={"quality": {}})[:2], root / "v.parquet")
    )
    high, low = (sharp[12] + sharp[11]) / 2, (sharp[4] + sharp[3]) / 2
    plan, lake, done = run(root, annotators=over(high))
    assert done.rows == {"phash": 6}
    assert done.decoded == 6, "only the rows that it is to see are decoded"
    first = verdicts(plan, lake, root / "first.parquet")
    assert [v["phash"]["hash"] is not None for v in first] == [v["quality"]["sharpness"] > high for v in first]

    _, _, done = run(root, annotators=over(low))
    assert done.rows == {"phash": 8}, "six of the fourteen are there already"
    _, _, done = run(root, annotators=over(low))
    assert done.rows == {}

    plan, lake, done = run(root, annotators=over(high))
    assert done.rows == {}
    again = verdicts(plan, lake, root / "again.parquet")
    assert again == first, "what a wider condition let in before leaves no trace"
    rows = lake.sql("select count(*) from phash").fetchall()
    assert rows == [(6,)], "the view too shows only the rows for which the condition holds"


def test_a_condition_that_lets_nothing_in_makes_no_calls_and_a_view_without_rows(root: Path) -> None:
    plan, lake, done = run(root, annotators=over(1e9))
    assert "phash" not in done.rows
    assert {v["phash"]["hash"] for v in verdicts(plan, lake, root / "v.parquet")} == {None}
    assert run(root, annotators=over(1e9))[2].passes == 0


def test_annotators_that_look_at_pixels_decode_once_and_say_the_same_alone(root: Path, monkeypatch: Any) -> None:
    calls: list[int] = []
    real = engine.decode
    monkeypatch.setattr(engine, "decode", lambda *a: calls.append(1) or real(*a))
    plan, lake, done = run(root, annotators={"quality": {}, "phash": {}})
    assert len(calls) == done.decoded == 18
    together = verdicts(plan, lake, root / "v.parquet")
    plan, lake, done = run(root, annotators={"phash": {}}, lake=str(root / "other"))
    assert [v["phash"] for v in verdicts(plan, lake, root / "v.parquet")] == [v["phash"] for v in together]


@pytest.mark.usefixtures("words")
def test_columns_come_from_the_same_pass_or_from_the_lake_alike(root: Path, words: list[str]) -> None:
    plan, lake, done = run(root, annotators={"quality": {}, "words": {}})
    assert done.passes == 1
    at_once = [v["words"] for v in verdicts(plan, lake, root / "v.parquet")]
    assert set(at_once[0]) == {"count", "times"}, "heavy columns stay in the lake"
    words.clear()
    run(root, annotators={"quality": {}}, lake=str(root / "steps"))
    plan, lake, done = run(root, annotators={"quality": {}, "words": {}}, lake=str(root / "steps"))
    assert done.decoded == 0, "columns in, columns out: no image is opened"
    assert done.rows == {"words": 18}
    assert [v["words"] for v in verdicts(plan, lake, root / "v.parquet")] == at_once
    assert at_once[0]["count"] == len(words[0].split())


@pytest.mark.usefixtures("words")
def test_an_error_upstream_is_the_reason_downstream(root: Path) -> None:
    (root / "photos" / "0003.jpg").write_bytes((root / "photos" / "0003.jpg").read_bytes()[:900])
    plan, lake, _ = run(root, annotators={"quality": {}, "words": {}})
    table = pq.read_table(lake.file(plan.column(plan.annotators[-1]), *_unit_of(plan, lake, 0))).to_pylist()
    assert [r["error"] for r in table][3] == "truncated"
    assert [r["count"] for r in table].count(None) == 1


def _unit_of(plan: Plan, lake: Lake, number: int) -> tuple[str, str]:
    unit = plan_units(plan, lake, Quiet())[number]
    return unit.id, plan.sources[0].fingerprint


def test_what_is_read_inherits_its_where(root: Path, words: list[str]) -> None:
    plan, _, done = run(root, annotators={"quality": {"where": "image.width > 9999"}, "words": {}})
    assert plan.where_of(plan.annotators[-1]) == "image.width > 9999"
    assert words == []
    assert done.rows == {"image": 18}


def test_another_text_runs_those_that_read_it_and_no_others(root: Path, words: list[str]) -> None:
    run(root, annotators={"quality": {}, "words": {}})
    words.clear()
    text = {"kind": "folder", "name": "photos", "path": str(root / "photos"), "unit_files": 6, "text_key": "title"}
    _, _, done = run(root, annotators={"quality": {}, "words": {}}, sources=[text])
    assert done.rows == {"words": 18}
    assert len(words) == 18


def test_two_of_a_kind_under_names_of_their_own(root: Path) -> None:
    annotators = {"quality": {}, "coarse": {"kind": "quality", "shorter_side": 64}}
    plan, lake, _ = run(root, annotators=annotators, select={"where": {"x": "coarse.sharpness > 0"}})
    found = verdicts(plan, lake, root / "v.parquet")
    assert found[0]["coarse"]["sharpness"] != found[0]["quality"]["sharpness"]


def test_passes_follow_what_is_needed(root: Path, words: list[str]) -> None:
    annotators = {
        "words": {"where": "phash.hash is not null"},
        "phash": {"where": "quality.sharpness > 1"},
        "quality": {},
    }
    plan = recipes.load(recipe(root, annotators=annotators, select={}))
    assert [p.annotators for p in passes(plan, lambda a: (1, 0))] == [("image", "quality"), ("phash",), ("words",)]


@pytest.mark.parametrize(
    ("annotators", "says"),
    [
        (
            {"phash": {"where": "quality.sharpnes > 3"}, "quality": {}},
            "annotators.phash.where: .*did you mean quality.sharpness",
        ),
        ({"phash": {"where": "nsfw.score > 3"}}, "annotators.phash.where: .*nsfw"),
        ({"phash": {"where": "image.width + 1"}}, "not a yes or no"),
        ({"phash": {"where": "quality.contrast > 1"}, "quality": {"where": "phash.hash > 1"}}, "wait for each other"),
        ({"words": {}}, "reads quality.sharpness: there is no annotator 'quality'"),
        ({"my words": {"kind": "phash"}}, "cannot be a name in SQL"),
        ({"q": {"kind": "qualty"}}, "did you mean 'quality'"),
        ({"quality": {"shorter_side": 2000}}, "decode.shorter_side is 1024: set that to 2000"),
    ],
)
def test_a_bad_cascade_is_refused_with_the_key(root: Path, words: list[str], annotators: Any, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        recipes.load(recipe(root, annotators=annotators, select={}))


def test_a_heavy_column_cannot_be_selected_by(root: Path, words: list[str]) -> None:
    with pytest.raises(RecipeError, match="it stays in the lake"):
        recipes.load(recipe(root, annotators={"quality": {}, "words": {}}, select={"where": "words.blob is not null"}))


FRAIL = '''
import pyarrow as pa
from x2i.pipelines.annotators.base import Annotator

BROKEN = {"now": True}

class Frail(Annotator):
    """Fails on some rows, for as long as it is broken."""
    name = "frail"
    needs = "header"
    columns = pa.schema({"status": pa.string()})
    retry = "status = 'busy'"

    def __call__(self, batch):
        if BROKEN["now"] and any(i.text.startswith("Part 0 of a") for i in batch):
            raise RuntimeError("not today")
        busy = [BROKEN["now"] and i.text.startswith("Part 0 of c") for i in batch]
        return pa.table({"status": ["busy" if b else "ok" for b in busy]})
'''

FOLLOWS = '''
import pyarrow as pa
from x2i.pipelines.annotators.base import Annotator

class Follows(Annotator):
    """Says what `frail` said."""
    name = "follows"
    needs = "row"
    columns = pa.schema({"status": pa.string()})
    reads = ("frail.status",)

    def __call__(self, batch):
        return pa.table({"status": batch.columns["frail.status"]})
'''


def test_retry_asks_again_what_failed_and_nothing_else(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib
    import sys

    folder = root / "frail"
    folder.mkdir()
    (folder / "frail.py").write_text(FRAIL)
    (folder / "follows.py").write_text(FOLLOWS)
    monkeypatch.setattr(annotator_files, "__path__", [*annotator_files.__path__, str(folder)])
    broken = importlib.import_module("x2i.pipelines.annotators.frail").BROKEN
    plan, lake, _ = run(root, annotators={"frail": {}, "follows": {}})
    before = verdicts(plan, lake, root / "v.parquet")
    bad = [v for v in before if v["reason"] == "annotator_failed" or v["frail"]["status"] == "busy"]
    assert 0 < len(bad) < 10
    assert run(root, annotators={"frail": {}, "follows": {}})[2].rows == {}, (
        "without being asked, nothing is tried again"
    )
    units = plan_units(plan, lake, Quiet())
    assert annotate(plan, lake, units, Inline(plan), Quiet(), retry=True).rows["frail"] < len(bad), "it still fails"
    broken["now"] = False
    assert annotate(plan, lake, units, Inline(plan), Quiet(), retry=True).rows == {
        "frail": len(bad),
        "follows": len(bad),
    }
    after = verdicts(plan, lake, root / "v.parquet")
    assert {v["frail"]["status"] for v in after} == {"ok"}
    assert [v["follows"]["status"] for v in after] == [v["frail"]["status"] for v in after], "and what read them"
    assert [v["location"] for v in after] == [v["location"] for v in before]
    for name in ("frail", "follows"):
        sys.modules.pop(f"x2i.pipelines.annotators.{name}")
