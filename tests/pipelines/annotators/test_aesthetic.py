"""`aesthetic`: random heads under the published names against PyTorch; the published heads' fingerprints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.pipelines.annotating import rows, run
from tests.pipelines.annotators.real_weights import published
from x2i.base.errors import X2IError
from x2i.pipelines.annotators._heads import unit
from x2i.pipelines.annotators.aesthetic import V1, V2, Aesthetic, AestheticConfig, load_head

WIDTH = 768


def mlp() -> nn.Module:
    """christophschuhmann/improved-aesthetic-predictor's module, under its names: layers.{0,2,4,6,7}."""
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.Sequential(
        *(nn.Linear(WIDTH, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2)),
        *(nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)),
    )
    return model.eval()


def stored(n: int, width: int = WIDTH) -> np.ndarray:
    """Embeddings float16 [n, width], of about length 1."""
    return unit(np.random.default_rng(0).normal(size=(n, width)).astype(np.float32)).astype(np.float16)


def column(x: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(x.ravel(), pa.float16()), x.shape[1])


def scores(config: AestheticConfig, x: pa.Array, name: str = "clip.embedding") -> list[float | None]:
    found: list[float | None] = run(Aesthetic(config), rows([None] * len(x), {name: x}))["score"].to_pylist()
    return found


def test_v2_folded_is_v2(tmp_path: Path) -> None:
    model = mlp()
    assert sum(p.numel() for p in model.parameters()) == 927_969
    for parameter in model.parameters():
        parameter.data.mul_(2)  # so that scores differ by more than rounding
    torch.save(model.state_dict(), tmp_path / "sac.pth")
    x = stored(7)
    with torch.no_grad():
        expected = model.layers(torch.from_numpy(unit(x.astype(np.float32))))[:, 0].numpy()
    assert expected.std() > 0.05
    found = scores(AestheticConfig(weights=str(tmp_path / "sac.pth")), column(x))
    assert found == pytest.approx(expected.tolist(), abs=1e-5)
    save_file(dict(model.state_dict()), tmp_path / "sac.safetensors")
    again = scores(AestheticConfig(weights=str(tmp_path / "sac.safetensors"), embedding="b.e"), column(x), "b.e")
    assert again == found


def test_v1_is_a_linear_layer_over_a_normalised_embedding(tmp_path: Path) -> None:
    layer = nn.Linear(WIDTH, 1)
    torch.save(layer.state_dict(), tmp_path / "v1.pth")
    x = stored(5)
    expected = layer(torch.from_numpy(unit(x.astype(np.float32)))).detach()[:, 0].tolist()
    config = AestheticConfig(head="v1", weights=str(tmp_path / "v1.pth"))
    assert scores(config, column(x)) == pytest.approx(expected, abs=1e-5)
    assert scores(config, column(x * np.float16(3))) == pytest.approx(expected, abs=2e-3)  # whatever its length


def test_rows_without_an_embedding_and_no_rows(tmp_path: Path) -> None:
    layer = nn.Linear(4, 1)
    torch.save(layer.state_dict(), tmp_path / "v1.pth")
    config = AestheticConfig(weights=str(tmp_path / "v1.pth"))
    kind = pa.list_(pa.float16(), 4)
    some = pa.array([None, [1, 0, 0, 0], [0, 0, 0, 0], None], kind)
    expected = [(layer.weight[0, 0] + layer.bias[0]).item(), layer.bias[0].item()]
    assert scores(config, some) == [None, *(pytest.approx(e, abs=1e-6) for e in expected), None]
    assert scores(config, pa.array([None, None], kind)) == [None, None]
    assert scores(config, pa.array([], kind)) == []
    chunked = pa.chunked_array([some[:1], some[1:]])
    assert run(Aesthetic(config), rows([None] * 4, {"clip.embedding": chunked}))["score"].null_count == 2
    with pytest.raises(X2IError, match="width 6.*width 4"):
        scores(config, pa.array([[0.0] * 6], pa.list_(pa.float16(), 6)))


def test_the_loader_refuses_what_is_no_head(tmp_path: Path) -> None:
    good = mlp().state_dict()
    cases = {
        "holds v2": (good, "v1"),
        "neither v1": ({"fc.weight": torch.zeros(1, 4)}, "auto"),
        "not the published v2": ({k: v for k, v in good.items() if not k.startswith("layers.6")}, "auto"),
        "layer 1": ({**good, "layers.2.weight": torch.zeros(128, 999)}, "v2"),
        "2 outputs": ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, "auto"),
        "no state dict": ([1, 2], "auto"),
    }
    for message, (state, head) in cases.items():
        torch.save(state, tmp_path / "head.pth")
        with pytest.raises(X2IError, match=message):
            load_head(tmp_path / "head.pth", head)
    (tmp_path / "head.pth").write_bytes(b"<html>")
    with pytest.raises(X2IError, match="cannot be read"):
        load_head(tmp_path / "head.pth")


def test_defaults_name_where_the_heads_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X2I_CACHE", str(tmp_path))
    assert Aesthetic(AestheticConfig()).weights() == [V2]
    made = Aesthetic(AestheticConfig(head="v1"))
    assert made.weights() == [V1] and made.weights()[0].local() is None
    assert len(made.fingerprint) >= 16  # known without the file, whose hash is
    with pytest.raises(X2IError, match=r"sa_0_4_vit_l_14_linear.pth of the GitHub repository LAION-AI/aesthetic-pred"):
        made.setup()
    V1.place().parent.mkdir(parents=True)
    V1.place().write_bytes(b"something else")
    with pytest.raises(X2IError, match="SHA-256"):
        made.setup()


def test_the_published_v1_has_its_fingerprint() -> None:
    weight, bias = load_head(published("laion_aesthetic_v1_vit_l_14_linear.pth", "sa_0_4_vit_l_14_linear.pth"), "v1")
    assert np.linalg.norm(weight) == pytest.approx(28.4444, abs=1e-4) and bias == pytest.approx(3.52937, abs=1e-5)
    assert weight[:4].tolist() == pytest.approx([1.87272, -2.85127, -0.26584, 1.32018], abs=1e-5)


def test_the_published_v2_has_its_fingerprint() -> None:
    weight, bias = load_head(
        published("laion_aesthetic_v2_l14_linearMSE.pth", "sac+logos+ava1-l14-linearMSE.pth"), "v2"
    )
    assert np.linalg.norm(weight) == pytest.approx(17.99562, abs=1e-5) and bias == pytest.approx(5.236646, abs=1e-6)
    assert weight[:4].tolist() == pytest.approx([-0.691593, -0.556994, -0.321169, -0.631484], abs=1e-6)
