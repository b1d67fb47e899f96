"""Builds as a user runs them: the same bytes on any number of workers and after kill -9; nothing done twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.pipelines.builds import build, bytes_of, crops, recipe, start, x2i
from x2i import corpus
from x2i.base.files import exclusive

IMAGES = 40


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    root = tmp_path_factory.mktemp("built")
    crops(root / "photos", IMAGES)
    return root, build(recipe(root, relative=True), "--workers", "2")


def copied(built: tuple[Path, dict[str, object]], root: Path, *but: str, **changes: object) -> Path:
    """A recipe in a copy of the built folder, times included, without the parts in `but`."""
    shutil.copytree(built[0], root, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*but))
    return recipe(root, relative=True, **changes)


def fresh(built: tuple[Path, dict[str, object]], root: Path) -> Path:
    """A recipe in a copy of the photographs, of which nothing is built."""
    return copied(built, root, "lake", "corpus")


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.parametrize("workers", ["1", "4"])
def test_the_number_of_workers_changes_no_byte(
    built: tuple[Path, dict[str, object]], tmp_path: Path, workers: str
) -> None:
    result = build(fresh(built, tmp_path), "--workers", workers)
    assert result["digest"] == built[1]["digest"]
    assert bytes_of(tmp_path / "corpus") == bytes_of(built[0] / "corpus")


def test_a_shard_has_all_tasks_and_those_of_each_lie_together(built: tuple[Path, dict[str, object]]) -> None:
    """A reader of one task reads a few large ranges; one who shuffles with a shard's buffer sees all tasks."""
    rows = corpus.open(built[0] / "corpus").manifest.to_pylist()
    for shard in {row["shard"] for row in rows}:
        tasks = [row["task_type"] for row in sorted(rows, key=lambda r: int(r["offset"])) if row["shard"] == shard]
        assert tasks == sorted(tasks) and len(set(tasks)) >= 3


def test_a_second_run_computes_nothing_and_starts_no_ray(built: tuple[Path, dict[str, object]]) -> None:
    before = bytes_of(built[0] / "corpus")
    again = build(built[0] / "recipe.yaml")
    assert again["idle"] is True
    assert again["computed"] == {}
    assert again["decoded"] == 0
    assert "start_ray" not in again["seconds"]
    assert again["digest"] == built[1]["digest"]
    assert bytes_of(built[0] / "corpus") == before


def test_a_new_threshold_runs_no_annotator(built: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    path = copied(built, tmp_path, select={"where": {"colourful": "quality.colourfulness > 20"}})
    result = build(path)
    assert result["computed"] == {}
    assert result["decoded"] == 0
    assert 0 < int(result["rows_out"]) < int(built[1]["rows_out"])  # type: ignore[call-overload]


def test_a_changed_parameter_runs_that_annotator_only(built: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    path = copied(built, tmp_path, annotators={"phash": {}, "quality": {"shorter_side": 64}})
    assert build(path)["computed"] == {"quality": IMAGES}


def test_a_new_file_costs_its_unit_only(built: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    path = copied(built, tmp_path)
    crops(tmp_path / "more", IMAGES + 1)
    shutil.copy(tmp_path / "more" / f"{IMAGES:04d}.jpg", tmp_path / "photos" / "0007b.jpg")
    second = build(path)
    assert second["rows_in"] == IMAGES + 1
    assert 0 < second["computed"]["image"] < IMAGES / 2


def test_kill_9_while_annotating(built: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    path = fresh(built, tmp_path)
    process = start("build", path, "--workers", "1")
    columns = tmp_path / "lake" / "rows"
    wait_for(lambda: len(list(columns.glob("*/*.parquet"))) >= 2)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(1.5)  # Ray's own processes follow the driver
    done = len(list(columns.glob("*/*.parquet")))
    result = build(path, "--workers", "2")
    assert done < result["units"], "the build was over before it could be killed"
    assert result["computed"]["image"] <= IMAGES - 2
    assert result["digest"] == built[1]["digest"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_kill_9_while_assembling(built: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    path = copied(built, tmp_path, "corpus")
    process = start("build", path, "--workers", "1")
    wait_for(lambda: len(list((tmp_path / ".corpus.building").glob("*/0*"))) >= 1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "corpus").exists(), "a corpus appears whole or not at all"
    time.sleep(1.5)
    result = build(path, "--workers", "2")
    assert result["computed"] == {}
    assert result["digest"] == built[1]["digest"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_ctrl_c_says_what_it_keeps_and_leaves_nothing_half_made(
    built: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    process = start("build", fresh(built, tmp_path), "--workers", "1")
    wait_for(lambda: bool(list((tmp_path / "lake" / "rows").glob("*/*.parquet"))))
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "goes on from here" in err
    assert "Traceback" not in err
    assert not (tmp_path / "corpus").exists()


def test_two_builds_into_one_folder_do_not_mix(built: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    path = copied(built, tmp_path)
    before = bytes_of(tmp_path)
    with exclusive(tmp_path / "corpus", "building a corpus"):
        second = x2i("build", path)
    assert second.returncode == 1
    assert "another process is building a corpus" in second.stderr
    assert bytes_of(tmp_path) == before


def test_a_file_that_changed_after_annotation_is_noticed(built: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    """Same size, same time, other bytes: the hash tells, the row falls, its neighbours stay."""
    path = copied(built, tmp_path, seed=1)  # the samples must be built anew
    victim = tmp_path / "photos" / "0003.jpg"
    stat, data = victim.stat(), bytearray(victim.read_bytes())
    data[-3] ^= 1
    victim.write_bytes(bytes(data))
    os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    result = build(path)
    assert result["computed"] == {}
    funnel = {f["reason"]: f["rows"] for f in corpus.open(tmp_path / "corpus").info["funnel"]}
    assert funnel["source_changed"] == 1
    assert result["rows_out"] == int(built[1]["rows_out"]) - 1  # type: ignore[call-overload]


def test_a_missing_shard_is_built_again(built: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    path = copied(built, tmp_path)
    (tmp_path / "corpus" / "shards" / "00001.tar").unlink()
    result = build(path)
    assert result["computed"] == {}
    assert result["groups_built"] > 0
    assert result["digest"] == built[1]["digest"]
    assert x2i("verify", tmp_path / "corpus").returncode == 0


def test_an_output_folder_that_is_no_corpus_is_left_alone(
    built: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    path = fresh(built, tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "thesis.txt").write_text("years of work")
    done = x2i("build", path)
    assert done.returncode == 2
    assert "not a corpus" in done.stderr
    assert (tmp_path / "corpus" / "thesis.txt").exists()


def test_dry_run_says_what_would_run_and_runs_nothing(built: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    done = x2i("build", fresh(built, tmp_path), "--dry-run", "--json")
    assert done.returncode == 0
    assert '"cached": 0' in done.stdout
    assert not (tmp_path / "corpus").exists()
    assert not list((tmp_path / "lake").glob("phash/*/*.parquet"))


def test_a_killed_worker_costs_a_repeat_and_nothing_else(built: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    path = fresh(built, tmp_path)
    process = start("build", path, "--workers", "2", "--json")

    def workers() -> list[psutil.Process]:
        children = psutil.Process(process.pid).children(recursive=True)
        return [c for c in children if c.is_running() and "ray::Worker.annotate" in " ".join(c.cmdline() or c.name())]

    wait_for(lambda: bool(workers()) or process.poll() is not None)
    for victim in workers()[:1]:
        victim.kill()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["digest"] == built[1]["digest"]
    assert not list((tmp_path / "lake" / "journal").glob("*"))
