"""`erase`: objects of photographs, by masks and by boxes, filled by OpenCV and by a pipeline of real architecture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.pipelines.annotating import batch, item, photo, run
from x2i.base.errors import X2IError
from x2i.pipelines.annotators.base import Batch
from x2i.pipelines.annotators.erase import Erase, EraseConfig
from x2i.pipelines.images import decode, read_header

coco = pytest.importorskip("pycocotools.mask")

#: The cup and the spoon of the photograph `coffee`, by eye, as shares.
CUP, SPOON = [0.28, 0.04, 0.69, 0.78], [0.535, 0.595, 0.685, 0.825]


def ellipse(size: tuple[int, int], box: list[float]) -> np.ndarray:
    """A filled ellipse in a box of shares: bool [height, width]."""
    width, height = size
    (x1, y1), (x2, y2) = ([box[i] * width, box[i + 1] * height] for i in (0, 2))
    y, x = np.mgrid[:height, :width] + 0.5
    return ((x - (x1 + x2) / 2) / (x2 - x1) * 2) ** 2 + ((y - (y1 + y2) / 2) / (y2 - y1) * 2) ** 2 <= 1


def code(mask: np.ndarray) -> dict[str, Any]:
    made = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(made["size"]), "counts": made["counts"].decode("ascii")}


def asked(name: str, objects: list[tuple[str, list[float]]], scale: float = 1.0) -> Batch:
    """A photograph with phrases, their boxes, and elliptic masks at another scale."""
    pixels = item(photo(name)).pixels
    assert pixels is not None
    size = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
    columns: dict[str, Any] = {
        "grounding.boxes": [[box for _, box in objects]],
        "grounding.phrases": [[phrase for phrase, _ in objects]],
        "masks.masks": [[code(ellipse(size, box)) for _, box in objects]],
        "masks.box_index": [list(range(len(objects)))],
    }
    return batch([photo(name)], columns=columns)


def erased(given: Batch, **config: Any) -> dict[str, Any]:
    (row,) = run(Erase(EraseConfig(**config)), given).to_pylist()
    return dict(row)


def opened(data: bytes) -> np.ndarray:
    return decode(data, read_header(data))


@pytest.mark.parametrize("method", ["telea", "ns"])
def test_the_object_is_gone_and_all_else_is_as_it_was(method: str) -> None:
    given = asked("coffee", [("a spoon", SPOON)], scale=0.5)
    row = erased(given, method=method)
    before = given[0].pixels
    assert before is not None
    after, white = opened(row["image"]), opened(row["mask"])[..., 0]
    assert (row["status"], row["phrase"], row["index"], row["by"]) == ("erased", "a spoon", [0], f"opencv {method}")
    inside = ellipse(before.shape[1::-1], SPOON)
    assert row["area"] == pytest.approx(inside.mean(), rel=0.05)
    assert set(np.unique(white)) == {0, 255}
    assert (white[inside] == 255).mean() > 0.99  # the hole covers it, with a rim
    assert (white > 0).mean() < 1.6 * inside.mean()
    difference = np.abs(after.astype(int) - before).max(axis=2)
    assert difference[white == 0].mean() < 4  # only JPEG
    assert difference[inside].mean() > 15
    spoon, filled = (p[inside].mean(axis=0) for p in (before, after))
    assert spoon[1] / spoon[0] > 0.55 and filled[1] / filled[0] < 0.35  # grey metal, then the red of the saucer


def test_only_the_part_round_the_hole_is_looked_at_and_that_changes_nothing() -> None:
    from x2i.pipelines.annotators.erase import _carried

    picture = opened(photo("chelsea"))
    hole = ellipse(picture.shape[1::-1], [0.3, 0.3, 0.4, 0.5])
    whole = cv2.inpaint(picture, hole.astype(np.uint8), 4.0, cv2.INPAINT_TELEA)
    assert np.array_equal(_carried(picture, hole, 4.0, cv2.INPAINT_TELEA), whole)


def test_what_is_too_large_or_cut_off_by_the_edge_stays() -> None:
    objects = [("a cup", CUP), ("a corner", [0.0, 0.6, 0.1, 1.0]), ("a crumb", [0.9, 0.9, 0.91, 0.92])]
    assert erased(asked("coffee", objects)) == dict.fromkeys(Erase.columns.names) | {"status": "none_fits"}
    assert erased(asked("coffee", [*objects, ("a spoon", SPOON)]))["index"] == [3]
    assert erased(asked("coffee", objects), area=(0.1, 0.5))["phrase"] == "a cup"
    assert erased(asked("coffee", []))["status"] == "no_boxes"


def test_all_boxes_of_a_phrase_go_together() -> None:
    other = [0.05, 0.4, 0.2, 0.6]
    row = erased(asked("coffee", [("spoons", SPOON), ("a cup", CUP), ("spoons", other)]))
    assert row["index"] == [0, 2]
    white = opened(row["mask"])[..., 0] > 0
    size = (white.shape[1], white.shape[0])
    assert white[ellipse(size, SPOON)].all() and white[ellipse(size, other)].all()


def test_boxes_alone_with_a_noun_if_there_is_one_only() -> None:
    config: dict[str, Any] = {"boxes": "faces.boxes", "phrases": None, "noun": "face", "masks": None}
    face = [0.36, 0.12, 0.52, 0.36]
    row = erased(batch([photo("astronaut")], columns={"faces.boxes": [[face]]}), **config)
    white = opened(row["mask"])[..., 0] > 0
    height, width = white.shape
    x1, y1, x2, y2 = (round(s * n) for s, n in zip(face, (width, height) * 2, strict=True))
    assert white[y1:y2, x1:x2].all() and row["phrase"] == "face"
    two = batch([photo("astronaut")], columns={"faces.boxes": [[face, [0.6, 0.6, 0.7, 0.7]]]})
    assert erased(two, **config)["status"] == "none_fits"


def test_which_object_goes_depends_on_the_image_alone() -> None:
    objects = [("a spoon", SPOON), ("a thing", [0.05, 0.4, 0.2, 0.6]), ("a mark", [0.4, 0.88, 0.6, 0.98])]
    given = asked("coffee", objects)
    annotator = Erase(EraseConfig())
    drawn = []
    for number in range(12):
        given[0].image_id = f"{number:064x}"
        drawn.append(annotator(given).to_pylist()[0])
    assert len({r["phrase"] for r in drawn}) == 3
    given[0].image_id = f"{5:064x}"
    assert annotator(given).to_pylist()[0] == drawn[5]


def test_large_pictures_are_kept_smaller() -> None:
    row = erased(asked("coffee", [("a spoon", SPOON)]), side=300)
    assert max(opened(row["image"]).shape[:2]) == 300
    assert opened(row["image"]).shape == opened(row["mask"]).shape


def test_a_configuration_without_names_is_refused() -> None:
    with pytest.raises(ValueError, match="noun"):
        EraseConfig(phrases=None)
    assert Erase(EraseConfig()).weights() == []
    (weights,) = Erase(EraseConfig(backend="diffusers")).weights()
    assert weights.licence and weights.size
    assert Erase(EraseConfig(phrases=None, noun="face", masks=None, boxes="faces.boxes")).reads == ("faces.boxes",)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion's inpainting pipeline, tiny and random, as `save_pretrained` leaves it."""
    diffusers = pytest.importorskip("diffusers")
    import torch
    import transformers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipeline")
    alphabet = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = [*alphabet, *(f"{c}</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    text = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(pieces),
        max_position_embeddings=77, bos_token_id=len(pieces) - 2, eos_token_id=len(pieces) - 1,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=9, out_channels=4, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16, 16), norm_num_groups=8, latent_channels=4, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionInpaintPipeline(
        vae, transformers.CLIPTextModel(text), tokenizer, unet, diffusers.DDIMScheduler(steps_offset=1), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "sd")
    return folder / "sd"


def model(path: Path, **config: Any) -> dict[str, Any]:
    return {"backend": "diffusers", "weights": str(path), "size": 64, "steps": 2, **config}


def test_a_diffusers_pipeline_fills_the_hole_and_nothing_else(tiny: Path) -> None:
    given = asked("coffee", [("a spoon", SPOON)])
    row = erased(given, **model(tiny))
    assert row["by"] == f"diffusers {tiny}"
    before, after, white = given[0].pixels, opened(row["image"]), opened(row["mask"])[..., 0] > 0
    assert before is not None
    difference = np.abs(after.astype(int) - before).max(axis=2)
    assert difference[~white].mean() < 4 and difference[white].mean() > 20
    again = erased(given, **model(tiny))
    assert again == row  # seeded by the image
    assert erased(given, **model(tiny, prompt="zzz"))["image"] != row["image"]
    given[0].image_id = "1" * 64
    assert erased(given, **model(tiny))["image"] != row["image"]


def test_a_picture_that_the_safety_checker_refuses_is_none(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    annotator = Erase(EraseConfig(**model(tiny)))
    annotator.setup()
    monkeypatch.setattr(annotator._pipeline.pipeline, "run_safety_checker", lambda image, *_: (image, [True]))
    assert annotator(asked("coffee", [("a spoon", SPOON)])).to_pylist()[0]["status"] == "flagged"


def test_a_pipeline_that_is_not_whole_is_refused(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(X2IError, match="no model_index.json"):
        Erase(EraseConfig(**model(tmp_path))).setup()
    broken = tmp_path / "sd"
    shutil.copytree(tiny, broken)
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state.pop("conv_in.weight")
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(X2IError, match=r"no whole UNet2DConditionModel: it lacks conv_in\.weight"):
        Erase(EraseConfig(**model(broken))).setup()
