"""`clip_nsfw`: heads under the published names, in each published format, against their definition in PyTorch."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.pipelines.annotating import rows, run
from tests.pipelines.annotators.real_weights import published
from tests.pipelines.annotators.savedmodels import save
from x2i.base.errors import X2IError
from x2i.pipelines.annotators._heads import unit
from x2i.pipelines.annotators.clip_nsfw import L14, ClipNSFW, ClipNSFWConfig, load_head

WIDTH = 768
CATEGORIES = {180: ["0.125000", "-0.500000"], 9: ["0.250000"], 644: ["0.010002"]}


class Port(nn.Module):
    """LAION's PyTorch port of the L/14 head, under its names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm = nn.Module()
        self.norm.register_buffer("mean", torch.randn(WIDTH) * 0.03)
        self.norm.register_buffer("variance", torch.rand(WIDTH) * 1e-3 + 1e-4)
        self.linear_1, self.linear_2 = nn.Linear(WIDTH, 64), nn.Linear(64, 512)
        self.linear_3, self.linear_4 = nn.Linear(512, 256), nn.Linear(256, 1)
        self.linear_4.weight.data.mul_(20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x - self.norm.mean) / self.norm.variance.sqrt()
        for layer in (self.linear_1, self.linear_2, self.linear_3):
            x = torch.relu(layer(x))
        return torch.sigmoid(self.linear_4(x))[:, 0]


def h14() -> nn.Sequential:
    """LAION's H/14 head: `layers` of h14_nsfw_model.py."""
    torch.manual_seed(2)
    sizes, modules = (1024, 1024, 2048, 1024, 256, 128), []
    for i, o in pairwise(sizes):
        modules += [nn.Linear(i, o), nn.ReLU(), nn.Dropout(0.2)]
    head = nn.Sequential(*modules, nn.Linear(128, 16), nn.Linear(16, 1)).eval()
    head[0].weight.data.mul_(300)
    head[-1].weight.data.mul_(20)
    head[-1].bias.data.fill_(0.5)
    return head


def stored(n: int, width: int = WIDTH) -> np.ndarray:
    return unit(np.random.default_rng(0).normal(size=(n, width)).astype(np.float32)).astype(np.float16)


def column(x: np.ndarray) -> dict[str, pa.Array]:
    return {"clip.embedding": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel(), pa.float16()), x.shape[1])}


def probabilities(path: Path, x: np.ndarray) -> list[float]:
    made = ClipNSFW(ClipNSFWConfig(weights=str(path)))
    found: list[float] = run(made, rows([None] * len(x), column(x)))["probability"].to_pylist()
    return found


def saved_model(folder: Path, port: Port) -> Path:
    """The port's weights as Keras keeps them: kernels [in, out], layers numbered from the encoding's 0."""
    arrays = {
        "layer_with_weights-1/mean": port.norm.mean.numpy(),
        "layer_with_weights-1/variance": port.norm.variance.numpy(),
        "layer_with_weights-1/count": np.array(242067, "<i8"),
    }
    for i, layer in enumerate((port.linear_1, port.linear_2, port.linear_3, port.linear_4), 2):
        arrays[f"layer_with_weights-{i}/kernel"] = layer.weight.detach().numpy().T
        arrays[f"layer_with_weights-{i}/bias"] = layer.bias.detach().numpy()
    return save(folder, arrays, CATEGORIES)


