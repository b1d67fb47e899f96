"""`watermark`: the real architecture with random weights under the published names, against timm called directly."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision import transforms

from tests.pipelines.annotating import batch, drawn, photo, run
from tests.pipelines.annotators.devices import gpu
from x2i.base.errors import X2IError
from x2i.pipelines.annotators._pictures import bilinear, normalised
from x2i.pipelines.annotators.watermark import Watermark, WatermarkConfig, network, read


@pytest.fixture(scope="module")
def detector() -> Any:
    """As LAION's example_use.py builds it."""
    torch.manual_seed(0)
    model = timm.create_model("efficientnet_b3", pretrained=False, num_classes=2)
    model.classifier = nn.Sequential(
        *(nn.Linear(1536, 625), nn.ReLU(), nn.Dropout(0.3)),
        *(nn.Linear(625, 256), nn.ReLU(), nn.Linear(256, 2)),
    )
    for layer in (0, 3, 5):
        model.classifier[layer].weight.data.mul_(20)  # so that photographs differ
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(detector: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("watermark") / "watermark_model_v1.pt"
    torch.save(detector.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def made(checkpoint: Path) -> Watermark:
    annotator = Watermark(WatermarkConfig(weights=str(checkpoint)))
    annotator.setup()
    return annotator


def test_timm_says_the_same_and_so_does_each_row_alone(made: Watermark, detector: Any) -> None:
    files = [photo("astronaut"), photo("chelsea"), photo("camera")]
    found = made(batch(files))["probability"].to_pylist()
    published = transforms.Compose(
        [
            *(transforms.Resize((256, 256)), transforms.ToTensor()),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    x = torch.stack([published(Image.fromarray(i.pixels)) for i in batch(files) if i.pixels is not None])
    with torch.no_grad():
        expected = torch.softmax(detector(x), dim=1)[:, 0].tolist()
    assert found == pytest.approx(expected, abs=1e-4) and max(found) - min(found) > 1e-3
    assert [made(batch([f]))["probability"][0].as_py() for f in files] == pytest.approx(found, abs=1e-4)


def test_the_preparation_is_torchvision_s() -> None:
    published = transforms.Compose([transforms.Resize((256, 256)), transforms.ToTensor()])
    pixels = np.array(Image.open(io.BytesIO(photo("coffee"))).convert("RGB"))
    ours = normalised(bilinear(pixels, 256, 256)) * np.array([0.229, 0.224, 0.225])[:, None, None] + np.array(
        [[[0.485]], [[0.456]], [[0.406]]]
    )
    assert np.abs(ours - published(Image.fromarray(pixels)).numpy()).max() < 1e-5


def test_odd_pictures_and_none(made: Watermark) -> None:
    sizes = [(1, 1), (1, 5000), (5000, 1)]
    found = made(batch([drawn(np.full((*s, 3), 120, np.uint8)) for s in sizes]))["probability"].to_pylist()
    assert all(0 <= p <= 1 for p in found)
    assert found[0] == pytest.approx(found[1], abs=1e-5)  # one grey is like another
    empty = run(Watermark(made.config), batch([]))
    assert empty.num_rows == 0


def test_a_checkpoint_with_its_optimiser_is_read_without_running_it(detector: Any, tmp_path: Path) -> None:
    module = types.ModuleType("scalable_shampoo.shampoo")
    package = types.ModuleType("scalable_shampoo")
    kind = type("Preconditioner", (), {"__module__": "scalable_shampoo.shampoo"})
    module.Preconditioner = kind  # type: ignore[attr-defined]
    state = {name: value for name, value in detector.state_dict().items() if name.startswith("classifier")}
    held = kind()
    held.rank = 3
    sys.modules.update({"scalable_shampoo": package, "scalable_shampoo.shampoo": module})
    try:
        torch.save({"weights": state, "optimizer": {"state": [held]}}, tmp_path / "whole.pt")
    finally:
        del sys.modules["scalable_shampoo"], sys.modules["scalable_shampoo.shampoo"]
    found = read(tmp_path / "whole.pt")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    torch.save({"weights": state, "other": io.StringIO}, tmp_path / "evil.pt")
    with pytest.raises(X2IError, match="cannot be read"):
        read(tmp_path / "evil.pt")


def test_safetensors_and_parallel_names(detector: Any, tmp_path: Path) -> None:
    save_file({f"module.{k}": v.contiguous() for k, v in detector.state_dict().items()}, tmp_path / "w.safetensors")
    network().load_state_dict(read(tmp_path / "w.safetensors"))


def test_what_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"conv_stem.weight": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(X2IError, match="does not hold EfficientNet"):
        Watermark(WatermarkConfig(weights=str(tmp_path / "w.pt"))).setup()
    (tmp_path / "w.pt").write_bytes(b"<html>")
    with pytest.raises(X2IError, match="cannot be read"):
        Watermark(WatermarkConfig(weights=str(tmp_path / "w.pt"))).setup()
    monkeypatch.setenv("X2I_CACHE", str(tmp_path))
    with pytest.raises(X2IError, match="watermark_model_v1.pt of the GitHub repository LAION-AI/LAION-5B-Watermark"):
        Watermark(WatermarkConfig()).setup()


def test_on_a_gpu_no_tensor_stays_behind(checkpoint: Path) -> None:
    annotator = Watermark(WatermarkConfig(weights=str(checkpoint)))
    annotator.setup()
    with gpu(annotator._runtime, annotator._model):
        assert annotator(batch([photo("astronaut"), photo("coffee")])).num_rows == 2
