"""OmniGen as a pipeline and in the folders of others: the pictures that diffusers draws, and back without loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.model import tiny
from x2i.base.errors import X2IError
from x2i.model import offload
from x2i.model.filling import fill
from x2i.model.omnigen import layouts, writing
from x2i.model.omnigen.layouts import Layout
from x2i.model.omnigen.pipeline import OmniGenPipeline

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 100, 3), dtype=np.uint8))
#: Longer than the published negative sentence: see `test_diffusers_rotates_...`.
LONG = "a red boat on a lake, " * 24
WORDS, EDIT = f"Draw {LONG}", f"<img><|image_1|></img> Make the sky darker over {LONG}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.in_every_layout(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def pipe(home: Path) -> OmniGenPipeline:
    return OmniGenPipeline.from_pretrained(home / "published", device="cpu")


@pytest.fixture(scope="module")
def theirs(home: Path) -> Any:
    pytest.importorskip("torchvision", reason="diffusers' processor of OmniGen needs torchvision")
    import diffusers

    found = diffusers.OmniGenPipeline.from_pretrained(home / "diffusers")
    found.set_progress_bar_config(disable=True)
    return found


def drawn(pipeline: Any, prompt: str, images: list[Image.Image] | None, **options: Any) -> np.ndarray:
    noise = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(3))
    options = {"num_inference_steps": 4, "max_input_image_size": 64, "output_type": "np", "latents": noise} | options
    out: np.ndarray = pipeline(prompt, input_images=images, height=48, width=64, **options).images
    return out


# VectorSpaceLab/OmniGen's own OmniGenPipeline (OmniGen/pipeline.py), opened from the folder that `figures` writes with
# its own loading (strict names, AutoTokenizer, Phi3Config), on transformers 5.23 with its trunk's forward reduced to
# Phi3Model's; float32, no cache, 4 steps, guidance 2.5 and 1.6, seed 3, 48 x 64: every 768th value, mean, deviation
PUBLISHED_PIPELINE = [
    (
        "Draw a red boat",
        (0.40976, 0.51552, 0.47214, 0.0, 0.81045, 0.39739, 0.70331, 0.87825, 0.81653, 0.58437, 0.66915, 1.0),
        (0.564511, 0.285513),
    ),
    (
        "<img><|image_1|></img> darker",
        (0.48413, 0.55585, 0.32106, 0.28659, 0.70302, 0.41151, 0.6961, 0.70575, 0.66428, 0.43947, 0.70881, 0.82361),
        (0.537375, 0.279493),
    ),
]


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published folder with the constants of the published code, and weights that depend on names alone."""
    import diffusers

    folder = tmp_path_factory.mktemp("figures")
    described = tiny.write_vae(folder / "kl")
    autoencoder = diffusers.AutoencoderKL.from_pretrained(folder / "kl")
    fill(autoencoder, 0.2)
    tiny.without_spread(autoencoder)
    autoencoder.save_pretrained(folder / "kl")
    made = tiny.opened(described, words=tiny.bytes_alone(), pos_embed_max_size=192, time_dim=256)
    fill(made.model, 0.2)
    writing.save(made, folder / "published", Layout.PUBLISHED)
    return folder / "published"


@pytest.mark.parametrize(("prompt", "values", "moments"), PUBLISHED_PIPELINE, ids=["words", "image"])
def test_the_picture_is_that_of_the_published_pipeline(
    figures: Path, prompt: str, values: tuple[float, ...], moments: tuple[float, ...]
) -> None:
    pipeline = OmniGenPipeline.from_pretrained(figures, device="cpu")
    y, x = np.mgrid[:70, :100]
    photo = Image.fromarray(np.stack([x * 7 % 256, y * 5 % 256, (x * y) % 256], -1).astype(np.uint8))
    options: dict[str, Any] = {"height": 48, "width": 64, "num_inference_steps": 4, "max_input_image_size": 64}
    generator = torch.Generator().manual_seed(3)
    images = [photo] if "image" in prompt else None
    picture = pipeline(prompt, images, generator=generator, output_type="pt", **options).images
    torch.testing.assert_close(picture.flatten()[::768], torch.tensor(values), atol=3e-5, rtol=0)  # seen: 2e-6
    torch.testing.assert_close(torch.stack([picture.mean(), picture.std()]), torch.tensor(moments), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", ["published", "diffusers", "x2i"])
@pytest.mark.parametrize(("prompt", "images"), [(WORDS, None), (EDIT, [PHOTO])], ids=["words", "image"])
def test_the_picture_is_that_of_diffusers(
    home: Path, theirs: Any, layout: str, prompt: str, images: list[Image.Image] | None
) -> None:
    ours = OmniGenPipeline.from_pretrained(home / layout, device="cpu")
    negative = ours.processor.NEGATIVE  # of a checkpoint of ours the default is another
    reference = drawn(theirs, prompt, images)
    difference = np.abs(reference - drawn(ours, prompt, images, negative_prompt=negative)).max()
    assert reference.shape == (1, 48, 64, 3) and reference.std() > 0.1
    assert difference < 1e-5  # of a range of 1; seen: 1.0e-6


def test_a_seeded_generator_gives_the_picture_of_diffusers_too(pipe: OmniGenPipeline, theirs: Any) -> None:
    both = [
        drawn(p, EDIT, [PHOTO], latents=None, output_type="pil", generator=torch.Generator().manual_seed(9))[0]
        for p in (pipe, theirs)
    ]
    levels = np.abs(np.asarray(both[0], int) - np.asarray(both[1], int))
    assert both[0].size == (64, 48) and levels.max() <= 1 and (levels > 0).mean() < 0.01


def test_diffusers_rotates_every_row_by_the_positions_of_the_first(pipe: OmniGenPipeline, theirs: Any) -> None:
    """Its rotary embedding (0.42) keeps row 0 of the batch. A prompt shorter than the negative one is padded on the
    left, and the negative row then gets the padding's positions. Row by row it draws our picture, as the published code does.
    """
    transformer = theirs.transformer
    together = transformer.forward

    def row_by_row(hidden_states: Any, timestep: Any, input_ids: Any, **given: Any) -> tuple[torch.Tensor]:
        out = [
            together(
                hidden_states[i : i + 1],
                timestep[i : i + 1],
                input_ids[i : i + 1],
                input_img_latents=[],
                input_image_sizes={},
                attention_mask=given["attention_mask"][i : i + 1],
                position_ids=given["position_ids"][i : i + 1],
                return_dict=False,
            )[0]
            for i in range(len(hidden_states))
        ]
        return (torch.cat(out),)

    short = "Draw a red boat"
    ours, reference = drawn(pipe, short, None), drawn(theirs, short, None)
    transformer.forward = row_by_row
    try:
        apart = drawn(theirs, short, None)
    finally:
        transformer.forward = together
    assert np.abs(ours - apart).max() < 1e-5  # seen: 1e-6
    assert np.abs(ours - reference).max() > 1e-3  # seen: 7e-3


def test_the_transformer_alone_opens_too(home: Path, pipe: OmniGenPipeline) -> None:
    import diffusers

    found = diffusers.OmniGenTransformer2DModel.from_pretrained(home / "transformer")
    again = layouts.open_model(home / "transformer", with_vae=False)
    assert found.config.num_layers == pipe.model.config.layers
    tiny.same(again.model.state_dict(), pipe.model.state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {"separate_cfg_infer": False},
        {"use_kv_cache": False},
        {"separate_cfg_infer": False, "use_kv_cache": False},
        {"offload_kv_cache": True},
        {"offload_model": True},
    ],
    ids=str,
)
def test_every_way_to_compute_draws_the_same_picture(pipe: OmniGenPipeline, options: dict[str, bool]) -> None:
    assert np.abs(drawn(pipe, EDIT, [PHOTO]) - drawn(pipe, EDIT, [PHOTO], **options)).max() < 1e-5


