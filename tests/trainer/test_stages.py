"""The published stages as files in configs/train: each runs from its first stage to its last with `scale: tiny`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer import corpora
from x2i.base.errors import RecipeError
from x2i.model import registry
from x2i.trainer import checkpoint
from x2i.trainer.config import RunConfig, load_run
from x2i.trainer.run import train
from x2i.trainer.scale import BATCH, SIDE, STEPS, TOKEN

CONFIGS = Path(__file__).parents[2] / "configs/train"
PUBLISHED = {"omnigen": 5, "ovis_u1": 6, "ovis2": 5, "mini_gemini": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures to draw, conversations, and (for the preferences of Ovis2's last stage) diagnoses."""
    chats = list(corpora.chats(12))
    told = [replace(c, sample=replace(c.sample, key=f"{c.sample.key}-d", task_type="diagnose")) for c in chats]
    made = [*corpora.samples(12), *chats, *told]
    return corpora.write(tmp_path_factory.mktemp("stages") / "corpus", made)


def tiny(name: str, corpus: Path, output: Path, *changes: str) -> RunConfig:
    """The file as `x2i train` reads it."""
    given = ["scale=tiny", f"corpora=[{corpus}]", f"output={output}", *changes]
    return load_run(CONFIGS / f"{name}.yaml", given)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_stage_trains_its_parts_and_no_other(name: str, corpus: Path, tmp_path: Path) -> None:
    run = tiny(name, corpus, tmp_path / name)
    assert len(run.stages) == PUBLISHED[name]
    result = train(run)
    assert result.finished
    ends = checkpoint.all_of(run.output)
    assert [c.info["stage"] for c in ends] == [s.name for s in run.stages]
    parts = checkpoint.load_model(ends[0].path).model.parts
    for stage, before, after in zip(run.stages[1:], ends, ends[1:], strict=False):
        old, new = (load_file(c.path / "model.safetensors") for c in (before, after))
        moved = {n for n in old if not torch.equal(old[n], new[n])}
        prefixes = ("",) if stage.train is None else tuple(p for part in stage.train for p in parts[part])
        assert moved and all(n.startswith(prefixes) for n in moved), stage.name


@pytest.mark.parametrize("name", PUBLISHED)
def test_tiny_keeps_what_is_learned_and_how(name: str, corpus: Path, tmp_path: Path) -> None:
    whole, small = load_run(CONFIGS / f"{name}.yaml"), tiny(name, corpus, tmp_path)
    for stage, shrunk in zip(whole.stages, small.stages, strict=True):
        for kept in (
            "name",
            "train",
            "lr",
            "schedule",
            "edit_loss",
            "preference",
            "plain_captions",
            "condition_dropout",
        ):
            assert getattr(shrunk, kept) == getattr(stage, kept)
        assert shrunk.mixture.items() <= stage.mixture.items()
        assert shrunk.steps == STEPS and shrunk.batch == BATCH
        assert shrunk.resolution <= SIDE * TOKEN and shrunk.resolution % TOKEN == 0
    assert (
        max(max(s.resolution, *sum(s.buckets, ())) if s.buckets else s.resolution for s in small.stages) == SIDE * TOKEN
    )
    assert small.device == "cpu" and small.model.weights is None and not small.model.pretrained


def test_tiny_stages_begin_with_each_other_and_not_with_weights(corpus: Path, tmp_path: Path) -> None:
    given = ["stages.1024.start=256", "stages.2240.start=org/weights", "wandb={project: trials}"]
    run = tiny("omnigen", corpus, tmp_path, *(g.replace("=256", "='256'") for g in given))
    assert [stage.start for stage in run.stages] == [None, None, "256", None, None]
    assert run.wandb is None


def test_sizes_shrink_in_proportion(corpus: Path, tmp_path: Path) -> None:
    run = tiny("omnigen", corpus, tmp_path)
    assert [stage.resolution // TOKEN for stage in run.stages] == [2, 2, 4, 8, 4]
    assert (32, 32) in run.stages[-1].buckets and (40, 16) in run.stages[-1].buckets


def test_a_stage_of_which_the_corpora_have_nothing_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"stage 1a draws locate, and the corpora have none.*describe"):
        tiny("ovis2", corpus, tmp_path, "stages.1a.mixture={locate: 1}")


def test_keys_are_set_by_the_names_of_stages(corpus: Path, tmp_path: Path) -> None:
    given = ["stages.512.steps=7", "stages.0.lr=0.5", "model.hidden_size=64", "output=elsewhere"]
    run = load_run(CONFIGS / "omnigen.yaml", given)
    assert [s.steps for s in run.stages[:2]] == [500_000, 7]
    assert run.stages[0].lr == 0.5 and run.stages[1].lr == 1e-4
    assert run.model.preset == "omnigen-3.8b" and run.model.changes == {"hidden_size": 64}
    assert run.output == Path("elsewhere")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("stages.512.stepz=7", "unknown key; did you mean 'steps'"),
        ("stage.512.steps=7", "unknown key; did you mean 'stages'"),
        ("stages.mixd.steps=7", "has no entry 'mixd'; did you mean 'mixed'"),
        ("model.hidden=7", "hidden: unknown key; did you mean 'hidden_size'"),
        ("seed", "expected KEY=VALUE"),
        ("scale=small", "Input should be 'full' or 'tiny'"),
    ],
)
def test_a_wrong_key_is_refused_with_the_right_one(given: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load_run(CONFIGS / "omnigen.yaml", [given])


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_files_name_published_models(name: str) -> None:
    run = load_run(CONFIGS / f"{name}.yaml")
    config = run.model.config(None)
    assert config is not None and config.architecture == name
    with torch.device("meta"):
        model = registry.build(config)
    assert set(run.model.pretrained) <= set(model.pretrained)
    for stage in run.stages:
        assert set(stage.train or ()) <= set(model.parts), stage.name
