"""OmniGen as a pipeline and in the folders of others: the pictures that diffusers draws, and back without loss."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.model import tiny
from x2i.base.errors import X2IError
from x2i.model import lora, offload, weights
from x2i.model.base import Request
from x2i.model.config import AutoencoderKLConfig, PixelsConfig
from x2i.model.filling import fill
from x2i.model.lora_config import LoRAConfig
from x2i.model.omnigen import layouts, published, writing
from x2i.model.omnigen.config import PRESETS
from x2i.model.omnigen.layouts import Layout
from x2i.model.omnigen.pipeline import OmniGenPipeline
from x2i.trainer import checkpoint

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 100, 3), dtype=np.uint8))
#: Longer than the published negative sentence: see `test_diffusers_rotates_...`.
LONG = "a red boat on a lake, " * 24
WORDS, EDIT = f"Draw {LONG}", f"<img><|image_1|></img> Make the sky darker over {LONG}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in every layout, each in a folder of the layout's name."""
    folder = tmp_path_factory.mktemp("layouts")
    made = tiny.opened(tiny.write_vae(folder / "kl"))
    for layout in Layout:
        writing.save(made, folder / layout.value, layout)
    return folder


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
    same(again.model.state_dict(), pipe.model.state_dict())


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


@pytest.mark.parametrize("layout", list(Layout))
def test_every_layout_gives_back_the_model(home: Path, layout: Layout) -> None:
    found = layouts.open_model(home / layout.value)
    made = tiny.opened(AutoencoderKLConfig(kind="autoencoder_kl", weights=str(home / "kl")))
    assert found.layout is layout and found.model.config == made.model.config
    same(found.model.state_dict(), made.model.state_dict())
    assert found.tokenizer.to_str() == made.tokenizer.to_str()
    assert found.described.resolution == 64


@pytest.mark.parametrize("layout", [Layout.PUBLISHED, Layout.DIFFUSERS])
def test_folders_that_others_wrote_open_without_our_file(home: Path, tmp_path: Path, layout: Layout) -> None:
    copy = copied(home / layout.value, tmp_path / "theirs")
    (copy / "x2i.json").unlink()
    found = layouts.open_model(copy)
    # the table of positions is read, so what it was computed from does not matter
    assert found.model.config == tiny.numbers(4) and found.described.max_text_tokens is None
    assert isinstance(found.described.vae, AutoencoderKLConfig) and found.described.vae.weights == str(copy / "vae")
    same(found.model.state_dict(), layouts.open_model(home / "x2i", with_vae=False).model.state_dict())


