"""`edges`: networks against what the papers say, random weights under published names, and real ones where given."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.pipelines.annotating import batch, drawn, item, photo, run
from tests.pipelines.annotators.devices import gpu
from x2i.base.errors import X2IError
from x2i.pipelines.annotators._maps import map_size
from x2i.pipelines.annotators.base import Batch
from x2i.pipelines.annotators.edges import HED as HED_WEIGHTS
from x2i.pipelines.annotators.edges import PIDINET, Edges
from x2i.pipelines.images import resize

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402

from x2i.pipelines.networks.hed import HED  # noqa: E402
from x2i.pipelines.networks.pidinet import PiDiNet, converted_weights, plain  # noqa: E402


def _hed_names() -> dict[str, tuple[int, ...]]:
    """The names and shapes of ControlNetHED.pth."""
    names: dict[str, tuple[int, ...]] = {"norm": (1, 3, 1, 1)}
    before = 3
    for block, (width, depth) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)], 1):
        for i in range(depth):
            names[f"block{block}.convs.{i}.weight"] = (width, before, 3, 3)
            names[f"block{block}.convs.{i}.bias"] = (width,)
            before = width
        names[f"block{block}.projection.weight"] = (1, width, 1, 1)
        names[f"block{block}.projection.bias"] = (1,)
    return names


def _pidinet_names() -> dict[str, tuple[int, ...]]:
    """The names and shapes of table5_pidinet.pth."""
    names: dict[str, tuple[int, ...]] = {"init_block.weight": (60, 3, 3, 3)}
    before = 60
    for stage, (width, depth) in enumerate([(60, 3), (120, 4), (240, 4), (240, 4)], 1):
        for i in range(1, depth + 1):
            block = f"block{stage}_{i}"
            if i == 1 and stage > 1:
                names |= {f"{block}.shortcut.weight": (width, before, 1, 1), f"{block}.shortcut.bias": (width,)}
            names |= {f"{block}.conv1.weight": (before, 1, 3, 3), f"{block}.conv2.weight": (width, before, 1, 1)}
            before = width
        n = stage - 1
        names |= {f"dilations.{n}.conv1.weight": (24, width, 1, 1), f"dilations.{n}.conv1.bias": (24,)}
        names |= {f"dilations.{n}.conv2_{i}.weight": (24, 24, 3, 3) for i in range(1, 5)}
        names |= {f"attentions.{n}.conv1.weight": (4, 24, 1, 1), f"attentions.{n}.conv1.bias": (4,)}
        names |= {f"attentions.{n}.conv2.weight": (1, 4, 3, 3)}
        names |= {f"conv_reduces.{n}.conv.weight": (1, 24, 1, 1), f"conv_reduces.{n}.conv.bias": (1,)}
    return names | {"classifier.weight": (1, 4, 1, 1), "classifier.bias": (1,)}


def _random(names: dict[str, tuple[int, ...]], scale: float = 1.0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * scale * (2 / max(1, int(np.prod(shape[1:])))) ** 0.5
        for name, shape in names.items()
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights in the two published formats."""
    folder = tmp_path_factory.mktemp("edges")
    hed = _random(_hed_names())
    for name in hed:
        if name.startswith("block") and "projection.weight" in name:
            hed[name] *= 0.02  # else every pixel is all edge or none
    pidinet = {f"module.{name}": tensor for name, tensor in _random(_pidinet_names(), 0.7).items()}
    torch.save({name: tensor.half() for name, tensor in hed.items()}, folder / "hed.pth")
    torch.save({"epoch": 19, "state_dict": pidinet}, folder / "pidinet.pth")
    return {"hed": folder / "hed.pth", "pidinet": folder / "pidinet.pth"}


def _edges(saved: dict[str, Path], model: str, **given: Any) -> Edges:
    return Edges(Edges.Config(model=model, weights=str(saved[model]), **given))


def _map(row: dict[str, Any]) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(row["map"], np.uint8), cv2.IMREAD_UNCHANGED)


def test_the_networks_have_the_published_names_and_shapes() -> None:
    for network, names, parameters in ((HED(), _hed_names(), 14_716_168), (PiDiNet(), _pidinet_names(), 710_149)):
        assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == names
        assert sum(p.numel() for p in network.parameters()) == parameters


