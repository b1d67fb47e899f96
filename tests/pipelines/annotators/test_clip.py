"""`clip` and `clip_text`: against open_clip called directly on the same weights, on real photographs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import torch
from open_clip.pretrained import get_pretrained_cfg
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.pipelines.annotating import batch, drawn, photo, rows, run
from tests.pipelines.annotators.clips import tiny
from tests.pipelines.annotators.devices import gpu
from x2i.base.errors import X2IError
from x2i.pipelines.annotators import _clip
from x2i.pipelines.annotators._clip import Clip, ClipConfig, Shape, named
from x2i.pipelines.annotators.clip import ClipAnnotator
from x2i.pipelines.annotators.clip_text import ClipText, ClipTextConfig

CAPTIONS = ["an astronaut in an orange suit", "a cat", None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> tuple[Any, Any, Any]:
    """The model, its transform and its tokenizer, as a user of open_clip gets them."""
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    return model.eval(), transform, open_clip.get_tokenizer(f"local-dir:{folder}")


@pytest.fixture(scope="module")
def annotated(folder: Path) -> tuple[ClipAnnotator, pa.Table]:
    made = ClipAnnotator(ClipConfig(weights=str(folder)))
    return made, run(made, batch([photo("astronaut"), photo("chelsea"), photo("coffee")], CAPTIONS))


def matrix(table: pa.Table, column: str = "embedding") -> np.ndarray:
    return np.array(table[column].to_pylist(), np.float32)


def test_open_clip_itself_says_the_same(annotated: tuple[ClipAnnotator, pa.Table], reference: Any) -> None:
    _, table = annotated
    model, transform, tokenizer = reference
    names = ("astronaut", "chelsea", "coffee")
    with torch.no_grad():
        x = torch.stack([transform(Image.open(io.BytesIO(photo(n))).convert("RGB")) for n in names])
        images = model.encode_image(x, normalize=True).numpy()
        texts = model.encode_text(tokenizer(CAPTIONS[:2]), normalize=True).numpy()
    assert np.abs(matrix(table) - images).max() < 1e-3  # fp16, and JPEG by another decoder
    similarity = table["similarity"].to_pylist()
    assert similarity[2] is None
    assert similarity[:2] == pytest.approx(list((images[:2] * texts).sum(1)), abs=1e-3)
    assert abs(similarity[0] - similarity[1]) > 0.01  # not all alike, so that a mix-up would show


def test_embeddings_have_length_one_in_fp16(annotated: tuple[ClipAnnotator, pa.Table]) -> None:
    made, table = annotated
    assert table["embedding"].type == pa.list_(pa.float16(), 24)
    assert np.abs(np.linalg.norm(matrix(table), axis=1) - 1).max() < 2e-3
    assert made.shorter_side == 64 and made.heavy == {"embedding"} and made.reads == ("rows.text",)


def test_a_batch_says_what_its_rows_say(annotated: tuple[ClipAnnotator, pa.Table]) -> None:
    made, together = annotated
    files = [photo("astronaut"), photo("chelsea"), photo("coffee")]
    alone = pa.concat_tables([made(batch([f], [t])) for f, t in zip(files, CAPTIONS, strict=True)])
    assert np.abs(matrix(alone) - matrix(together)).max() < 1e-3
    assert alone["similarity"].to_pylist()[:2] == pytest.approx(together["similarity"].to_pylist()[:2], abs=1e-3)
    nothing = made(batch([]))
    assert nothing.num_rows == 0 and nothing.cast(made.columns).schema == made.columns


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
def test_odd_pictures(annotated: tuple[ClipAnnotator, pa.Table], size: tuple[int, int]) -> None:
    made, _ = annotated
    grey = np.full((*size, 3), 99, np.uint8)
    table = made(batch([drawn(grey), photo("camera")], ["", "  "]))
    assert np.isfinite(matrix(table)).all()
    assert table["similarity"].to_pylist() == [None, None]  # a caption that says nothing is none


@pytest.mark.parametrize("turned", [False, True])
def test_long_pictures_are_prepared_as_open_clip_does(
    annotated: tuple[ClipAnnotator, pa.Table], reference: Any, turned: bool
) -> None:
    wide = np.array(Image.open(io.BytesIO(photo("coffee"))).convert("RGB"))[200:205, :601]  # 120 to 1
    wide = np.ascontiguousarray(wide.swapaxes(0, 1)) if turned else wide
    ours, theirs = annotated[0]._clip.prepare(wide), reference[1](Image.fromarray(wide))
    assert ours.shape == theirs.shape == (3, 64, 64)
    difference = (ours - theirs).abs() * 0.27 * 255  # in levels
    assert float(difference.max()) < 5 and float(difference.mean()) < 0.5


def test_a_long_side_that_must_fit_whole(tmp_path: Path) -> None:
    made = ClipAnnotator(ClipConfig(weights=str(tiny(tmp_path, preparation={"resize_mode": "longest"}))))
    table = run(made, batch([drawn(np.full((1, 5000, 3), 9, np.uint8)), photo("chelsea")]))
    assert np.isfinite(matrix(table)).all()


def test_a_stored_embedding_and_a_text_column_give_the_same_similarity(
    folder: Path, annotated: tuple[ClipAnnotator, pa.Table]
) -> None:
    _, table = annotated
    made = ClipText(ClipTextConfig(weights=str(folder)))
    assert made.reads == ("caption.long", "clip.embedding") and made.needs == "row"
    columns = {"clip.embedding": table["embedding"], "caption.long": pa.array(CAPTIONS, pa.string())}
    found = run(made, rows([None] * 3, columns))["similarity"].to_pylist()
    assert found[2] is None and found[:2] == pytest.approx(table["similarity"].to_pylist()[:2], abs=1e-5)
    gaps = table["embedding"].to_pylist()
    columns["clip.embedding"] = pa.array([None, gaps[1], gaps[2]], table["embedding"].type)
    assert made(rows([None] * 3, columns))["similarity"].to_pylist() == [None, pytest.approx(found[1]), None]
    captions = ClipText(ClipTextConfig(weights=str(folder), text="rows.text"))
    again = run(captions, rows(CAPTIONS, {"clip.embedding": table["embedding"]}))
    assert again["similarity"].to_pylist()[:2] == pytest.approx(found[:2], abs=1e-5)
    empty = {"clip.embedding": pa.array([], table["embedding"].type)}
    assert captions(rows([], empty)).num_rows == 0
    wrong = {"clip.embedding": pa.array([[0.0] * 9] * 3, pa.list_(pa.float16(), 9))}
    with pytest.raises(X2IError, match="width 9"):
        captions(rows(CAPTIONS, wrong))


def test_half_precision_says_nearly_the_same(folder: Path, annotated: tuple[ClipAnnotator, pa.Table]) -> None:
    half = run(ClipAnnotator(ClipConfig(weights=str(folder), precision="bf16")), batch([photo("astronaut")], ["cat"]))
    difference = np.abs(matrix(half) - matrix(annotated[1])[:1]).max()
    assert 0 < difference < 0.03


def test_long_texts_are_cut(annotated: tuple[ClipAnnotator, pa.Table]) -> None:
    clip = annotated[0]._clip
    same = clip.texts(["cat " * 80, "cat " * 300])
    assert np.abs(same[0] - same[1]).max() < 1e-6


def test_bin_and_safetensors_are_alike(annotated: tuple[ClipAnnotator, pa.Table], tmp_path: Path) -> None:
    table = run(ClipAnnotator(ClipConfig(weights=str(tiny(tmp_path, binary=True)))), batch([photo("astronaut")]))
    assert np.abs(matrix(table) - matrix(annotated[1])[:1]).max() < 1e-3


def test_quickgelu_follows_the_folder(annotated: tuple[ClipAnnotator, pa.Table], tmp_path: Path) -> None:
    other = run(ClipAnnotator(ClipConfig(weights=str(tiny(tmp_path, quick_gelu=False)))), batch([photo("astronaut")]))
    assert np.abs(matrix(other) - matrix(annotated[1])[:1]).max() > 2e-3


def test_a_checkpoint_file_and_what_its_tag_says(
    folder: Path, annotated: tuple[ClipAnnotator, pa.Table], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    plain = {**architecture, "quick_gelu": False}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-L-14", plain)  # the name, small: the tags stay
    path = str(folder / "open_clip_model.safetensors")
    shape = Shape(24, 64)
    with pytest.raises(X2IError, match="set `tag`"):
        Clip(ClipConfig(weights=path), shape)
    pictures = [i.pixels for i in batch([photo("astronaut")]) if i.pixels is not None]
    openai = Clip(ClipConfig(weights=path, tag="openai"), shape).images(pictures)
    custom = Clip(ClipConfig(weights=path, tag="custom"), shape).images(pictures)
    assert np.abs(openai - matrix(annotated[1])[:1]).max() < 1e-3  # QuickGELU, though ViT-L-14 does not say so
    assert np.abs(custom - matrix(annotated[1])[:1]).max() > 2e-3
    with pytest.raises(X2IError, match="width 24.*of 768"):
        Clip(ClipConfig(weights=path, tag="openai"), Shape(768, 224))


@pytest.mark.parametrize("weights", ["openai", "timm/vit_large_patch14_clip_224.openai"])
def test_a_folder_fetched_for_a_tag_gets_the_tag_s_activation(
    annotated: tuple[ClipAnnotator, pa.Table], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    place = tiny(tmp_path / "hub")
    config = json.loads((place / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = False
    (place / "open_clip_config.json").write_text(json.dumps(config))
    monkeypatch.setattr(_clip.Weights, "fetch", lambda self: place)  # as if openai's repository had come
    pictures = [i.pixels for i in batch([photo("astronaut")]) if i.pixels is not None]
    assert (
        np.abs(Clip(ClipConfig(weights=weights), Shape(24, 64)).images(pictures) - matrix(annotated[1])[:1]).max()
        < 1e-3
    )


def test_weights_by_tag_and_widths_without_loading() -> None:
    default = ClipAnnotator(ClipConfig())
    assert default.columns.field("embedding").type.list_size == 768 and default.shorter_side == 224
    entry = get_pretrained_cfg("ViT-L-14", "openai")
    assert default.weights()[0].spec == entry["hf_hub"].rstrip("/") and entry["quick_gelu"]
    small = ClipConfig(model="ViT-B-32", weights="laion2b_s34b_b79k")
    assert ClipAnnotator(small).columns.field("embedding").type.list_size == 512
    assert named(small).spec.startswith("laion/CLIP-ViT-B-32-laion2B-s34B-b79K")
    assert named(ClipConfig(weights="laion/some@main")).spec == "laion/some@main"
    with pytest.raises(X2IError, match="its tags are: openai"):
        named(ClipConfig(weights="nonsense"))
    with pytest.raises(X2IError, match="ViT-L-14"):
        ClipAnnotator(ClipConfig(model="ViT-L14"))


def test_a_broken_folder_says_so(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
    made = ClipAnnotator(ClipConfig(weights=str(tmp_path)))
    with pytest.raises(X2IError, match="cannot be loaded"):
        made.setup()
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"cut")
    with pytest.raises(X2IError, match="cannot be loaded"):
        made.setup()
    state = load_file(folder / "open_clip_model.safetensors")
    del state["visual.proj"]
    save_file(state, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(X2IError, match=r"cannot be loaded(?s:.*)visual\.proj"):
        made.setup()


def test_on_a_gpu_no_tensor_stays_behind(folder: Path) -> None:
    made = ClipAnnotator(ClipConfig(weights=str(folder)))
    made.setup()
    inputs = [made._clip.prepare(i.pixels) for i in batch([photo("astronaut")]) if i.pixels is not None]
    with gpu(made._clip._runtime, made._clip._model), mock.patch.object(made._clip, "prepare", return_value=inputs[0]):
        assert made(batch([photo("astronaut"), photo("coffee")], ["a cup", None])).num_rows == 2
