"""OmniGen in the folders of others: written, read back without loss, and refused where it cannot be."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.model import tiny
from tests.model.test_pipeline import EDIT, WORDS, drawn
from x2i.base.errors import X2IError
from x2i.model import lora, weights
from x2i.model.base import Request
from x2i.model.config import AutoencoderKLConfig, PixelsConfig
from x2i.model.lora_config import LoRAConfig
from x2i.model.omnigen import layouts, published, writing
from x2i.model.omnigen.config import PRESETS
from x2i.model.omnigen.layouts import Layout
from x2i.model.omnigen.pipeline import OmniGenPipeline
from x2i.trainer import checkpoint


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.in_every_layout(tmp_path_factory.mktemp("layouts"))


@pytest.mark.parametrize("layout", list(Layout))
def test_every_layout_gives_back_the_model(home: Path, layout: Layout) -> None:
    found = layouts.open_model(home / layout.value)
    made = tiny.opened(AutoencoderKLConfig(kind="autoencoder_kl", weights=str(home / "kl")))
    assert found.layout is layout and found.model.config == made.model.config
    tiny.same(found.model.state_dict(), made.model.state_dict())
    assert found.tokenizer.to_str() == made.tokenizer.to_str()
    assert found.described.resolution == 64


@pytest.mark.parametrize("layout", [Layout.PUBLISHED, Layout.DIFFUSERS])
def test_folders_that_others_wrote_open_without_our_file(home: Path, tmp_path: Path, layout: Layout) -> None:
    copy = tiny.copied(home / layout.value, tmp_path / "theirs")
    (copy / "x2i.json").unlink()
    found = layouts.open_model(copy)
    # the table of positions is read, so what it was computed from does not matter
    assert found.model.config == tiny.numbers(4) and found.described.max_text_tokens is None
    assert isinstance(found.described.vae, AutoencoderKLConfig) and found.described.vae.weights == str(copy / "vae")
    tiny.same(found.model.state_dict(), layouts.open_model(home / "x2i", with_vae=False).model.state_dict())


def test_sharded_weights_open(home: Path, tmp_path: Path) -> None:
    for layout, inner, stem in (("published", "", "model"), ("diffusers", "transformer", layouts.DIFFUSERS)):
        copy = tiny.copied(home / layout, tmp_path / layout)
        file = copy / inner / f"{stem}.safetensors"
        state = weights.read(file)
        file.unlink()
        where = {name: f"{stem}-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(state)}
        for shard in set(where.values()):
            save_file({n: t for n, t in state.items() if where[n] == shard}, file.with_name(shard))
        file.with_name(f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        found = layouts.open_model(copy, with_vae=False)
        tiny.same(found.model.state_dict(), layouts.open_model(home / layout, with_vae=False).model.state_dict())


def test_a_hub_id_takes_the_same_path(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cache, commit = tmp_path / "models--tiny--omnigen", "a" * 40
    (cache / "snapshots").mkdir(parents=True)
    tiny.copied(home / "published", cache / "snapshots" / commit)
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
    tiny.same(loaded.model.state_dict(), layouts.open_model(home / "published").model.state_dict())


def test_averaged_weights_are_the_ones_that_count(home: Path, tmp_path: Path) -> None:
    copy = tiny.copied(home / "x2i", tmp_path / "x2i")
    state = {n: t * 2 for n, t in weights.read(copy / "model.safetensors").items()}
    weights.save(state, copy / "ema.safetensors")
    tiny.same(layouts.open_model(copy).model.state_dict(), state)


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
    tiny.same(found.model.state_dict(), made.model.state_dict())


def test_the_text_head_is_left_out_for_others_and_kept_for_us(tmp_path: Path) -> None:
    made = tiny.opened(text_head=True)
    for layout in (Layout.PUBLISHED, Layout.TRANSFORMER, Layout.X2I):
        writing.save(made, tmp_path / layout.value, layout)
    silent = layouts.open_model(tmp_path / "published").model
    assert not silent.config.text_head and "lm_head.weight" not in silent.state_dict()
    assert not layouts.open_model(tmp_path / "transformer").model.config.text_head
    speaking = layouts.open_model(tmp_path / "x2i").model
    tiny.same(speaking.state_dict(), made.model.state_dict())


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
    copy = tiny.copied(home / "diffusers", tmp_path / "copy")
    state = weights.read(copy / "transformer" / f"{layouts.DIFFUSERS}.safetensors")
    state.pop("norm.weight")
    save_file(state, copy / "transformer" / f"{layouts.DIFFUSERS}.safetensors")
    with pytest.raises(X2IError, match=r"missing llm.norm.weight \(1 in all\)"):
        layouts.open_model(copy)
    with pytest.raises(X2IError, match="needs an autoencoder"):
        OmniGenPipeline(layouts.open_model(home / "x2i", with_vae=False))
