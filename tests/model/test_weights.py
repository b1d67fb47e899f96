"""Weights by their published names: tied, sharded, of other types, and faulty."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from x2i.base.errors import X2IError
from x2i.model import weights
from x2i.model.filling import fill


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def filled(std: float = 0.05) -> Tied:
    model = Tied()
    fill(model, std)
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_of_tied_tensors_one_name_is_written_and_either_is_read(tmp_path: Path, name: str) -> None:
    weights.save(filled().state_dict(), tmp_path / weights.FILE)
    held = load_file(tmp_path / weights.FILE)
    assert set(held) == {"embed.weight", "body.weight", "body.bias"}
    save_file({name if n == "embed.weight" else n: t for n, t in held.items()}, tmp_path / weights.FILE)
    model = Tied()
    weights.load(model, tmp_path)
    assert same(model, filled()) and model.head.weight is model.embed.weight


def test_shards_are_read_by_their_index_and_other_types_are_cast(tmp_path: Path) -> None:
    state = {n: t.clone().to(torch.float64) for n, t in filled().state_dict().items()}
    names = {}
    for i, (name, tensor) in enumerate(state.items()):
        names[name] = f"model-{i:05d}.safetensors"
        save_file({name: tensor}, tmp_path / names[name])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    model = Tied()
    weights.load(model, tmp_path)
    assert same(model, filled())
    (tmp_path / "model-00001.safetensors").unlink()
    with pytest.raises(X2IError, match=r"names model-00001\.safetensors, which is not there"):
        weights.load(model, tmp_path)


def test_faults_are_named_and_the_model_is_untouched(tmp_path: Path) -> None:
    file = tmp_path / "some.safetensors"
    save_file({"embed.weight": torch.ones(6, 4), "body.weight": torch.ones(4, 4), "more": torch.ones(1)}, file)
    model = filled()
    with pytest.raises(X2IError) as error:
        weights.load(model, file)
    told = str(error.value)
    assert "missing body.bias" in told and "unknown more" in told
    assert "embed.weight is [6, 4], expected [7, 4]" in told and str(file) in told and "missing head" not in told
    assert same(model, filled())
    file.write_bytes(b"not a tensor")
    with pytest.raises(X2IError, match="cannot be read as safetensors"):
        weights.load(model, file)
    with pytest.raises(X2IError, match=r"model\.safetensors: cannot be read"):
        weights.load(model, tmp_path)


def test_a_part_is_read_under_other_names(tmp_path: Path) -> None:
    save_file(
        {"lm.weight": torch.ones(4, 4), "lm.bias": torch.zeros(4), "rest": torch.ones(9)}, tmp_path / "x.safetensors"
    )
    model = filled()
    weights.load_part(model, tmp_path / "x.safetensors", {"body.weight": "lm.weight", "body.bias": "lm.bias"})
    assert model.body.weight.eq(1).all() and model.embed.weight.equal(filled().embed.weight)
    with pytest.raises(X2IError, match=r"missing lm\.other"):
        weights.load_part(model, tmp_path / "x.safetensors", {"body.bias": "lm.other"})
