"""Cascades as a user builds them: deaths, full disks, shared lakes and changed conditions leave no trace in the corpus."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from tests.pipelines.builds import build, crops, recipe, start, x2i
from x2i.base.errors import RecipeError, X2IError
from x2i.base.sql import plainly
from x2i.corpus.lake import Lake
from x2i.corpus.trace import trace_row
from x2i.pipelines import recipe as recipes
from x2i.pipelines.engine import annotate as engine
from x2i.pipelines.engine import publish
from x2i.pipelines.engine.annotate import Journal, Want, annotate_unit
from x2i.pipelines.engine.assemble import assemble_group
from x2i.pipelines.engine.build import plan_units, record
from x2i.pipelines.engine.estimate import estimate
from x2i.pipelines.engine.inline import Inline
from x2i.pipelines.engine.pool import Job
from x2i.pipelines.engine.progress import Quiet
from x2i.pipelines.engine.sweep import _Reviver, annotate
from x2i.pipelines.engine.todo import Todo, by_source, find_todo, write_empty
from x2i.pipelines.engine.worker import Place, journal_path
from x2i.pipelines.recipe import Plan
from x2i.pipelines.select.query import select

IMAGES = 24
CASCADE: dict[str, Any] = {
    "quality": {},
    "phash": {"where": "quality.sharpness > 1000"},
    "texts": {"where": "phash.hash is not null"},
}


def cascade(root: Path, relative: bool = False, **changes: Any) -> Path:
    """A recipe whose annotators see what those before them let through; `changes` replace its keys."""
    selection = {"where": {"sharp": "coalesce(quality.sharpness, 0) > 100"}, "dedup": {"perceptual": {"bits": 2}}}
    content = {"annotators": CASCADE, "select": selection, "tasks": {"text_to_image": {}}}
    return recipe(root, relative, **{**content, "output": {"shard_samples": 10}, **changes})


def look(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Build in this process, without Ray: corpus.json, and the rows that were computed."""
    plan = recipes.load(path)
    lake = Lake(plan.recipe.lake)
    units = plan_units(plan, lake, Quiet())
    done = annotate(plan, lake, units, Inline(plan), Quiet())
    record(plan, lake, units)
    staging = publish.Staging(Path(plan.recipe.out))
    select(plan, lake, by_source(plan, units), staging.verdicts)
    groups = staging.group(plan)
    with pq.ParquetFile(groups.rows) as file:
        for number in range(len(groups.units)):
            if not groups.reused and not groups.folder(number).exists():
                rows = file.read_row_group(number).to_pylist()
                assemble_group(plan, {u.id: u for u in units}, rows, groups.folder(number))
    return publish.publish(plan, lake, staging, groups, by_source(plan, units)), done.rows


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A cascade that `x2i build` built with two workers; not to be changed."""
    root = tmp_path_factory.mktemp("cascade")
    crops(root / "photos", IMAGES)
    return root, build(cascade(root, relative=True), "--workers", "2")


@pytest.fixture
def root(built: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the photographs, times included (a unit is known by them), as the current folder."""
    shutil.copytree(built[0] / "photos", tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def begun(built: tuple[Path, dict[str, Any]], root: Path) -> Path:
    """A recipe whose first pass lies in the lake already."""
    shutil.copytree(built[0] / "lake", root / "lake", ignore=shutil.ignore_patterns("phash", "texts", "recipes"))
    return cascade(root, relative=True)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.005)


def second_pass(root: Path) -> bool:
    return bool(list((root / "lake" / "phash").glob("*/*.parquet")))


def test_the_same_rows_as_without_ray(built: tuple[Path, dict[str, Any]], root: Path) -> None:
    info, rows = look(cascade(root, relative=True))
    assert rows == built[1]["computed"]
    assert 0 < rows["phash"] < IMAGES
    assert built[1]["passes"] == 3
    assert info["digest"] == built[1]["digest"]


