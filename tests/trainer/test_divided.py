"""No rank has more of a model than its part: built, written to one file, and read from it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp

from tests.trainer import corpora
from tests.trainer.test_published import write
from x2i import corpus
from x2i.base.config import parse_config
from x2i.base.errors import X2IError
from x2i.model import deferred, registry
from x2i.trainer import checkpoint
from x2i.trainer.config import RunConfig
from x2i.trainer.onefile import OneFile, entries, runs
from x2i.trainer.setup import Setup


@pytest.mark.parametrize("preset", [name for name in registry.presets() if name.endswith("-tiny")])
def test_a_rank_builds_its_rows_of_the_numbers_that_one_rank_builds(preset: str) -> None:
    config = registry.presets()[preset]
    torch.manual_seed(5)
    whole = registry.build(config)
    state, buffers, after = dict(whole.named_parameters()), dict(whole.named_buffers()), torch.rand(1)
    for place in (0, 2):
        torch.manual_seed(5)
        model, parts = deferred.build(lambda: registry.build(config), place, 3)
        assert torch.equal(torch.rand(1), after)
        assert parts.keys() == state.keys()
        for name, parameter in model.named_parameters():
            rows = torch.chunk(state[name].detach(), 3)
            mine = rows[place] if place < len(rows) else state[name].detach()[:0]
            assert parameter.is_meta and torch.equal(parts[name], mine), name
            assert parameter.shape == state[name].shape and parameter.requires_grad == state[name].requires_grad
        assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
        assert dict(model.named_buffers()).keys() == buffers.keys()


class Reading(torch.nn.Module):
    """Draws by what it has drawn, and writes to rows alone."""

    def __init__(self, copied: int = 4) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(10, 4, padding_idx=3)
        self.table = torch.nn.Parameter(torch.ones(7, 4))
        self.copied = torch.nn.Parameter(torch.zeros(copied, 4))
        with torch.no_grad():
            self.words.weight[5:7].mul_(2)
            torch.nn.init.trunc_normal_(self.table, std=self.words.weight.std().item())
            self.table.add_(self.words.weight[:7])
            self.copied.copy_(torch.arange(4 * copied).view(copied, 4))
            self.copied[1].fill_(self.table.mean().item())
        self.register_buffer("mean", self.words.weight.detach().mean(0), persistent=False)


def test_what_is_read_while_a_network_is_built_is_right() -> None:
    torch.manual_seed(1)
    whole = Reading()
    parts = []
    for place in range(3):
        torch.manual_seed(1)
        model, mine = deferred.build(Reading, place, 3)
        parts.append(mine)
        assert torch.equal(model.mean, whole.mean)
    for name, parameter in whole.named_parameters():
        assert torch.equal(torch.cat([p[name].view(-1, 4) for p in parts]), parameter.detach())
    with pytest.raises(X2IError, match=r"reads a weight of \[40000, 4\] while it is built"):
        deferred.build(lambda: Reading(40000), 0, 3)


def test_one_file_is_the_file_that_safetensors_writes(tmp_path: Path) -> None:
    state = {
        "b.x": torch.randn(5, 3),
        "scale": torch.tensor(3.5),
        "places": torch.arange(7),
        "half": torch.randn(3).bfloat16(),
        "none": torch.zeros(0, 4),
        "on": torch.tensor([True, False]),
        "über": torch.randn(2, 2, 2).half(),
    }
    dcp.save(state, storage_writer=OneFile(tmp_path / "one"), no_dist=True)
    save_file(state, tmp_path / "other", {"format": "pt"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    with pytest.raises(X2IError, match="wave: safetensors has no type for torch.complex64"):
        entries({"wave": (torch.complex64, (2,))})


def test_a_box_of_a_tensor_is_found_piece_by_piece() -> None:
    whole = torch.arange(3 * 4 * 5).view(3, 4, 5)
    for at, size in (((1, 0, 0), (2, 4, 5)), ((0, 1, 0), (3, 2, 5)), ((1, 1, 2), (2, 3, 2)), ((3, 0, 0), (0, 4, 5))):
        box = whole[tuple(slice(a, a + n) for a, n in zip(at, size, strict=True))]
        found = [whole.flatten()[first : first + count] for first, count in runs(whole.shape, at, size)]
        assert torch.equal(torch.cat([*found, whole.flatten()[:0]]), box.flatten())
    assert list(runs((3, 4), (1, 0), (2, 4))) == [(4, 8)]  # whole rows at once
    assert list(runs((), (), ())) == [(0, 1)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpora.write(tmp_path_factory.mktemp("divided") / "corpus", list(corpora.samples(6)))


def measured(size: int, *runs: dict[str, Any]) -> list[dict[str, int]]:
    """Of each rank what the last of these runs has taken."""
    paths = [Path(run["output"]).with_suffix(".yaml") for run in runs]
    for path, run in zip(paths, runs, strict=True):
        path.write_text(yaml.safe_dump(run))
    command = [sys.executable, "-m", "tests.trainer.memory", str(size), *map(str, paths)]
    given_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed, at once
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=given_back)
    assert done.returncode == 0, done.stdout + done.stderr
    told = (json.loads(found) for found in re.findall(r'{"run".*?}', done.stdout))  # ranks may share a line
    return [each for each in told if each["run"] == str(paths[-1])]


def same(content: dict[str, Any], pictures: Path) -> dict[str, torch.Tensor]:
    """The weights that one rank begins with; those that were written are the same to the bit."""
    one = Setup(parse_config(RunConfig, content, "test"), [corpus.open(pictures)], None).model.state_dict()
    written = load_file(checkpoint.folder(Path(content["output"]), 1) / checkpoint.MODEL)
    assert written.keys() == one.keys()
    assert all(torch.equal(written[name], one[name]) for name in one)
    return one


def test_no_rank_ever_has_the_whole_model(pictures: Path, tmp_path: Path) -> None:
    small, large = (corpora.run_content(pictures, tmp_path / name, ema=None) for name in ("small", "large"))
    large["model"] = small["model"] | {"hidden_size": 512, "intermediate_size": 2048, "layers": 3, "text_head": True}
    write("omnigen", tmp_path / "published")
    small |= {"model": {"weights": str(tmp_path / "published")}, "vae": None, "tokenizer": None}
    small |= {"stages": small["stages"][:1], "compute": {"shards": 2}}  # two replicas
    found = measured(4, small, large)
    same(small, pictures)
    size = sum(tensor.nbytes for tensor in same(large, pictures).values())
    assert size > 50e6
    assert len(found) == 4
    for rank in found:
        assert 0.2 * size < rank["built"] < 0.7 * size, found  # a quarter that is kept, and what is drawn at a time
        assert rank["written"] < 0.4 * size, found
        assert rank["read"] < 0.5 * size, found  # of the file, its quarter
