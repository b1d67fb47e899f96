"""The published stages as files in configs/train: each runs from its first stage to its last, at tiny scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.trainer import corpora
from x2i.base.config import parse_config
from x2i.model import registry
from x2i.trainer import checkpoint
from x2i.trainer.config import RunConfig
from x2i.trainer.run import train

CONFIGS = Path(__file__).parents[2] / "configs/train"
PUBLISHED = {"omnigen": 5, "ovis_u1": 6, "ovis2": 5, "mini_gemini": 2}
TINY = {
    "omnigen": {"preset": "omnigen-tiny", "hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 2, "text_head": True},
    "ovis_u1": {"preset": "ovis-u1-tiny"},
    "ovis2": {"preset": "ovis2-tiny"},
    "mini_gemini": {"preset": "mini-gemini-tiny"},
}
#: What the test's corpus has, for each task that the files name.
DRAWN, ANSWERED = "deblur", "describe"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = [*corpora.samples(12), *corpora.chats(12)]
    return corpora.write(tmp_path_factory.mktemp("stages") / "corpus", made)


def tiny(name: str, corpus: Path, output: Path) -> RunConfig:
    """The file, with a tiny model, few steps, small pictures, and the tasks that the corpus has."""
    content: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    understanding = {"describe", "locate", "count", "read", "classify", "diagnose"}
    for stage in content["stages"]:
        tasks = set(stage["mixture"])
        named = {ANSWERED: 1.0} if tasks & understanding else {}
        stage["mixture"] = named | ({DRAWN: 1.0} if tasks - understanding else {})
        stage |= {"steps": 2, "batch": 4, "resolution": 32, "warmup": 0, "lr": 1e-3}
        if "buckets" in stage:
            stage["buckets"] = [[32, 32], [48, 32]]
        if "tiles" in stage.get("inputs", {}):
            stage["inputs"] = {"tiles": {"single": 1}}
    content |= {"corpora": [str(corpus)], "output": str(output), "model": TINY[name], "precision": "float32"}
    content |= {"tokenizer": {"train": {"vocab_size": 320}}, "vae": {"kind": "pixels", "factor": 4}, "cpu_threads": 1}
    content |= {"preview": {"per_task": 1, "steps": 1, "answer_tokens": 2}, "held_out_samples": 1, "device": "cpu"}
    return parse_config(RunConfig, content, name)


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
def test_the_files_name_published_models(name: str) -> None:
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    run = parse_config(RunConfig, content, name)
    config = run.model.config(None)
    assert config is not None and config.architecture == name
    with torch.device("meta"):
        model = registry.build(config)
    assert set(run.model.pretrained) <= set(model.pretrained)
    for stage in run.stages:
        assert set(stage.train or ()) <= set(model.parts), stage.name
