"""`semantic` with the four real architectures, small and random, saved as published."""

from __future__ import annotations

import json
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
from x2i.pipelines.annotators._palette import paint, palette
from x2i.pipelines.annotators.base import Batch
from x2i.pipelines.annotators.semantic import Semantic

torch = pytest.importorskip("torch")

KINDS = ["mask2former", "oneformer", "upernet", "segformer"]
NAMES = {i: f"class {i}" for i in range(150)}
LABELS = {"id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}


def _tokenizer(folder: Path) -> None:
    """A CLIP tokenizer of single letters, in CLIP's own files."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)


def _save(folder: Path, kind: str) -> Path:
    import transformers as t

    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin: dict[str, Any] = {
        "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4, "image_size": 64,
        "out_features": stages,
    }  # fmt: skip
    small: dict[str, Any] = {
        "hidden_dim": 32, "mask_dim": 32, "encoder_feedforward_dim": 32, "dim_feedforward": 32,
        "encoder_layers": 1, "decoder_layers": 2, "num_queries": 200, "num_attention_heads": 2,
    }  # fmt: skip
    sizes: dict[str, Any] = {"size": {"shortest_edge": 64, "longest_edge": 256}}
    if kind == "mask2former":
        config: Any = t.Mask2FormerConfig(
            backbone_config=t.SwinConfig(**swin), feature_size=32, num_hidden_layers=2, **small, **LABELS
        )
        model: Any = t.Mask2FormerForUniversalSegmentation(config)
        processor: Any = t.Mask2FormerImageProcessor(**sizes, size_divisor=32, ignore_index=255)
    elif kind == "oneformer":
        config = t.OneFormerConfig(
            backbone_config=t.SwinConfig(**swin), conv_dim=32, text_encoder_width=16, text_encoder_num_layers=1,
            text_encoder_context_length=77, text_encoder_n_ctx=4, text_encoder_vocab_size=64, **small, **LABELS,
        )  # fmt: skip
        model = t.OneFormerForUniversalSegmentation(config)
        processor = t.OneFormerImageProcessor(**sizes, class_info_file=None)
        _tokenizer(folder)
    elif kind == "upernet":
        trunk = t.ConvNextConfig(hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], out_features=stages)
        config = t.UperNetConfig(
            backbone_config=trunk, hidden_size=16, auxiliary_in_channels=16, auxiliary_channels=8, **LABELS
        )
        model = t.UperNetForSemanticSegmentation(config)
        processor = t.SegformerImageProcessor(size={"height": 64, "width": 64}, do_reduce_labels=True)
    else:
        config = t.SegformerConfig(
            hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2],
            decoder_hidden_size=16, **LABELS,
        )  # fmt: skip
        model = t.SegformerForSemanticSegmentation(config)
        processor = t.SegformerImageProcessor(size={"height": 64, "width": 64}, do_reduce_labels=True)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and ("class" in name or "mask_embed" in name or "decoder" in name):
            torch.nn.init.normal_(parameter, std=0.3)  # else one class wins everywhere
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if kind == "oneformer":  # what published configurations name, and nobody can read without the hub
        file = folder / "preprocessor_config.json"
        said = json.loads(file.read_text()) | {"class_info_file": "ade20k_panoptic.json"}
        file.write_text(json.dumps(said | {"repo_path": "shi-labs/oneformer_demo"}))
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: _save(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def _semantic(folder: Path, **given: Any) -> Semantic:
    return Semantic(Semantic.Config(weights=str(folder), **given))


def _map(row: dict[str, Any]) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(row["map"], np.uint8), cv2.IMREAD_UNCHANGED)


def _by_the_library(folder: Path, kind: str, picture: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    import transformers as t

    if kind == "oneformer":
        images = t.OneFormerImageProcessor.from_pretrained(folder, class_info_file=None)
        whole = t.OneFormerProcessor(images, t.CLIPTokenizer.from_pretrained(folder))
        inputs = whole(picture, ["semantic"], return_tensors="pt")
        model: Any = t.OneFormerForUniversalSegmentation.from_pretrained(folder)
    else:
        images = t.AutoImageProcessor.from_pretrained(folder)
        inputs = images(picture, return_tensors="pt")
        auto = t.AutoModelForUniversalSegmentation if kind == "mask2former" else t.AutoModelForSemanticSegmentation
        model = auto.from_pretrained(folder)
    with torch.inference_mode():
        outputs = model.eval()(**inputs)
    return images.post_process_semantic_segmentation(outputs, target_sizes=[shape])[0].numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_gives_the_library_s_labels_and_their_shares(kind: str, saved: dict[str, Path]) -> None:
    row = run(_semantic(saved[kind], side=96, least=0), batch([photo("coffee")])).to_pylist()[0]
    labels = _map(row)
    expected = _by_the_library(saved[kind], kind, item(photo("coffee")).pixels.copy(), labels.shape)
    assert labels.dtype == np.uint8 and labels.shape == (96, 144)
    assert len(np.unique(expected)) > 1, "one class everywhere would prove nothing"
    assert (labels == expected).mean() > 0.999
    areas = [label["area"] for label in row["labels"]]
    assert areas == sorted(areas, reverse=True) and sum(areas) == pytest.approx(1, abs=1e-5)
    first = row["labels"][0]
    assert first["name"] == f"class {first['id']}"
    assert first["area"] == pytest.approx((labels == first["id"]).mean())
    assert row["palette"] == "ade20k"


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_s_map_does_not_depend_on_its_batch(kind: str, saved: dict[str, Path]) -> None:
    annotator = _semantic(saved[kind], side=64)
    files = [photo("astronaut"), photo("coffee"), photo("chelsea"), photo("astronaut")]
    for file, row in zip(files, run(annotator, batch(files)).to_pylist(), strict=True):
        assert (_map(annotator(batch([file])).to_pylist()[0]) == _map(row)).mean() > 0.999  # ties may fall otherwise


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3000), (3000, 1)])
def test_odd_pictures_have_maps_of_their_own_shape(kind: str, height: int, width: int, saved: dict[str, Path]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    row = run(_semantic(saved[kind], side=32), batch([drawn(pixels)])).to_pylist()[0]
    assert _map(row).reshape(map_size(pixels, 32)[::-1]).size <= 4 * 32 * 32
    assert row["labels"]


@pytest.mark.parametrize("kind", KINDS)
def test_runs_in_mixed_precision(kind: str, saved: dict[str, Path]) -> None:
    full, half = (
        _map(run(_semantic(saved[kind], side=64, precision=p), batch([photo("astronaut")])).to_pylist()[0])
        for p in ("fp32", "bf16")
    )
    assert (full == half).mean() > 0.6  # scores of random weights lie close together


def test_small_classes_are_left_out_of_labels(saved: dict[str, Path]) -> None:
    every, some = (
        run(_semantic(saved["segformer"], side=64, least=least), batch([photo("coffee")])).to_pylist()[0]["labels"]
        for least in (0, 0.2)
    )
    assert some == [label for label in every if label["area"] >= 0.2] and len(some) < len(every)


def test_an_empty_batch_and_a_model_of_another_kind(saved: dict[str, Path], tmp_path: Path) -> None:
    from transformers import MaskFormerConfig

    assert run(_semantic(saved["segformer"]), Batch([])).num_rows == 0
    MaskFormerConfig().save_pretrained(tmp_path)
    with pytest.raises(X2IError, match="maskformer"):
        _semantic(tmp_path).setup()


@pytest.mark.parametrize(
    ("kind", "idle", "used"),
    [
        ("upernet", "auxiliary_head", "decode_head.classifier.weight"),
        ("mask2former", "swin.layernorm", "class_predictor.weight"),
        ("oneformer", "swin.layernorm", "task_encoder.task_mlp.layers.0.0.weight"),
    ],
)
def test_only_what_is_never_used_may_be_missing(
    kind: str, idle: str, used: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    files = batch([photo("coffee")])
    lacking = _semantic(changed(saved[kind], tmp_path / "idle", idle), side=32)
    assert run(lacking, files).equals(run(_semantic(saved[kind], side=32), files))
    with pytest.raises(X2IError, match=f"it lacks .*{used}"):
        _semantic(changed(saved[kind], tmp_path / "used", used), side=32).setup()


def test_the_palette_of_ade20k() -> None:
    colours = palette("ade20k")
    assert colours.shape == (150, 3)
    assert {0: (120, 120, 120), 2: (6, 230, 230), 12: (150, 5, 61), 149: (92, 0, 255)}.items() <= {
        i: tuple(map(int, c)) for i, c in enumerate(colours)
    }.items()
    assert len({tuple(c) for c in colours}) == 149  # road and skyscraper share one
    painted = paint(np.array([[0, 12], [149, 255]], np.uint8))
    assert painted.tolist() == [[[120, 120, 120], [150, 5, 61]], [[92, 0, 255], [0, 0, 0]]]
    assert len({tuple(c) for c in palette("hues", 133)}) == 133


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_no_tensor_stays_behind(kind: str, saved: dict[str, Path]) -> None:
    made = _semantic(saved[kind], side=64)
    made.setup()
    with gpu(made._runtime, made._model):
        assert made(batch([photo("astronaut"), photo("coffee")])).num_rows == 2