def test_sharded_weights_open(home: Path, tmp_path: Path) -> None:
    for layout, inner, stem in (("published", "", "model"), ("diffusers", "transformer", layouts.DIFFUSERS)):
        copy = copied(home / layout, tmp_path / layout)
        file = copy / inner / f"{stem}.safetensors"
        state = weights.read(file)
        file.unlink()
        where = {name: f"{stem}-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(state)}
        for shard in set(where.values()):
            save_file({n: t for n, t in state.items() if where[n] == shard}, file.with_name(shard))
        file.with_name(f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        found = layouts.open_model(copy, with_vae=False)
        same(found.model.state_dict(), layouts.open_model(home / layout, with_vae=False).model.state_dict())


def test_a_hub_id_takes_the_same_path(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cache, commit = tmp_path / "models--tiny--omnigen", "a" * 40
    (cache / "snapshots").mkdir(parents=True)
    copied(home / "published", cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    found = OmniGenPipeline.from_pretrained("tiny/omnigen", device="cpu", torch_dtype=torch.bfloat16)
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16}
    picture = found.generate("Draw", height=16, width=16, num_inference_steps=1)
    assert picture.size == (16, 16)


def test_the_published_numbers_are_read_from_the_published_file() -> None:
    ours = PRESETS["omnigen-3.8b"]
    shapes = {
        "x_embedder.proj.weight": (3072, 4, 2, 2),
        "pos_embed": (1, 36864, 3072),
        "time_token.mlp.0.weight": (3072, 256),
    }
    written = published.to_phi3(ours)
    old = written | {"rope_scaling": written["rope_scaling"] | {"type": "su"}}  # as transformers 4.38 wrote it
    new = {k: v for k, v in written.items() if k not in ("rope_scaling", "rope_theta")}  # as transformers 5 does
    new["rope_parameters"] = written["rope_scaling"] | {"rope_type": "longrope", "rope_theta": 10_000.0}
    for numbers in (written, old, new):
        assert published.from_phi3(numbers, shapes, "config.json") == ours
    assert published.from_transformer(published.to_transformer(ours), "config.json") == ours
    assert published.unusual(ours) == []
    without = ours.model_copy(update={"rope_scaling": None})
    assert published.from_transformer(published.to_transformer(without), "config.json") == without


def test_our_config_of_phi3_is_what_transformers_reads(home: Path) -> None:
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(home / "published")
    ours = tiny.numbers(4)
    assert (found.model_type, found.hidden_size, found.num_hidden_layers) == ("phi3", ours.hidden_size, ours.layers)
    assert found.rope_parameters["rope_type"] == "longrope"
    assert found.rope_parameters["long_factor"] == list(tiny.ROPE.long_factor)


def test_the_tokenizer_opens_in_transformers_with_the_same_ids(home: Path) -> None:
    from transformers import AutoTokenizer

    text = f"<|user|>\n{EDIT}, très joli 漢<|end|>\n<|assistant|>\n<|diffusion|>"
    for folder in (home / "published", home / "diffusers" / "tokenizer"):
        found = AutoTokenizer.from_pretrained(folder)
        assert found(text).input_ids == tiny.tokenizer().encode(text).ids


def test_a_checkpoint_of_ours_is_one_to_the_trainer_too(home: Path) -> None:
    loaded = checkpoint.load_model(home / "x2i")
    assert loaded.painter.token_side == 16
    same(loaded.model.state_dict(), layouts.open_model(home / "published").model.state_dict())


def test_averaged_weights_are_the_ones_that_count(home: Path, tmp_path: Path) -> None:
    copy = copied(home / "x2i", tmp_path / "x2i")
    state = {n: t * 2 for n, t in weights.read(copy / "model.safetensors").items()}
    weights.save(state, copy / "ema.safetensors")
    same(layouts.open_model(copy).model.state_dict(), state)


def test_adapters_are_attached_merged_and_taken_away(home: Path, tmp_path: Path) -> None:
    pipeline = OmniGenPipeline.from_pretrained(home / "published", device="cpu")
    before = drawn(pipeline, WORDS, None)
    config = LoRAConfig(rank=2, targets=("qkv_proj", "o_proj"))
    lora.attach(pipeline.model, config)
    with torch.no_grad():
        for layer in lora.adapters(pipeline.model).values():
            layer.lora_B.weight.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    lora.save_adapter(pipeline.model, tmp_path / "adapter")
    wanted = drawn(pipeline, WORDS, None)
    assert np.abs(wanted - before).max() > 1e-3
    with pytest.raises(X2IError, match="merge them"):
        pipeline.save_pretrained(tmp_path / "out")
    assert np.array_equal(drawn(pipeline.unload_lora(), WORDS, None), before)
    merged = drawn(pipeline.load_lora(tmp_path / "adapter", merge=True), WORDS, None)
    assert np.abs(merged - wanted).max() < 1e-4
    pipeline.save_pretrained(tmp_path / "out")
    again = OmniGenPipeline.from_pretrained(tmp_path / "out", device="cpu")
    assert np.array_equal(drawn(again, WORDS, None), merged)


def test_pixels_cannot_go_to_diffusers_pipeline_but_the_rest_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = tiny.opened()
    with pytest.raises(X2IError, match="the layout `transformer`"):
        writing.save(made, tmp_path / "diffusers", Layout.DIFFUSERS)
    assert not list(tmp_path.iterdir())
    writing.save(made, tmp_path / "transformer", Layout.TRANSFORMER)
    with caplog.at_level(logging.WARNING):
        writing.save(made, tmp_path / "published", Layout.PUBLISHED)
    assert "in_channels 12, not 4" in caplog.text
    found = layouts.open_model(tmp_path / "published")
    assert found.described.vae == PixelsConfig(factor=2)
    same(found.model.state_dict(), made.model.state_dict())


def test_the_text_head_is_left_out_for_others_and_kept_for_us(tmp_path: Path) -> None:
    made = tiny.opened(text_head=True)
    for layout in (Layout.PUBLISHED, Layout.TRANSFORMER, Layout.X2I):
        writing.save(made, tmp_path / layout.value, layout)
    silent = layouts.open_model(tmp_path / "published").model
    assert not silent.config.text_head and "lm_head.weight" not in silent.state_dict()
    assert not layouts.open_model(tmp_path / "transformer").model.config.text_head
    speaking = layouts.open_model(tmp_path / "x2i").model
    same(speaking.state_dict(), made.model.state_dict())


def test_another_trunk_is_no_published_omnigen(tmp_path: Path) -> None:
    made = tiny.opened(trunk="llama", rope_scaling=None)
    for layout in (Layout.PUBLISHED, Layout.TRANSFORMER):
        with pytest.raises(X2IError, match="plain Phi-3 trunk; this model's is llama"):
            writing.save(made, tmp_path / "out", layout)
    writing.save(made, tmp_path / "x2i", Layout.X2I)
    found = layouts.open_model(tmp_path / "x2i")
    with torch.no_grad():
        requests = [Request("Draw")]
        shown = [OmniGenPipeline(o).processor.requests(requests) for o in (made, found)]
        x, t = torch.randn(1, 12, 4, 4), torch.tensor([0.3])
        outs = [m.model(x, t, inputs) for m, inputs in zip((made, found), shown, strict=True)]
    assert torch.equal(*outs)


def test_folders_that_are_no_omnigen_are_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(X2IError, match="no OmniGen. Expected"):
        layouts.open_model(tmp_path)
    with pytest.raises(X2IError, match="exists already"):
        writing.save(tiny.opened(), tmp_path, Layout.X2I)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(X2IError, match=r"(?s)model.safetensors|'llama'"):
        layouts.open_model(tmp_path)
    copy = copied(home / "diffusers", tmp_path / "copy")
    state = weights.read(copy / "transformer" / f"{layouts.DIFFUSERS}.safetensors")
    state.pop("norm.weight")
    save_file(state, copy / "transformer" / f"{layouts.DIFFUSERS}.safetensors")
    with pytest.raises(X2IError, match=r"missing llm.norm.weight \(1 in all\)"):
        layouts.open_model(copy)
    with pytest.raises(X2IError, match="needs an autoencoder"):
        OmniGenPipeline(layouts.open_model(home / "x2i", with_vae=False))


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def copied(folder: Path, target: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, target))