def test_offloaded_layers_are_fetched_one_at_a_time(pipe: OmniGenPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    def told(kind: type, word: str) -> None:
        plain: Callable[..., None] = kind.__call__  # type: ignore[operator]

        def call(self: Any, module: Any, *given: Any) -> None:
            log.append(f"{word} {offload.layers_of(pipe.model).index(module)}")
            plain(self, module, *given)

        monkeypatch.setattr(kind, "__call__", call)

    told(offload._Fetch, "fetch")
    told(offload._Return, "return")
    drawn(pipe, WORDS, None, offload_model=True, num_inference_steps=1, guidance_scale=1)
    once = ["fetch 0", "return 0", "fetch 1", "return 1"]
    assert log == once * 2  # the condition, and the step
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in offload.layers_of(pipe.model))


def test_a_batch_draws_what_its_prompts_draw_alone(pipe: OmniGenPipeline) -> None:
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt", "seed": 5}
    both = pipe(["Draw a boat", "<img><|image_1|></img> darker"], [None, [PHOTO]], max_input_image_size=32, **options)
    first = pipe("Draw a boat", **options).images
    assert both.images.shape == (2, 3, 32, 32) and both.images.min() >= 0 and both.images.max() <= 1
    torch.testing.assert_close(both.images[:1], first, atol=1e-5, rtol=1e-4)


def test_generate_places_the_images_and_takes_their_size(pipe: OmniGenPipeline, tmp_path: Path) -> None:
    PHOTO.save(tmp_path / "photo.png")
    options = {"num_inference_steps": 1, "max_input_image_size": 64, "use_input_image_size_as_output": True}
    picture = pipe.generate("Make the sky darker", [tmp_path / "photo.png"], **options)
    named = pipe("<img><|image_1|></img> Make the sky darker", [np.asarray(PHOTO)], **options).images[0]
    assert picture.size == (64, 32)  # 100 x 70, scaled to 64 x 45, cut to whole tokens
    assert picture.tobytes() == named.tobytes()
    several = pipe.generate("As one", [PHOTO, PHOTO, PHOTO], height=16, width=32, num_inference_steps=1)
    assert several.size == (32, 16)


def test_without_image_guidance_words_and_images_are_weighed_together(pipe: OmniGenPipeline) -> None:
    joint = drawn(pipe, EDIT, [PHOTO], use_img_guidance=False, guidance_scale=3.0)
    assert np.array_equal(joint, drawn(pipe, EDIT, [PHOTO], img_guidance_scale=3.0, guidance_scale=3.0))
    assert np.abs(joint - drawn(pipe, EDIT, [PHOTO])).max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "x", "height": 20}, "height 20: must be a multiple of 16"),
        ({"prompt": ["a", "b"], "input_images": [[PHOTO]]}, "2 prompts, but input images for 1"),
        ({"prompt": "x", "input_images": [PHOTO]}, "must name every image"),
        ({"prompt": "x", "use_input_image_size_as_output": True}, "one prompt with one input image"),
        ({"prompt": "x <|image_1|>", "input_images": ["missing.png"]}, "missing.png: cannot be opened"),
        ({"prompt": "x", "latents": torch.zeros(1, 4, 2, 2)}, r"expected \[1, 4, 6, 8\]"),
        ({"prompt": "x", "output_type": "jpeg"}, "expected pil, np or pt"),
    ],
)
def test_what_does_not_fit_is_said(pipe: OmniGenPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(X2IError, match=message):
        pipe(**({"height": 48, "width": 64, "num_inference_steps": 1, "max_input_image_size": 64} | arguments))
