"""`depth` with the real architectures, small and random, saved as published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.pipelines.annotating import batch, drawn, item, photo, run
from tests.pipelines.annotators.devices import gpu
from tests.pipelines.annotators.folders import changed
from x2i.base.errors import X2IError
from x2i.pipelines.annotators._maps import map_size
from x2i.pipelines.annotators.base import Batch
from x2i.pipelines.annotators.depth import Depth

torch = pytest.importorskip("torch")


def _save(folder: Path, kind: str, **extra: Any) -> Path:
    import transformers as t

    torch.manual_seed(0)
    if kind == "dpt":
        config = t.DPTConfig(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=64,
            patch_size=16, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16,
        )  # fmt: skip
        model: Any = t.DPTForDepthEstimation(config)
        processor = t.DPTImageProcessor(size={"height": 64, "width": 64})
    else:
        backbone = t.Dinov2Config(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=70, patch_size=14,
            out_indices=[1, 2, 3, 4], reshape_hidden_states=False, apply_layernorm=True,
        )  # fmt: skip
        config = t.DepthAnythingConfig(
            backbone_config=backbone, reassemble_hidden_size=32, patch_size=14, neck_hidden_sizes=[8, 8, 16, 16],
            fusion_hidden_size=16, head_hidden_size=8, **extra,
        )  # fmt: skip
        model = t.DepthAnythingForDepthEstimation(config)
        processor = t.DPTImageProcessor(size={"height": 70, "width": 70}, keep_aspect_ratio=True, ensure_multiple_of=14)
    for parameter in model.parameters():  # as initialised, such small heads end in a ReLU that is zero everywhere
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.05, 0.3)
        elif parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("dpt"), "dpt")


@pytest.fixture(scope="module")
def anything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("anything"), "depth_anything")


def _depth(folder: Path, **given: Any) -> Depth:
    return Depth(Depth.Config(weights=str(folder), **given))


def _map(row: dict[str, Any]) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(row["map"], np.uint8), cv2.IMREAD_UNCHANGED)


@pytest.mark.parametrize("kind", ["dpt", "anything"])
def test_gives_the_library_s_depth_stretched_to_16_bits(kind: str, request: pytest.FixtureRequest) -> None:
    import transformers as t

    folder = request.getfixturevalue(kind)
    row = run(_depth(folder, side=96), batch([photo("coffee")])).to_pylist()[0]
    grey = _map(row)
    picture = item(photo("coffee")).pixels.copy()
    model = t.AutoModelForDepthEstimation.from_pretrained(folder).eval()
    with torch.inference_mode():
        raw = model(**t.AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")).predicted_depth
        raw = torch.nn.functional.interpolate(raw[None], grey.shape, mode="bicubic", align_corners=False)[0, 0].numpy()
    assert grey.dtype == np.uint16 and (grey.min(), grey.max()) == (0, 65535)
    assert grey.shape == (row["height"], row["width"]) == (96, 144)
    assert raw.std() > 1e-4, "a flat prediction would prove nothing"
    back = row["minimum"] + grey / 65535 * (row["maximum"] - row["minimum"])
    assert np.abs(back - raw).max() < (raw.max() - raw.min()) / 65535 + 1e-5
    assert row["near_is"] == "white"


@pytest.mark.parametrize("kind", ["dpt", "anything"])
def test_a_picture_s_map_does_not_depend_on_its_batch(kind: str, request: pytest.FixtureRequest) -> None:
    annotator = _depth(request.getfixturevalue(kind), side=64)
    files = [photo("astronaut"), photo("coffee"), photo("chelsea"), photo("astronaut")]
    together = run(annotator, batch(files)).to_pylist()
    for file, row in zip(files, together, strict=True):
        alone = annotator(batch([file])).to_pylist()[0]
        assert np.abs(_map(alone).astype(int) - _map(row)).max() <= 16  # of 65535: sums in another order
        assert row["minimum"] == pytest.approx(alone["minimum"], abs=1e-5)
    assert not np.array_equal(_map(together[0]), _map(together[2]))


def test_a_metric_model_has_its_near_end_black(tmp_path: Path) -> None:
    folder = _save(tmp_path, "depth_anything", depth_estimation_type="metric", max_depth=20)
    row = run(_depth(folder, side=32), batch([photo("chelsea")])).to_pylist()[0]
    assert row["near_is"] == "black"
    assert -2 < row["minimum"] < row["maximum"] < 22  # 0 to 20 m, and what bicubic resizing overshoots


@pytest.mark.parametrize("kind", ["dpt", "anything"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3000), (3000, 1), (7, 300)])
def test_odd_pictures_have_maps_of_their_own_shape(
    kind: str, height: int, width: int, request: pytest.FixtureRequest
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    row = run(_depth(request.getfixturevalue(kind), side=32), batch([drawn(pixels)])).to_pylist()[0]
    assert _map(row).reshape(row["height"], row["width"]).shape == map_size(pixels, 32)[::-1]
    assert row["height"] * row["width"] <= 4 * 32 * 32


def test_mixed_precision_is_near_full_precision(dpt: Path) -> None:
    full = run(_depth(dpt, side=64), batch([photo("astronaut")])).to_pylist()[0]
    half = run(_depth(dpt, side=64, precision="bf16"), batch([photo("astronaut")])).to_pylist()[0]
    assert full["maximum"] == pytest.approx(half["maximum"], rel=0.05)
    assert full["map"] != half["map"]
    assert np.corrcoef(_map(full).ravel(), _map(half).ravel())[0, 1] > 0.98


def test_an_empty_batch_and_a_model_of_another_kind(dpt: Path, tmp_path: Path) -> None:
    from transformers import GLPNConfig

    assert run(_depth(dpt), Batch([])).num_rows == 0
    GLPNConfig().save_pretrained(tmp_path)
    with pytest.raises(X2IError, match="glpn"):
        _depth(tmp_path).setup()


@pytest.mark.parametrize("kind", ["dpt", "anything"])
def test_only_what_is_never_used_may_be_missing(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    whole = request.getfixturevalue(kind)
    lacking = changed(whole, tmp_path / "published", "fusion_stage.layers.0.residual_layer1")  # as Intel/dpt-large
    files = batch([photo("coffee")])
    assert run(_depth(lacking, side=32), files).equals(run(_depth(whole, side=32), files))
    with pytest.raises(X2IError, match="it lacks neck.fusion_stage.layers.1.residual_layer1"):
        _depth(changed(whole, tmp_path / "cut", "fusion_stage.layers.1.residual_layer1"), side=32).setup()


def test_says_where_its_weights_come_from() -> None:
    (weights,) = Depth(Depth.Config()).weights()
    assert (weights.spec, weights.licence) == ("Intel/dpt-large", "Apache-2.0")
    assert (weights.size or 0) > 1e9


@pytest.mark.parametrize("kind", ["dpt", "anything"])
def test_on_a_gpu_no_tensor_stays_behind(kind: str, request: pytest.FixtureRequest) -> None:
    made = _depth(request.getfixturevalue(kind), side=64)
    made.setup()
    with gpu(made._runtime, made._model):
        assert made(batch([photo("astronaut"), photo("coffee")])).num_rows == 2
