"""`diff` says what came, went and changed between two corpora, and the rule or the change that did it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.corpus.forgetting import build, make
from x2i import corpus
from x2i.base.errors import X2IError
from x2i.cli.main import app
from x2i.corpus import forget
from x2i.corpus.diff import _leaves, diff


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three corpora of the same photographs: as they are, with other rules, with other sources and tasks."""
    root = make(tmp_path_factory.mktemp("diff"))
    build(root, ("sharpness > 30", "sharpness > 600"), out="sharp")
    shutil.copytree(root / "corpus", root / "less")
    with contextlib.chdir(root):
        forget.forget("less", [hashlib.sha256(Path("photos/coffee.png").read_bytes()).hexdigest()])
        Path("lake/forgotten.jsonl").unlink()
    return root


@pytest.fixture
def here(root: Path) -> Iterator[Path]:
    with contextlib.chdir(root):
        yield root


def kept(folder: str) -> dict[str, str]:
    return {r["location"]: r["row_id"] for r in corpus.open(folder).selection.to_pylist() if r["kept"]}


def keys(folder: str) -> set[str]:
    return set(corpus.open(folder).manifest["key"].to_pylist())


def test_equal_corpora_have_no_difference(here: Path) -> None:
    told = diff("corpus", "corpus")
    assert told["same"]
    assert (told["recipe"], told["annotators"], told["sources"], told["software"]) == ([], [], [], [])
    rows, samples = told["rows"], told["samples"]
    assert rows["kept_in_both"] == len(kept("corpus"))
    assert (rows["went"], rows["came"], rows["changed"], rows["fell_otherwise"]) == (0, 0, 0, [])
    assert (samples["unchanged"], samples["went"], samples["came"]) == (len(keys("corpus")), 0, 0)


def test_a_changed_threshold_names_the_rule_and_the_values_that_decided(here: Path) -> None:
    told = diff("corpus", "sharp", limit=100)
    before, after = kept("corpus"), kept("sharp")
    gone = before.keys() - after.keys()
    assert gone and told["rows"]["went"] == len(gone)
    assert {"key": "select.where.sharp_enough", "a": "quality.sharpness > 30", "b": "quality.sharpness > 600"} in told[
        "recipe"
    ]
    by_rule = {(r["stage"], r["reason"]): r["rows"] for r in told["rows"]["went_by"]}
    assert by_rule[("where", "sharp_enough")] > 0 and sum(by_rule.values()) == len(gone)
    examples = [e for e in told["rows"]["went_examples"] if e["reason"] == "sharp_enough"]
    assert {e["location"] for e in examples} <= gone
    for example in examples:
        values = example["values"]["quality.sharpness"]
        assert example["condition"] == "quality.sharpness > 600"
        assert 30 < values["a"] == values["b"] <= 600
    samples = told["samples"]
    assert samples["went"] == len(keys("corpus") - keys("sharp"))
    assert samples["came"] == len(keys("sharp") - keys("corpus"))
    # pairs that lost their partner to the rule have another one now
    assert {r["reason"] for r in samples["went_by"]} == {r["reason"] for r in told["rows"]["went_by"]}
    assert [r["reason"] for r in samples["changed_by"]] == ["other images are in it"]
    back = diff("sharp", "corpus", limit=0)
    assert back["rows"]["came_by"] == told["rows"]["went_by"] and back["rows"]["came_examples"] == []


def test_what_was_forgotten_is_the_reason(here: Path) -> None:
    told = diff("corpus", "less")
    assert told["recipe"] == []
    assert {(r["stage"], r["reason"]) for r in told["rows"]["went_by"]} == {("forgotten", "forgotten")}
    assert told["rows"]["went"] == 2  # the picture, and the ready sample that shows it
    assert told["samples"]["changed"] == told["samples"]["came"] == 0
    # pairs whose partner it was say so, though their own row stays
    assert {r["reason"] for r in told["samples"]["went_by"]} == {"forgotten", "another image in it is not kept"}