def test_the_port_s_state_dict(tmp_path: Path) -> None:
    port, x = Port().eval(), stored(6)
    expected = port(torch.from_numpy(x.astype(np.float32))).detach().numpy()
    assert expected.std() > 0.05
    state = {k: v.contiguous() for k, v in port.state_dict().items()}
    torch.save(state, tmp_path / "head.pth")
    save_file(state, tmp_path / "head.safetensors")
    np.savez(tmp_path / "head.npz", **{k: v.numpy() for k, v in state.items()})
    for name in ("head.pth", "head.safetensors", "head.npz"):
        assert probabilities(tmp_path / name, x) == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_saved_model_looks_its_categories_up(tmp_path: Path) -> None:
    port, x = Port().eval(), stored(4)
    port.norm.mean[[9, 180, 644]], port.norm.variance[[9, 180, 644]] = 1.0, 4.0
    folder = saved_model(tmp_path / "clip_autokeras_binary_nsfw", port)
    x[0, 180], x[1, 180], x[2, 9], x[3, 644] = -0.5, 0.125, 0.25, 0.010002
    encoded = x.astype(np.float32)
    encoded[:, [9, 180, 644]] = 0  # not in the training set
    encoded[0, 180], encoded[1, 180], encoded[2, 9], encoded[3, 644] = 2, 1, 1, 1
    assert f"{float(x[3, 644]):f}" == "0.010002"  # as fp16 keeps it
    expected = port(torch.from_numpy(encoded)).detach().numpy()
    raw = port(torch.from_numpy(x.astype(np.float32))).detach().numpy()
    assert np.abs(expected - raw).max() > 1e-3
    assert probabilities(folder, x) == pytest.approx(expected.tolist(), abs=1e-4)
    archive = shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path, folder.name)
    assert probabilities(Path(archive), x) == probabilities(folder, x)


def test_the_h14_head_is_a_clipped_regression(tmp_path: Path) -> None:
    head, x = h14(), stored(40, 1024)
    torch.save({f"layers.{k}": v for k, v in head.state_dict().items()}, tmp_path / "h14_nsfw.pth")
    expected = head(torch.from_numpy(x.astype(np.float32))).detach().numpy()[:, 0]
    assert expected.min() < 0 < 0.2 < expected.max()
    found = probabilities(tmp_path / "h14_nsfw.pth", x)
    assert found == pytest.approx(np.clip(expected, 0, 1).tolist(), abs=1e-4)


def test_gaps_and_wrong_widths(tmp_path: Path) -> None:
    torch.save(Port().state_dict(), tmp_path / "head.pth")
    made = ClipNSFW(ClipNSFWConfig(weights=str(tmp_path / "head.pth")))
    kind = pa.list_(pa.float16(), WIDTH)
    some = pa.array([None, stored(1)[0].tolist()], kind)
    found = run(made, rows([None] * 2, {"clip.embedding": some}))["probability"].to_pylist()
    assert found[0] is None and 0 <= found[1] <= 1
    assert made(rows([], {"clip.embedding": pa.array([], kind)})).num_rows == 0
    with pytest.raises(X2IError, match="width 512.*width 768"):
        made(rows([None], column(stored(1, 512))))


def test_what_is_no_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"fc.weight": torch.zeros(1, 4)}, tmp_path / "head.pth")
    (tmp_path / "head.zip").write_bytes(b"<html>")
    (tmp_path / "empty").mkdir()
    folder = saved_model(tmp_path / "cut", Port())
    data = folder / "variables/variables.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:1000])
    for name in ("head.pth", "head.zip", "empty", "cut"):
        with pytest.raises(X2IError, match="no published head"):
            load_head(tmp_path / name)
    monkeypatch.setenv("X2I_CACHE", str(tmp_path))
    with pytest.raises(X2IError, match="clip_autokeras_binary_nsfw.zip of the GitHub repository LAION-AI/CLIP-based"):
        ClipNSFW(ClipNSFWConfig()).setup()


def test_the_published_l14_head() -> None:
    path = published("clip_autokeras_binary_nsfw.zip")
    head = load_head(path)
    assert L14.sha256 and path.stat().st_size == L14.size
    assert {c: len(r) for c, r in head.ranks.items()} == {180: 10425, 316: 2266, 413: 2190, 440: 2293, 644: 2241}
    assert head.ranks[180]["0.125488"] == 1 and head.ranks[644]["0.375000"] == 1
    assert [w.shape for w, _ in head.layers] == [(64, 768), (512, 64), (256, 512), (1, 256)]
    port = load_head(published("clip_ViT-L-14_openai_binary_nsfw_head.pth", "l14_head.pth"))
    x = stored(200).astype(np.float32)
    assert not port.ranks
    head.ranks = {}
    assert np.array_equal(head(x), port(x))  # LAION's own port of the same file, which looks nothing up