def test_difference_convolutions_are_what_the_paper_says() -> None:
    """Against sums of weighted differences of pixels, written out pixel by pixel."""
    rng = np.random.default_rng(0)
    pixels, weight = rng.normal(size=(9, 9)), rng.normal(size=(3, 3))
    ring = [(-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1)]  # clockwise
    y, x = 4, 4
    central = sum(weight[1 + a, 1 + b] * (pixels[y + a, x + b] - pixels[y, x]) for a in (-1, 0, 1) for b in (-1, 0, 1))
    angular = sum(
        weight[1 + a, 1 + b] * (pixels[y + a, x + b] - pixels[y + c, x + d])
        for (a, b), (c, d) in zip(ring, ring[1:] + ring[:1], strict=True)
    )
    radial = sum(weight[1 + a, 1 + b] * (pixels[y + 2 * a, x + 2 * b] - pixels[y + a, x + b]) for a, b in ring)
    given = torch.tensor(pixels)[None, None]
    # rd takes its eight weights, in reading order, after the first place, for which it has no use
    kernel = torch.zeros(3, 3, dtype=torch.float64)
    places = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a, b) != (0, 0)]
    kernel.view(-1)[1:] = torch.tensor([weight[1 + a, 1 + b] for a, b in places])
    for kind, expected, used in (("cd", central, weight), ("ad", angular, weight), ("rd", radial, kernel)):
        kernel_OIKK = plain(kind, torch.as_tensor(used)[None, None])
        found = F.conv2d(given, kernel_OIKK, padding=kernel_OIKK.shape[-1] // 2)[0, 0, y, x]
        assert float(found) == pytest.approx(expected), kind


def test_the_converted_network_equals_the_published_one() -> None:
    state = {f"module.{name}": tensor for name, tensor in _random(_pidinet_names(), 0.7).items()}
    published, converted = PiDiNet().eval(), PiDiNet(converted=True).eval()
    published.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    converted.load_state_dict(converted_weights(state))
    pixels = torch.randn(2, 3, 37, 50, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        a, b = published(pixels), converted(pixels)
    assert a.std() > 0.01 and torch.allclose(a, b, atol=1e-4)
    broken = dict(converted_weights(state))
    broken["block2_3.conv1.weight"] = broken["block2_3.conv1.weight"].flip(-1)
    converted.load_state_dict(broken)
    with torch.inference_mode():
        assert not torch.allclose(a, converted(pixels), atol=1e-4)


def _hed_by_hand(state: dict[str, Any], rgb: np.ndarray) -> np.ndarray:
    """ControlNet's HED, written from its description: torch only for convolutions, cv2 and numpy for the rest."""
    x = torch.tensor(rgb, dtype=torch.float32).permute(2, 0, 1)[None] - state["norm"]
    sides = []
    for block, depth in enumerate((2, 2, 3, 3, 3), 1):
        if block > 1:
            height, width = x.shape[-2] // 2 * 2, x.shape[-1] // 2 * 2
            x = x[..., :height, :width].unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))
        for i in range(depth):
            name = f"block{block}.convs.{i}"
            x = torch.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1).clamp(min=0)
        name = f"block{block}.projection"
        side = torch.einsum("bchw,c->bhw", x, state[f"{name}.weight"][0, :, 0, 0]) + state[f"{name}.bias"]
        sides.append(cv2.resize(side[0].numpy(), rgb.shape[1::-1], interpolation=cv2.INTER_LINEAR))
    return 1 / (1 + np.exp(-np.mean(sides, axis=0)))


def test_hed_equals_a_forward_by_hand(saved: dict[str, Path]) -> None:
    picture = resize(item(photo("chelsea")).pixels, 113, 75)
    row = run(_edges(saved, "hed"), batch([drawn(picture)])).to_pylist()[0]
    state = {name: tensor.float() for name, tensor in torch.load(saved["hed"], weights_only=True).items()}
    expected = _hed_by_hand(state, picture)
    assert expected.std() > 0.02, "a flat map would prove nothing"
    assert np.abs(_map(row) - expected * 255).max() <= 0.51
    assert row["density"] == pytest.approx(expected.mean(), abs=0.002)