def test_kill_9_and_sigterm_in_the_second_pass(built: tuple[Path, dict[str, Any]], root: Path) -> None:
    path = begun(built, root)
    process = start("build", path, "--workers", "1")
    wait_for(lambda: second_pass(root))
    os.kill(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "goes on from here" in err
    assert "SIGTERM received" not in err, "Ray's own handler prints a stack trace"
    shutil.rmtree(root / "lake" / "phash")
    process = start("build", path, "--workers", "1")
    wait_for(lambda: second_pass(root))
    process.kill()
    process.communicate()
    time.sleep(1)  # its workers follow it
    info, rows = look(path)
    assert not {"image", "quality"} & rows.keys()
    assert info["digest"] == built[1]["digest"]


def test_workers_that_are_killed_in_the_second_pass(built: tuple[Path, dict[str, Any]], root: Path) -> None:
    process = start("build", begun(built, root), "--workers", "2", "--json")
    wait_for(lambda: second_pass(root) or process.poll() is not None)
    for child in psutil.Process(process.pid).children(recursive=True):
        if "ray::Worker" in " ".join(child.cmdline() or [child.name()]):
            child.kill()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["digest"] == built[1]["digest"]


def test_a_journal_of_a_killed_run_blames_no_row(root: Path) -> None:
    plan = recipes.load(cascade(root))
    lake = Lake(plan.recipe.lake)
    unit = plan_units(plan, lake, Quiet())[0]
    journal = Journal(journal_path(lake, unit))
    journal.mark(3)
    revive = _Reviver(lake)
    first = revive(Job("annotate", (unit, {"phash": None}, False, {}, False, Place())))
    assert first.arguments[3:5] == ({}, True)
    assert journal.read() is None
    journal.mark(4)  # by the careful attempt
    assert revive(first).arguments[3][4].reason == "worker_died"


def test_a_where_that_is_changed_dropped_and_changed_back(built: tuple[Path, dict[str, Any]], root: Path) -> None:
    def with_where(where: str | None, **changes: Any) -> Path:
        return cascade(root, annotators={**CASCADE, "phash": {"where": where}}, **changes)

    first, rows = look(with_where("quality.sharpness > 1000"))
    assert first["digest"] == built[1]["digest"]
    _, narrow = look(with_where("quality.sharpness > 2000"))
    assert narrow == {}, "rows that were seen are not seen again"
    whole, more = look(with_where(None))
    assert more == {"phash": IMAGES - rows["phash"], "texts": IMAGES - rows["phash"]}
    assert look(with_where(None)) == (whole, {})
    assert look(with_where("quality.sharpness > 1000")) == (first, {})
    assert whole["digest"] == look(with_where(None, lake=str(root / "other")))[0]["digest"]
    (root / "photos" / "zzzz.jpg").write_bytes((root / "photos" / "0001.jpg").read_bytes())
    assert look(with_where(None))[1]["image"] < IMAGES, "and new files are found all the same"


def test_retry_keeps_to_the_where(root: Path) -> None:
    look(path := cascade(root))
    plan = recipes.load(path)
    lake = Lake(plan.recipe.lake)
    units = plan_units(plan, lake, Quiet())
    everything: dict[str, dict[str, frozenset[int] | None]] = {"phash": {u.id: frozenset(range(99)) for u in units}}
    asked = find_todo(plan, lake, units, retry=everything).missing
    passing = lake.sql("select count(*) from quality where sharpness > 1000").fetchall()[0][0]
    assert sum(len(wanted["phash"] or ()) for wanted in asked.values()) == passing


def test_builds_that_share_a_lake_lose_no_rows_of_each_other(root: Path) -> None:
    plan = recipes.load(cascade(root))
    lake, unit = Lake(plan.recipe.lake), plan_units(plan, Lake(plan.recipe.lake), Quiet())[0]
    phash = next(a for a in plan.annotators if a.name == "phash")
    column = plan.column(phash)
    wants = [Want(phash, column, frozenset([i])) for i in range(6)]
    threads = [
        threading.Thread(target=annotate_unit, args=(plan.sources[0], unit, [want], lake, False, {})) for want in wants
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file = lake.file(column, unit.id)
    assert pq.read_metadata(file).num_rows == 6
    write_empty(plan, lake, [unit], Todo(visited={"phash": [unit.id]}))  # as one that looked before they wrote
    assert pq.read_metadata(file).num_rows == 6


def test_a_full_disk_in_the_second_pass(
    built: tuple[Path, dict[str, Any]], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pq.write_table

    def cramped(table: Any, path: Path, **options: Any) -> None:
        if "phash" in path.parts and list(path.parent.glob("*.parquet")):
            path.write_bytes(b"PAR1")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(table, path, **options)

    path = cascade(root, relative=True)
    with monkeypatch.context() as full:
        full.setattr(engine.pq, "write_table", cramped)
        with pytest.raises(OSError, match=r"No space left on device: 'lake/phash/.*\.parquet'"):
            look(path)
    assert not list(root.rglob("*.tmp"))
    info, rows = look(path)
    assert "quality" not in rows
    assert info["digest"] == built[1]["digest"]


def test_a_selection_that_cannot_be_written_says_so(root: Path) -> None:
    look(path := cascade(root))
    plan = recipes.load(path)
    units = by_source(plan, plan_units(plan, Lake(plan.recipe.lake), Quiet()))
    with pytest.raises(X2IError, match=r"gone/verdicts\.parquet.*\n.*run the same command again"), plainly():
        select(plan, Lake(plan.recipe.lake), units, root / "gone" / "verdicts.parquet")


def test_a_damaged_file_of_the_lake_is_named_and_made_again(built: tuple[Path, dict[str, Any]], root: Path) -> None:
    path = cascade(root, relative=True)
    look(path)
    for which in ("rows", "quality", "phash"):
        file = next((root / "lake" / which).glob("*/*.parquet"))
        file.write_bytes(file.read_bytes()[:-20])
        named = re.escape(str(file.relative_to(root)))
        with pytest.raises(X2IError, match=rf"{named}: cannot be read .* Remove it: the next build"), plainly():
            look(path)
        with pytest.raises(X2IError, match=rf"{named}: cannot be read"):
            estimate(plan := recipes.load(path), plan_units(plan, None, Quiet()), sample=0)
        file.unlink()
        assert look(path)[0]["digest"] == built[1]["digest"]


def test_annotators_may_have_any_name(root: Path) -> None:
    names = ["seen", "again", "verdicts", "near", "place", "select"]
    sharp = {"kind": "quality", "shorter_side": 64}
    chain = {n: {**sharp, "where": f'"{before}".sharpness > 500'} for before, n in itertools.pairwise(names)}
    annotators = {names[0]: sharp, **chain, "phash": {"where": '"select".sharpness > 500'}}
    for limit in (1, 100):  # the second time with the first one's corpus in place
        where = {"sharp": " and ".join(f'coalesce("{n}".sharpness, 1000) > {limit}' for n in names)}
        selection = {"where": where, "dedup": {"perceptual": {"bits": 2}}}
        info, _ = look(cascade(root, annotators=annotators, select=selection))
        assert info["counts"]["rows_out"] > 0


def refused(root: Path, **changes: Any) -> str:
    with pytest.raises(RecipeError) as refusal:
        recipes.load(cascade(root, **changes))
    return str(refusal.value)


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("sharpness > 100", "annotators.phash.where: .*did you mean quality.sharpness"),
        ("random() > 0.5", "annotators.phash.where: .*random gives another answer every time.*hash\\(rows.row_id\\)"),
        ("quality.sharpness > 'high'", "annotators.phash.where: .*Could not convert string 'high'"),
        ("qualty.sharpness > 1", "did you mean quality"),
        ("nsfw.score > 1", "annotators of this recipe: .*; add it under `annotators`"),
        ("quality.sharpness > avg(quality.sharpness) over ()", "cannot contain window functions"),
        ("phash.hash > 1", "phash waits for itself"),
        ("texts.chars > 1", r"wait for each other: phash \(texts\), texts \(phash\)$"),
    ],
)
def test_a_condition_that_cannot_be_asked_is_refused(root: Path, where: str, says: str) -> None:
    last = {"edges": {"kind": "quality", "where": "texts.chars > 1"}}  # waits for the others, and is in no circle
    assert re.search(says, refused(root, annotators={**CASCADE, "phash": {"where": where}, **last}))


def test_more_that_is_refused(root: Path) -> None:
    assert "'Quality' and 'quality' are one name in SQL" in refused(
        root, annotators={"quality": {}, "Quality": {"kind": "quality"}}
    )
    assert "select.where.lucky: 'uuid() is not null': uuid gives another answer" in refused(
        root, select={"where": {"lucky": "uuid() is not null"}}
    )


def test_comments_in_a_condition_name_nobody(root: Path) -> None:
    where = "quality.sharpness > 1000 -- it's not texts.chars\n/* nor texts.words */"
    plan = recipes.load(cascade(root, annotators={**CASCADE, "phash": {"where": where}}))
    assert [a.name for a in plan.annotators] == ["image", "quality", "phash", "texts"]


@pytest.mark.parametrize("key", ["annotators.phash.where", "select.where.number"])
def test_a_value_that_does_not_convert_names_the_key(root: Path, key: str) -> None:
    condition = "cast(rows.text as int) > 3"
    changes: dict[str, Any] = {"select": {"where": {"number": condition}}}
    if key.startswith("annotators"):
        changes = {"annotators": {**CASCADE, "phash": {"where": condition}}}
    with pytest.raises(RecipeError, match=rf"{key}: 'cast.*Could not convert string 'Part 0 .*try_cast"):
        look(cascade(root, **changes))


def without_units(plan: Plan) -> list[Any]:
    return [s.where for s in estimate(plan, [], sample=0).steps]


def test_a_plan_can_be_made_of_nothing(root: Path) -> None:
    plan = recipes.load(cascade(root))
    assert without_units(plan) == [None, None, "quality.sharpness > 1000", "phash.hash is not null"]
    assert without_units(replace(plan, annotators=plan.annotators[:2])) == [None, None]


def test_trace_tells_who_was_not_asked_and_finds_every_file(
    built: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(built[0])
    lake = Lake("lake")
    asked, left_out = (
        lake.sql(f"select location from rows join quality using (row_id) where {c} order by sharpness desc").fetchall()
        for c in ("sharpness > 1000", "sharpness <= 1000")
    )
    (row,) = trace_row("corpus", asked[0][0])["rows"]
    assert {a["name"]: a["asked"] for a in row["annotations"]} == dict.fromkeys(["image", *CASCADE], True)
    assert all(Path(a["lake_file"]).is_file() for a in row["annotations"])
    (row,) = trace_row("corpus", left_out[0][0])["rows"]
    told = {a["name"]: a for a in row["annotations"]}
    assert {name: a["asked"] for name, a in told.items()} == {
        "image": True,
        "quality": True,
        "phash": False,
        "texts": False,
    }
    assert told["phash"]["because"] == {"quality.sharpness": told["quality"]["values"]["sharpness"]}
    near = next(r for r in row["rules"] if r["rule"] == "near")
    assert (near["holds"], near["values"]) == (None, {"phash.hash": None})
    shown = x2i("trace", built[0] / "corpus", "--row", left_out[0][0]).stderr
    assert "not asked: where" in shown
    assert "phash.hash = null" in shown


def test_audit_and_verify_of_a_cascade(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    assert x2i("verify", built[0] / "corpus").returncode == 0
    done = x2i("audit", built[0] / "corpus", "--out", tmp_path / "report.html")
    assert done.returncode == 0, done.stderr
    assert "add up" in done.stderr
    assert "where quality.sharpness &gt; 1000" in (tmp_path / "report.html").read_text()
    assert "on rows where `quality.sharpness > 1000`" in (built[0] / "corpus" / "README.md").read_text()
