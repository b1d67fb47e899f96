"""Every architecture's layouts have one shape, and no two claim one folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from x2i.base.errors import X2IError
from x2i.model import folders, layouts, registry


@pytest.mark.parametrize("architecture", registry.architectures())
def test_every_architecture_is_written_and_read(architecture: str, tmp_path: Path) -> None:
    module = layouts.of(architecture)
    assert module is not None and "published" in module.LAYOUTS and layouts.X2I not in module.LAYOUTS
    assert (module.DRAWING is not None) == registry.model_class(architecture).draws
    assert not module.recognises(tmp_path)
    assert module.EXPECTED in str(layouts.unknown(tmp_path))
    with pytest.raises(X2IError, match=f"{architecture} can be written as {', '.join(module.LAYOUTS)}, x2i"):
        layouts.check(architecture, "gguf")


@pytest.mark.parametrize(
    ("numbers", "architecture"),
    [
        ({"model_type": "phi3"}, "omnigen"),
        ({"_class_name": "OmniGenTransformer2DModel"}, "omnigen"),
        ({"model_type": "ovis_u1"}, "ovis_u1"),
        ({"model_type": "ovis"}, "ovis2"),
        ({"model_type": "ovis2"}, "ovis2"),
        ({"model_type": "mgm_gemma"}, "mini_gemini"),
        ({"model_type": "llama"}, None),
        ({"architecture": "omnigen", "model": {}}, None),
    ],
    ids=str,
)
def test_a_folder_is_one_architectures(numbers: dict[str, object], architecture: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(numbers))
    each = ((name, layouts.of(name)) for name in registry.architectures())
    claim = [name for name, module in each if module is not None and module.recognises(tmp_path)]
    assert claim == ([architecture] if architecture else [])
    assert layouts.is_checkpoint(tmp_path) == ("architecture" in numbers)


@pytest.mark.parametrize("preset", ["omnigen-tiny", "ovis-u1-tiny", "ovis2-tiny", "mini-gemini-tiny"])
def test_a_hollow_network_is_a_built_one_but_for_its_weights(preset: str) -> None:
    """Its tables are there, tied weights are one, and it computes what the built one does once it has its weights."""
    config = registry.preset(preset)
    built, hollow = registry.build(config), folders.hollow(config, torch.float32)
    state = built.state_dict()
    folders.fill(hollow, state, Path("here"))
    assert hollow.state_dict().keys() == state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in hollow.state_dict().items())
    buffers = dict(built.named_buffers()), dict(hollow.named_buffers())
    assert buffers[0].keys() == buffers[1].keys()
    assert all(torch.equal(buffers[0][name], buffers[1][name]) for name in buffers[0])
    assert [n for n, _ in built.named_parameters()] == [n for n, _ in hollow.named_parameters()]  # tied ones once
    assert not any(p.requires_grad for p in hollow.parameters())
    half = folders.hollow(config, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert all(b.dtype == torch.float32 for n, b in half.named_buffers() if n.endswith("inv_freq"))
