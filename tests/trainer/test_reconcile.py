"""A run whose corpora have changed: it says what, goes on if it is asked to, and stays truthful about its steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tests.corpus.forgetting import make
from tests.trainer import corpora
from tests.trainer.test_stage_options import CutAfter
from x2i import corpus
from x2i.base.config import parse_config
from x2i.base.errors import RecipeError, X2IError
from x2i.cli.main import app
from x2i.cli.seen import keep, seen
from x2i.corpus import forget
from x2i.trainer import ledger, replay
from x2i.trainer.config import RunConfig
from x2i.trainer.index import HELD_OUT
from x2i.trainer.mixture import table_of
from x2i.trainer.run import train


def config(where: Path, output: Path, *more: Path, **changes: Any) -> RunConfig:
    """Two stages of five and six steps; a checkpoint after every third."""
    content = corpora.run_content(where, output, preview={"per_task": 0}, held_out_samples=1, **changes)
    return parse_config(RunConfig, content | {"corpora": [str(where), *map(str, more)]}, "test")


def cut(run: RunConfig, step: int = 7) -> None:
    with pytest.raises(MemoryError):
        train(run, progress=CutAfter(step))


def keys(output: Path) -> dict[int, list[str]]:
    """What the ledger tells of each step."""
    told: dict[int, list[str]] = {}
    for file, _, _ in ledger.files_of(output):
        for row in pq.read_table(file).to_pylist():
            told.setdefault(row["step"], []).append(row["key"])
    return told


def held(where: Path, run: RunConfig) -> set[str]:
    table = table_of([corpus.open(where)], run.stages, run.held_out)
    return {table[n].image_id for samples in table.samples(HELD_OUT).values() for n in samples}


@pytest.fixture
def where(tmp_path: Path) -> Path:
    return corpora.write(tmp_path / "corpus", list(corpora.samples(24)))


def grow(where: Path) -> None:
    shutil.rmtree(where)
    corpora.write(where, [*corpora.samples(30)])


def test_the_refusal_says_what_has_changed(where: Path, tmp_path: Path) -> None:
    run = config(where, tmp_path / "run")
    cut(run)
    grow(where)
    with pytest.raises(RecipeError) as refused:
        train(run)
    told = str(refused.value)
    assert "samples: 72 before, 90 now: colorize of photographs +6, deblur of photographs +6" in told
    assert "shards: 1 changed (shards/00003.tar), 1 new (shards/00004.tar), 3 as before" in told
    assert "--reconcile" in told and "--fresh" in told
    (tmp_path / "run/corpora.json").unlink()  # as of a run that an earlier x2i began
    with pytest.raises(RecipeError, match="cannot be told: the run's folder has no record"):
        train(run)
    changed = run.model_copy(update={"seed": 5})
    with pytest.raises(RecipeError, match="seed: was 0, is 5") as refused:
        train(changed, reconcile=True)  # for corpora alone
    assert "--reconcile" not in str(refused.value)


def test_a_changed_recipe_is_told_by_its_keys(where: Path, tmp_path: Path) -> None:
    info = json.loads((where / "corpus.json").read_text())
    (where / "corpus.json").write_text(json.dumps(info | {"recipe": {"select": {"min": 0.5}}}))
    run = config(where, tmp_path / "run")
    cut(run)
    other = {"recipe": {"select": {"min": 0.6}}, "digest": "f" * 64, "forgotten": [{"image": "x"}]}
    (where / "corpus.json").write_text(json.dumps(info | other))
    with pytest.raises(RecipeError) as refused:
        train(run)
    told = str(refused.value)
    assert "recipe: select.min: was 0.5, is 0.6" in told and "forgotten images: 0 before, 1 now" in told
    assert "as many of each task and source" in told and "shards: 4 as before" in told


def test_a_grown_corpus_is_gone_on_with(where: Path, tmp_path: Path) -> None:
    run = config(where, tmp_path / "run")
    cut(run)  # the checkpoint of step 6 is the newest
    before, old = keys(run.output), held(where, run)
    kept = shutil.copytree(where, tmp_path / "kept")
    grow(where)
    made = train(run, reconcile=True)
    assert made.finished and made.steps_now == 5
    assert old and old <= held(where, run)
    # the steps before are told as they were, those after are those of a run on the new corpus
    straight = train(config(where, tmp_path / "straight"))
    after, anew = keys(run.output), keys(straight.output)
    assert all(after[step] == before[step] for step in range(1, 7))
    assert all(after[step] == anew[step] for step in range(7, 12)) and before[6] != anew[6]
    # a replay is right, or refused
    assert [r.key for r in replay.replay(replay.open_run(run.output), 8)[1]] == after[8]
    with pytest.raises(X2IError, match=r"step 6: it was trained on the corpora as they were before they changed"):
        replay.replay(replay.open_run(run.output), 6)
    with pytest.raises(
        X2IError, match=r"has changed since, and the run went on with others \(--reconcile\) after step 6"
    ):
        replay.open_run(run.output, 6)
    shutil.rmtree(where)
    kept.rename(where)
    assert [r.key for r in replay.replay(replay.open_run(run.output, 4), 4)[1]] == after[4]
    with pytest.raises(RecipeError, match=r"corpora\.0"):
        train(run)  # put back: changed once more


def test_a_change_is_noted_once_and_by_the_command(where: Path, tmp_path: Path) -> None:
    import yaml

    run = config(where, tmp_path / "run")
    cut(run)
    first = corpus.open(where).digest
    grow(where)
    content = run.model_dump(mode="json") | {"corpora": [str(where)], "output": str(run.output)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    done = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml"), "--reconcile", "--json"])
    assert done.exit_code == 0, done.output
    record = json.loads((run.output / "run.json").read_text())
    assert record["changes"] == [{"step": 6, "corpora": [{"path": str(where), "digest": first}]}]
    assert record["corpora"][0]["digest"] == corpus.open(where).digest
    assert train(run, reconcile=True).steps_now == 0
    assert json.loads((run.output / "run.json").read_text()) == record


def test_corpora_may_be_added_but_not_left_out(where: Path, tmp_path: Path) -> None:
    second = corpora.write(tmp_path / "second", [*corpora.samples(30)][72:])
    run = config(where, tmp_path / "run", second)
    cut(run)
    with pytest.raises(RecipeError, match=r"the run has read 2 corpora, and the run file names 1"):
        train(config(where, run.output), reconcile=True)
    third = corpora.write(tmp_path / "third", [*corpora.samples(36)][90:])
    more = config(where, run.output, second, third)
    with pytest.raises(RecipeError, match=r"corpora\.2: .*third is new: colorize of photographs 6, deblur"):
        train(more)
    assert train(more, reconcile=True).finished


def test_after_forgetting_the_run_goes_on_and_still_says_who_saw_the_image(tmp_path: Path) -> None:
    root = make(tmp_path)
    stage = {"batch": 2, "lr": 0.001, "resolution": 16, "mixture": {"text_to_image": 1, "deblur": 1}}
    changes = {"stages": [{**stage, "name": "low", "steps": 8}], "keep": 9}
    run = config(root / "corpus", root / "runs/one", **changes)
    cut(run, 5)  # the checkpoint of step 3 is the newest
    row = pq.read_table(ledger.files_of(run.output)[0][0]).to_pylist()[0]
    image = row["image_id"]
    keep([root / "runs"], root / "corpus")
    forget.forget(root / "corpus", [image])
    with pytest.raises(RecipeError, match=r"forgotten images: 0 before, 1 now") as refused:
        train(run)
    assert "deblur of " in str(refused.value) and " -" in str(refused.value)
    assert train(run, reconcile=True).finished
    gone = {r["key"] for r in corpus.open(root / "corpus").manifest.to_pylist()}
    assert all(key in gone for step, each in keys(run.output).items() if step > 3 for key in each)
    found = {s.step: s for s in seen([root / "runs"], root / "corpus", [image])}
    assert sorted(found) == [3, 6, 8] and all(s.last is not None and s.last <= 3 for s in found.values())
    (run.output / "samples-until-000003.parquet").unlink()
    assert all("--reconcile" in str(s.unknown) for s in seen([root / "runs"], root / "corpus", [image]))
