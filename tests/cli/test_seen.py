"""Which checkpoints saw an image: those after the steps at which the run's reader took a sample with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.corpus.forgetting import make
from tests.trainer.corpora import run_content
from x2i import corpus
from x2i.base.config import parse_config
from x2i.cli.main import app
from x2i.cli.seen import runs_below, seen
from x2i.corpus import forget
from x2i.trainer.config import RunConfig
from x2i.trainer.data import SampleReader
from x2i.trainer.plan import Draw, StagePlan
from x2i.trainer.run import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str]]]:
    """A folder with a corpus and a run of two stages, and what was read: (step from 1, the sample's key)."""
    root = make(tmp_path_factory.mktemp("seen"))
    read: list[tuple[int, str]] = []
    planned = SampleReader.planned

    def noted(self: SampleReader, plan: StagePlan, draw: Draw, *rest: Any) -> Any:
        example = planned(self, plan, draw, *rest)
        read.append((draw.index // plan.batch + 1 + (5 if plan.key[1] == "high" else 0), example.key))
        return example

    stage = {"batch": 2, "lr": 0.001, "resolution": 16}
    stages = [
        {**stage, "name": "low", "steps": 5, "mixture": {"text_to_image": 1}},
        {**stage, "name": "high", "steps": 4, "mixture": {"few_shot_deblur": 2, "canny_to_image": 1}},
    ]
    content = run_content(root / "corpus", root / "runs/one", stages=stages, keep=9, held_out=0.1)
    content |= {"preview": {"per_task": 0, "steps": 1}, "held_out_samples": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SampleReader, "planned", noted)
        train(parse_config(RunConfig, content, "test"))
    return root, read


def test_checkpoints_are_named_with_the_steps_that_really_read_a_sample(
    trained: tuple[Path, list[tuple[int, str]]],
) -> None:
    root, read = trained
    manifest = {r["key"]: r["images"] for r in corpus.open(root / "corpus").manifest.to_pylist()}
    checked = 0
    for image in {i for images in manifest.values() for i in images}:
        steps = sorted(step for step, key in read if image in manifest[key])
        found = {s.step: (s.first, s.last, s.draws) for s in seen([root / "runs"], root / "corpus", [image])}
        wanted = {}
        for checkpoint in (3, 5, 6, 9):
            until = [s for s in steps if s <= checkpoint]
            if until:
                wanted[checkpoint] = (until[0], until[-1], len(until))
        assert found == wanted
        checked += len(wanted)
    assert checked > 8


def test_a_run_whose_ledger_has_gaps_is_not_said_to_be_clean(
    trained: tuple[Path, list[tuple[int, str]]], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(trained[0], tmp_path / "x"))
    record = json.loads((root / "runs/one/run.json").read_text())
    record["corpora"][0]["path"] = str(root / "corpus")
    (root / "runs/one/run.json").write_text(json.dumps(record))
    image = corpus.open(root / "corpus").manifest["image_id"][0].as_py()
    file = sorted((root / "runs/one/ledger").iterdir())[1]
    for spoil in (lambda: file.write_bytes(b"PAR1"), file.unlink):
        spoil()
        told = seen([root / "runs"], root / "corpus", [image])
        assert len(told) == 4 and all("its ledger" in str(s.unknown) for s in told)


def test_after_a_forget_it_can_still_be_told(
    trained: tuple[Path, list[tuple[int, str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(trained[0], tmp_path / "x"))
    monkeypatch.chdir(root)  # the folder `runs` is looked at without being named
    first, *others = sorted(set(corpus.open("corpus").manifest["image_id"].to_pylist()))
    record = json.loads(Path("runs/one/run.json").read_text())
    record["corpora"][0]["path"] = "corpus"
    Path("runs/one/run.json").write_text(json.dumps(record))
    wanted = {image: seen([Path("runs")], Path("corpus"), [image]) for image in others}
    done = CliRunner().invoke(app, ["forget", "corpus", "--sha256", first, "--json", "--yes"])
    assert done.exit_code == 0, done.output
    assert any(json.loads(done.stdout)["seen"])
    assert any(wanted.values())
    for image, before in wanted.items():
        assert seen([Path("runs")], Path("corpus"), [image]) == before
    record["corpora"][0]["digest"] = "0" * 64  # another run in the same folder
    Path("runs/one/run.json").write_text(json.dumps(record))
    assert all(s.unknown for s in seen([Path("runs")], Path("corpus"), [first]))


def test_where_the_corpus_has_changed_it_says_so_and_runs_that_began_with_such_a_checkpoint_are_named(
    trained: tuple[Path, list[tuple[int, str]]], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(trained[0], tmp_path / "x"))
    record = json.loads((root / "runs/one/run.json").read_text())
    record["corpora"][0]["path"] = str(root / "corpus")
    (root / "runs/one/run.json").write_text(json.dumps(record))
    image = corpus.open(root / "corpus").manifest["image_id"][0].as_py()
    last = root / "runs/one/step-000009"
    shutil.copytree(root / "runs/one", root / "runs/tuned")
    record["config"]["model"]["weights"] = str(last)
    record["corpora"] = [{"path": str(tmp_path / "another"), "digest": "0" * 64}]
    (root / "runs/tuned/run.json").write_text(json.dumps(record))
    through = [s for s in seen([root / "runs"], root / "corpus", [image]) if s.through]
    assert {s.run for s in through} == {str(root / "runs/tuned")} and len(through) == 4
    forget.forget(root / "corpus", [image], lake=root / "lake")
    told = [s for s in seen([root / "runs"], root / "corpus", [image]) if s.run.endswith("one")]
    assert len(told) == 4 and all("has changed since" in str(s.unknown) for s in told)
    shutil.rmtree(root / "runs/one/ledger")
    assert all(s.unknown for s in seen([root / "runs/one"], root / "corpus", [image]))
    (root / "runs/one/run.json").write_text("{")
    assert all("cannot be read" in str(s.unknown) for s in seen([root / "runs/one"], root / "corpus", [image]))


def test_runs_are_looked_for_outside_of_corpora_and_lakes(tmp_path: Path) -> None:
    for name in ("a/run.json", "b/deep/run.json", "c/corpus.json", "c/shards/run.json", ".hidden/run.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("lake/rows/1", "lake/recipes", "lake/phash"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "lake/phash/run.json").touch()
    assert list(runs_below(tmp_path)) == [tmp_path / "a", tmp_path / "b/deep"]
