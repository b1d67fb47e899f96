"""One bad sample costs one sample: never its neighbours, never the run."""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.pipelines.builds import crops, recipe
from x2i.corpus.lake import Column, Lake
from x2i.pipelines import recipe as recipes
from x2i.pipelines.annotators.base import Annotator, AnnotatorConfig, Decoding, Item
from x2i.pipelines.annotators.image import ImageAnnotator
from x2i.pipelines.annotators.phash import PHash
from x2i.pipelines.engine.annotate import Journal, Want, annotate_unit
from x2i.pipelines.engine.build import plan_units
from x2i.pipelines.engine.inline import Inline
from x2i.pipelines.engine.progress import Quiet
from x2i.pipelines.engine.sweep import annotate as annotate_all
from x2i.pipelines.engine.todo import find_todo, unreadable
from x2i.pipelines.quickstart import photographs, trouble
from x2i.pipelines.sources.base import Problem, Row, Source, SourceConfig, Unit


class Given(Source):
    """Rows that the test made."""

    kind = "given"

    def __init__(self, rows: list[tuple[str, bytes | None]]) -> None:
        super().__init__(SourceConfig(kind="given", name="given"))
        self.rows = rows

    def plan(self) -> Iterator[Unit]:
        yield Unit("given", {})

    def read(self, unit: Unit, only: Collection[int] | None = None) -> Iterator[Row]:
        for i, (name, data) in enumerate(self.rows):
            if only is None or i in only:
                yield Row(i, name, data, f"text of {name}")


class Fussy(Annotator):
    """Raises on one picture, ends the process on another."""

    name = "fussy"
    columns = pa.schema({"length": pa.int64()})
    raises_on = "coins.png"
    dies_on = ""

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        for item in batch:
            if item.text == f"text of {self.dies_on}":
                os._exit(9)
            if item.text == f"text of {self.raises_on}":
                raise RuntimeError("I do not like coins")
        return pa.table({"length": [len(i.data) for i in batch]})


def wants(annotators: list[Annotator]) -> list[Want]:
    return [Want(a, Column(a.name, a.fingerprint)) for a in annotators]


def annotate(rows: list[tuple[str, bytes | None]], annotators: list[Annotator], lake: Lake) -> dict[str, list[dict]]:
    source = Given(rows)
    unit = next(source.plan())
    annotate_unit(source, unit, wants(annotators), lake, write_rows=True, skip={})
    columns = [Column(a.name, a.fingerprint) for a in annotators] + [Column("rows", source.fingerprint)]
    return {c.name: pq.read_table(lake.file(c, unit.id)).to_pylist() for c in columns}


def test_every_probe_is_one_row_with_its_reason(tmp_path: Path) -> None:
    files = {n: d for n, d in (photographs() | trouble()).items() if not n.endswith(".txt")}
    rows: list[tuple[str, bytes | None]] = [*files.items(), ("gone.jpg", None), ("empty.jpg", b"")]
    decoding = Decoding(max_pixels=100_000_000)
    out = annotate(
        rows, [ImageAnnotator(AnnotatorConfig(), decoding), PHash(AnnotatorConfig(), decoding)], Lake(tmp_path)
    )
    assert [len(table) for table in out.values()] == [len(rows)] * 3
    names = {r["row_id"]: r["location"] for r in out["rows"]}
    fell = {names[r["row_id"]]: r["error"] for r in out["phash"] if r["error"]}
    assert fell == {
        "trouble_truncated.jpg": "truncated",
        "trouble_html.jpg": "not_an_image",
        "trouble_bomb.png": "too_many_pixels",
        "gone.jpg": "missing_image",
        "empty.jpg": "empty_file",
    }
    assert all((r["hash"] is None) == (r["error"] is not None) for r in out["phash"])


def test_an_annotator_that_raises_on_one_picture_keeps_the_others(tmp_path: Path) -> None:
    rows = [(n, d) for n, d in photographs().items() if n.endswith(".png")]
    out = annotate(rows, [Fussy(AnnotatorConfig(batch_size=4))], Lake(tmp_path))["fussy"]
    assert [r["error"] for r in out if r["error"]] == ["annotator_failed"]
    assert "I do not like coins" in next(r["error_detail"] for r in out if r["error"])
    assert {r["length"] for r in out if not r["error"]} == {len(d) for n, d in rows if n != "coins.png"}


def test_a_row_that_kills_its_process_is_found_and_left_out(tmp_path: Path) -> None:
    rows = [(n, d) for n, d in photographs().items() if n.endswith(".png")]
    source, lake = Given(rows), Lake(tmp_path)
    unit = next(source.plan())
    killer = Fussy(AnnotatorConfig())
    killer.dies_on, killer.raises_on = "moon.png", ""
    journal = Journal(tmp_path / "journal")
    arguments = (source, unit, wants([killer]), lake, True, {}, journal)
    process = multiprocessing.get_context("fork").Process(target=annotate_unit, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 9
    assert not list(tmp_path.rglob("*.parquet"))
    row = journal.read()
    assert row is not None
    assert rows[row][0] == "moon.png"
    skip = {row: Problem("worker_died", "the process died")}
    annotate_unit(source, unit, wants([killer]), lake, write_rows=True, skip=skip, journal=journal)
    table = pq.read_table(lake.file(Column("fussy", killer.fingerprint), unit.id)).to_pylist()
    assert [r["error"] for r in table if r["error"]] == ["worker_died"]
    assert journal.read() is None


def test_texts_that_utf8_cannot_hold_do_not_cost_the_unit(tmp_path: Path) -> None:
    data = photographs()["coins.png"]
    out = annotate([("odd\udcff.png", data), ("fine.png", data)], [ImageAnnotator(AnnotatorConfig())], Lake(tmp_path))
    assert [r["location"] for r in out["rows"]] == ["odd\\udcff.png", "fine.png"]


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    """No file may grow beyond 300 bytes, as if the disk were full there: the write fails, and no part of it stays."""

    def cramped() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        try:
            annotate([("a.png", photographs()["coins.png"])], [ImageAnnotator(AnnotatorConfig())], Lake(tmp_path))
        except OSError:
            os._exit(7)

    process = multiprocessing.get_context("fork").Process(target=cramped)
    process.start()
    process.join()
    assert process.exitcode == 7
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"]


def test_a_file_that_could_not_be_read_is_tried_again(tmp_path: Path) -> None:
    """Its unit is not done: the next run finds it, and once the file can be read, all is well for good."""
    crops(tmp_path / "photos", 3)
    plan = recipes.load(recipe(tmp_path))
    lake = Lake(plan.recipe.lake)
    (unit,) = plan_units(plan, lake, Quiet())
    hidden = tmp_path / "hidden.jpg"
    (tmp_path / "photos" / "0001.jpg").rename(hidden)  # vanishes between planning and reading

    annotate_all(plan, lake, [unit], Inline(plan), Quiet())
    assert unreadable(plan, lake, [unit]) == {unit.id}
    annotate_all(plan, lake, [unit], Inline(plan), Quiet())
    assert unreadable(plan, lake, [unit]) == {unit.id}, "it is tried once a run"
    hidden.rename(tmp_path / "photos" / "0001.jpg")
    done = annotate_all(plan, lake, [unit], Inline(plan), Quiet())
    assert done.rows == {"image": 3, "phash": 3, "quality": 3}
    assert not unreadable(plan, lake, [unit])
    assert find_todo(plan, lake, [unit]).done