def test_new_tasks_new_pictures_and_renamed_sources(here: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(here, tmp_path / "x")
    picture = Image.open(tree / "photos/chelsea.png").convert("RGB")
    picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tree / "photos/mirrored.png")
    (tree / "photos/mirrored.txt").write_text("A cat, mirrored.")
    (tree / "photos/astronaut.txt").write_text("Another text.")
    text = (tree / "recipe.yaml").read_text()
    text = text.replace("tasks: [deblur, inpaint]}\n  published", "tasks: [deblur, denoise]}\n  published")
    (tree / "recipe.yaml").write_text(text)
    build(tree, out="more")
    build(tree, ("name: ready", "name: prepared"), out="renamed")
    with contextlib.chdir(tree):
        told = diff("corpus", "more")
        assert [(r["reason"], r["rows"]) for r in told["rows"]["came_by"]] == [("not in its sources", 1)]
        assert [e["location"] for e in told["rows"]["came_examples"]] == ["mirrored.png"]
        (changed,) = told["rows"]["changed_examples"]
        assert (changed["location"], changed["other_text"], changed["other_image"]) == ("astronaut.png", True, False)
        tasks = {t["task"]: t for t in told["samples"]["tasks"]}
        assert (tasks["inpaint"]["b"], tasks["denoise"]["a"]) == (0, 0)
        assert tasks["inpaint"]["went"] == tasks["inpaint"]["a"]
        assert "it does not make inpaint" in {r["reason"] for r in told["samples"]["went_by"]}
        assert tasks["text_to_image"]["changed"] == 1
        renamed = diff("more", "renamed")
        moved = renamed["rows"]
        assert {(s["name"], s["what"]) for s in renamed["sources"]} == {("ready", "went"), ("prepared", "came")}
        assert (moved["moved"], moved["went"], moved["came"]) == (2, 0, 0)


def test_leaves_are_told_with_their_keys() -> None:
    a = {"where": {"safe": "x < 1"}, "tasks": {"t": {"of": [1, 2]}}, "gone": None, "same": 3}
    b = {"where": {"safe": "x < 2", "new": "y"}, "tasks": {"t": {"of": [1]}}, "same": 3}
    assert list(_leaves(a, b)) == [
        {"key": "where.safe", "a": "x < 1", "b": "x < 2"},
        {"key": "where.new", "a": None, "b": "y"},
        {"key": "tasks.t.of.1", "a": 2, "b": None},
    ]


def test_changed_annotators_and_damage_are_told(here: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree("corpus", tmp_path / "other"))
    info = json.loads((other / "corpus.json").read_text())
    quality = next(a for a in info["annotators"] if a["name"] == "quality")
    quality |= {"fingerprint": "f" * 64, "version": quality["version"] + 1}
    (other / "corpus.json").write_text(json.dumps(info))
    (one,) = diff("corpus", other)["annotators"]
    assert (one["name"], one["what"], {c["key"] for c in one["changes"]}) == (
        "quality",
        "changed",
        {"version", "fingerprint"},
    )
    (other / "manifest.parquet").write_bytes(b"no Parquet")
    with pytest.raises(X2IError, match="x2i verify"):
        diff("corpus", other)
    with pytest.raises(X2IError, match="not a corpus"):
        diff("corpus", tmp_path / "nowhere")


def test_the_command_prints_it(here: Path) -> None:
    done = CliRunner().invoke(app, ["diff", "corpus", "sharp"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    for part in ("select.where.sharp_enough", "quality.sharpness > 600", "where: sharp_enough", "few_shot_inpaint"):
        assert part in done.output
    told = json.loads(CliRunner().invoke(app, ["diff", "corpus", "sharp", "--json", "--limit", "1"]).stdout)
    assert len(told["rows"]["went_examples"]) == 1 < told["rows"]["went"]