def test_pidinet_is_given_normalised_rgb(saved: dict[str, Path]) -> None:
    picture = resize(item(photo("coffee")).pixels, 90, 60)
    (row,) = run(_edges(saved, "pidinet"), batch([drawn(picture)])).to_pylist()
    network = PiDiNet().eval()
    state = torch.load(saved["pidinet"], weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    given = (picture / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.inference_mode():
        expected = network(torch.tensor(given, dtype=torch.float32).permute(2, 0, 1)[None])[0].numpy()
    assert expected.std() > 0.005
    assert np.abs(_map(row) - expected * 255).max() <= 0.51


@pytest.mark.parametrize("model", ["hed", "pidinet"])
def test_a_picture_s_map_does_not_depend_on_its_batch(model: str, saved: dict[str, Path]) -> None:
    annotator = _edges(saved, model, side=48)
    files = [photo("astronaut"), photo("coffee"), photo("chelsea"), photo("astronaut")]
    together = run(annotator, batch(files)).to_pylist()
    for file, row in zip(files, together, strict=True):
        width, height = map_size(item(file).pixels, 48)
        assert _map(row).shape == (height, width) and min(width, height) == 48
        assert np.abs(_map(annotator(batch([file])).to_pylist()[0]).astype(int) - _map(row)).max() <= 1
    assert together[0]["map"] == together[3]["map"] != together[1]["map"]


@pytest.mark.parametrize("model", ["hed", "pidinet"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3000), (3000, 1), (9, 7)])
def test_odd_pictures_have_maps_of_their_own_shape(model: str, height: int, width: int, saved: dict[str, Path]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    row = run(_edges(saved, model, side=32), batch([drawn(pixels)])).to_pylist()[0]
    assert _map(row).reshape(map_size(pixels, 32)[::-1]).size <= 4 * 32 * 32
    assert 0 <= row["density"] <= 1


@pytest.mark.parametrize("model", ["hed", "pidinet"])
def test_mixed_precision_is_near_full_precision(model: str, saved: dict[str, Path]) -> None:
    full, half = (
        _map(run(_edges(saved, model, side=64, precision=p), batch([photo("astronaut")])).to_pylist()[0]).astype(int)
        for p in ("fp32", "bf16")
    )
    assert 0 < np.abs(full - half).mean() < 6


def test_refuses_other_weights_and_takes_an_empty_batch(saved: dict[str, Path], tmp_path: Path) -> None:
    assert run(_edges(saved, "pidinet"), Batch([])).num_rows == 0
    with pytest.raises(X2IError, match="does not hold HED"):
        _edges({"hed": saved["pidinet"]}, "hed").setup()
    (tmp_path / "no.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(X2IError, match="cannot be read as weights"):
        _edges({"pidinet": tmp_path / "no.pth"}, "pidinet").setup()


def test_the_default_weights_go_with_the_model() -> None:
    (hed,), (pidinet,) = Edges(Edges.Config()).weights(), Edges(Edges.Config(model="pidinet")).weights()
    assert (hed.spec, hed.licence) == (HED_WEIGHTS.spec, "Apache-2.0")
    assert pidinet.spec == PIDINET.spec and "research" in (pidinet.licence or "") and pidinet.size == 2_871_148


def test_real_pidinet_finds_the_sides_of_a_square() -> None:
    folder = Path(os.environ.get("X2I_TEST_WEIGHTS", "/nowhere"))
    there = [p for p in (folder / "table5_pidinet.pth", folder / "pidinet_table5.pth") if p.is_file()]
    if not there:
        pytest.skip("X2I_TEST_WEIGHTS names no folder with table5_pidinet.pth (not in any package registry)")
    picture = np.full((160, 200, 3), 200, np.uint8)
    picture[40:120, 60:140] = (40, 60, 90)
    grey = _map(run(_edges({"pidinet": there[0]}, "pidinet"), batch([drawn(picture)])).to_pylist()[0])
    near = np.zeros(grey.shape, bool)
    near[36:124, 56:144] = True
    near[44:116, 64:136] = False
    assert grey[80, 57:64].max() > 150 and grey[80, 137:144].max() > 150
    assert grey[37:44, 100].max() > 150 and grey[117:124, 100].max() > 150
    assert grey[60:100, 80:120].max() < 60 and grey[:20].max() < 60
    assert grey[near].mean() > 10 * grey[~near].mean()


@pytest.mark.parametrize("model", ["hed", "pidinet"])
def test_on_a_gpu_no_tensor_stays_behind(model: str, saved: dict[str, Path]) -> None:
    made = _edges(saved, model, side=64)
    made.setup()
    with gpu(made._runtime, made._network):
        made._mean, made._deviation = made._mean.to("cuda"), made._deviation.to("cuda")
        assert made(batch([photo("astronaut"), photo("coffee")])).num_rows == 2
