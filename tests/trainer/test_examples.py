"""The example runs: every file in configs/train is one, names what there is, and learns what a corpus's recipe makes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from x2i.base.config import load_config
from x2i.model import lora, registry
from x2i.model.base import Model
from x2i.pipelines import recipe
from x2i.pipelines.recipe import Recipe
from x2i.trainer.config import RunConfig, load_run
from x2i.trainer.parts import learning

ROOT = Path(__file__).parents[2]
RUNS = sorted((ROOT / "configs/train").glob("*.yaml"))
RECIPES = sorted((ROOT / "configs/corpora").glob("*.yaml"))


def base_of(run: RunConfig) -> RunConfig:
    """The example whose output a run starts from, or the run itself."""
    if run.model.weights is None:
        return run
    outputs = {str(r.output): r for r in map(load_run, RUNS)}
    assert run.model.weights in outputs, f"no example makes {run.model.weights}"
    return base_of(outputs[run.model.weights])


@functools.cache
def model_of(path: Path) -> Model[Any]:
    """The network of a run, without values."""
    run = load_run(path)
    config = base_of(run).model.config(None)
    assert config is not None
    with torch.device("meta"):
        return registry.build(config)


@functools.cache
def made_by(corpus: str) -> frozenset[str]:
    """The task types that the corpus's recipe makes."""
    outs = {r.out: r for r in (load_config(Recipe, p) for p in RECIPES)}
    assert corpus in outs, f"no recipe in configs/corpora makes {corpus}; they make {', '.join(outs)}"
    return frozenset(t for task in recipe.make(outs[corpus]).tasks for t in task.task_types())


def demos() -> list[Path]:
    """The runs on corpora that can be made anywhere; others also learn published samples, whose tasks no recipe names."""
    here = {
        load_config(Recipe, ROOT / f"configs/corpora/{name}.yaml").out for name in ("quickstart", "subject", "x2i_full")
    }
    return [p for p in RUNS if here & set(load_run(p).corpora)]


def test_there_are_examples() -> None:
    assert {"quickstart.yaml", "unified_omnigen.yaml", "lora.yaml"} <= {p.name for p in RUNS}
    outputs = [load_run(p).output for p in RUNS]
    assert len(set(outputs)) == len(outputs), "two examples write into one folder"


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_every_stage_trains_parts_that_the_model_has(path: Path) -> None:
    run, model = load_run(path), model_of(path)
    for place, stage in enumerate(run.stages):
        assert learning(model, stage.train, f"stages.{place}"), f"{stage.name} trains nothing"
    assert set(run.model.pretrained) <= set(model.pretrained)


@pytest.mark.parametrize("path", demos(), ids=lambda p: p.stem)
def test_every_stage_learns_tasks_that_a_recipe_makes(path: Path) -> None:
    run = load_run(path)
    made = frozenset[str]().union(*map(made_by, run.corpora))
    for stage in run.stages:
        assert set(stage.mixture) <= made, f"{stage.name}: nobody makes {', '.join(set(stage.mixture) - made)}"
        if stage.edit_loss is not None and stage.edit_loss.tasks is not None:
            assert set(stage.edit_loss.tasks) <= set(stage.mixture)


def test_the_adapters_of_the_example_find_their_layers() -> None:
    path = ROOT / "configs/train/lora.yaml"
    run = load_run(path)
    assert run.model.lora is not None
    config = base_of(run).model.config(None)
    assert config is not None
    with torch.device("meta"):
        model = registry.build(config)
    names = lora.attach(model, run.model.lora)
    assert all(any(n.endswith(t) for n in names) for t in run.model.lora.targets)
    assert all("lora" in n for n, p in model.named_parameters() if p.requires_grad)
