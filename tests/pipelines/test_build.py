"""Builds as a user runs them: the same bytes on any number of workers and after kill -9; nothing done twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.pipelines.builds import build, bytes_of, crops, recipe, start, x2i
from x2i import corpus
from x2i.base.files import exclusive

IMAGES = 40


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    root = tmp_path_factory.mktemp("built")
    crops(root / "photos", IMAGES)
    return root, build(recipe(root), "--workers", "2")


def fresh(built: tuple[Path, dict[str, object]], root: Path, **changes: object) -> Path:
    """A recipe in another folder, over a copy of the same photographs."""
    shutil.copytree(built[0] / "photos", root / "photos")
    return recipe(root, **changes)


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
    ours, theirs = bytes_of(tmp_path / "corpus"), bytes_of(built[0] / "corpus")
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name not in ("corpus.json", "recipe.yaml", "selection.parquet"):  # these name the folders
            assert ours[name] == theirs[name], name


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
    shutil.copytree(built[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "photos")  # what is only selected need not be read; what is assembled must
    (tmp_path / "photos").symlink_to(built[0] / "photos")
    path = recipe(tmp_path, select={"where": {"colourful": "quality.colourfulness > 20"}})
    changed = yaml.safe_load(path.read_text())
    changed["sources"][0]["path"] = str(built[0] / "photos")
    path.write_text(yaml.safe_dump(changed))
    result = build(path)
    assert result["computed"] == {}
    assert result["decoded"] == 0
    assert 0 < int(result["rows_out"]) < int(built[1]["rows_out"])  # type: ignore[call-overload]


def test_a_changed_parameter_runs_that_annotator_only(built: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    path = recipe(
        tmp_path,
        lake=str(tmp_path / "lake"),
        sources=[{"kind": "folder", "name": "photos", "path": str(built[0] / "photos"), "unit_files": 6}],
        annotators={"phash": {}, "quality": {"shorter_side": 64}},
    )
    shutil.copytree(built[0] / "lake", tmp_path / "lake")
    assert build(path)["computed"] == {"quality": IMAGES}


def test_a_new_file_costs_its_unit_only(built: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    path = fresh(built, tmp_path)
    for file in (tmp_path / "photos").iterdir():  # a copy with its times is the same input
        stat = (built[0] / "photos" / file.name).stat()
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    first = build(path)
    crops(tmp_path / "more", IMAGES + 1)
    shutil.copy(tmp_path / "more" / f"{IMAGES:04d}.jpg", tmp_path / "photos" / "0007b.jpg")
    second = build(path)
    assert second["rows_in"] == int(first["rows_in"]) + 1
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
    path = fresh(built, tmp_path)
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


def test_ctrl_c_keeps_what_is_done_and_leaves_nothing_half_made(
    built: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    path = fresh(built, tmp_path)
    process = start("build", path, "--workers", "1")
    wait_for(lambda: bool(list((tmp_path / "lake" / "rows").glob("*/*.parquet"))))
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "goes on from here" in err
    assert "Traceback" not in err
    assert build(path)["digest"] == built[1]["digest"]


def test_two_builds_into_one_folder_do_not_mix(built: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    path = fresh(built, tmp_path)
    with exclusive(tmp_path / "corpus", "building a corpus"):
        second = x2i("build", path)
    assert second.returncode == 1
    assert "another process is building a corpus" in second.stderr
    assert not (tmp_path / "corpus").exists()
    assert build(path)["digest"] == built[1]["digest"]


def test_a_file_that_changed_after_annotation_is_noticed(built: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    """Same size, same time, other bytes: the hash tells, the row falls, its neighbours stay."""
    path = fresh(built, tmp_path)
    build(path)
    victim = tmp_path / "photos" / "0003.jpg"
    stat, data = victim.stat(), bytearray(victim.read_bytes())
    data[-3] ^= 1
    victim.write_bytes(bytes(data))
    os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    content = yaml.safe_load(path.read_text())
    content["seed"] = 1  # the samples must be built anew
    path.write_text(yaml.safe_dump(content))
    result = build(path)
    assert result["computed"] == {}
    funnel = {f["reason"]: f["rows"] for f in corpus.open(tmp_path / "corpus").info["funnel"]}
    assert funnel["source_changed"] == 1
    assert result["rows_out"] == int(built[1]["rows_out"]) - 1  # type: ignore[call-overload]


def test_an_output_folder_that_is_no_corpus_is_left_alone(
    built: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "thesis.txt").write_text("years of work")
    done = x2i("build", fresh(built, tmp_path))
    assert done.returncode == 2
    assert "not a corpus" in done.stderr
    assert (tmp_path / "corpus" / "thesis.txt").exists()


def test_dry_run_says_what_would_run_and_runs_nothing(built: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    path = fresh(built, tmp_path)
    done = x2i("build", path, "--dry-run", "--json")
    assert done.returncode == 0
    assert '"cached": 0' in done.stdout
    assert not (tmp_path / "corpus").exists()
    assert not list((tmp_path / "lake").glob("phash/*/*.parquet"))


def test_a_killed_worker_costs_a_repeat_and_nothing_else(built: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    import psutil

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


def test_a_missing_shard_is_built_again(built: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    path = fresh(built, tmp_path)
    build(path)
    (tmp_path / "corpus" / "shards" / "00001.tar").unlink()
    result = build(path)
    assert result["computed"] == {}
    assert result["groups_built"] > 0
    assert result["digest"] == built[1]["digest"]
    assert x2i("verify", tmp_path / "corpus").returncode == 0
