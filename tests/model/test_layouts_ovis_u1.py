"""Ovis-U1 in its published folder: written and read, autoencoder and tokenizer within."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from tests.model import tiny
from x2i.base.errors import X2IError
from x2i.model import folders, layouts, weights
from x2i.model.config import ModelFile, PixelsConfig, VAEConfig
from x2i.model.filling import fill
from x2i.model.folders import Held
from x2i.model.layers.config import AIMv2Config, VisualTokenizerConfig
from x2i.model.layouts import Opened
from x2i.model.ovis_u1 import layouts as ovis_u1
from x2i.model.ovis_u1 import names, published
from x2i.model.ovis_u1.config import PRESETS, OvisU1Config, Qwen3Numbers
from x2i.model.ovis_u1.decoder_config import DecoderConfig
from x2i.model.ovis_u1.model import OvisU1
from x2i.model.ovis_u1.processor import OvisU1Processor
from x2i.model.vae import VAE, Pixels
from x2i.trainer.config import TokenizerTraining
from x2i.trainer.tokens import train

CONFIG = OvisU1Config(
    llm=Qwen3Numbers(
        hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate_size=48, max_positions=2048
    ),
    tokenizer=VisualTokenizerConfig(
        encoder=AIMv2Config(hidden_size=32, layers=2, heads=2, intermediate_size=48, patch_size=4, image_size=32),
        vocab_size=64,
    ),
    decoder=DecoderConfig(
        vec_in_dim=48, context_in_dim=64, hidden_size=48, heads=2, depth=1, depth_single=1, axes_dim=(8, 8, 8)
    ),
    min_pixels=32 * 32,
    max_pixels=64 * 64,
    max_tokens=1024,
)


def words() -> Tokenizer:
    texts = [OvisU1Processor.learned_text("a red boat"), "Make the sky darker"] * 3
    return train(texts, TokenizerTraining(vocab_size=400), OvisU1Processor.special_tokens, OvisU1Processor.begin)


def made(folder: Path) -> Opened[OvisU1]:
    """A tiny model with the published code's constants, and an autoencoder of diffusers in `folder`."""
    import diffusers

    place = tiny.write_vae(folder)
    return opened(place, Held(diffusers.AutoencoderKL.from_pretrained(folder)))


def opened(place: VAEConfig, vae: VAE, **changes: Any) -> Opened[OvisU1]:
    known = words()
    config = CONFIG.adapted(vocab_size=known.get_vocab_size(), latent_channels=vae.channels).model_copy(update=changes)
    model = OvisU1(config).eval()
    fill(model, 0.1)
    described = ModelFile(
        architecture="ovis_u1", model=config.model_dump(mode="json"), vae=place, max_text_tokens=99, resolution=48
    )
    return Opened(model, known, described, vae, "x2i")


def same(one: Any, other: Any) -> None:
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_what_is_written_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = made(tmp_path / "kl")
    layouts.save(before, tmp_path / "out", "published")
    assert not caplog.records  # the published code opens it
    assert layouts.published(tmp_path / "out") == "ovis_u1"
    after = ovis_u1.open_model(tmp_path / "out")
    same(before.model, after.model)
    assert isinstance(before.vae, Held) and isinstance(after.vae, Held)
    same(before.vae.module, after.vae.module)
    assert (after.described.resolution, after.described.max_text_tokens) == (48, 99)
    state = weights.read(tmp_path / "out")
    assert torch.equal(state[names.HEAD], state[names.EMBEDDING])
    assert {n for n in state if n.startswith(names.VAE)} == {names.VAE + n for n in before.vae.module.state_dict()}
    del state[names.EMBEDDING]  # a file with one of the two names
    assert names.split_vae(state)[0].keys() == before.model.state_dict().keys()
    (tmp_path / "out/x2i.json").unlink()  # as AIDC-AI publishes it
    again = ovis_u1.open_model(tmp_path / "out")
    same(before.model, again.model)
    assert again.model.config == before.model.config and again.described.resolution == 1024


def test_large_ones_are_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = made(tmp_path / "kl")
    layouts.save(before, tmp_path / "one", "published")
    whole = folders.save_shards
    monkeypatch.setattr(folders, "save_shards", lambda state, folder: whole(state, folder, limit="300KB"))
    layouts.save(before, tmp_path / "several", "published")
    shards = sorted(path.name for path in (tmp_path / "several").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((tmp_path / "several/model.safetensors.index.json").read_text())
    one, several = weights.read(tmp_path / "one"), weights.read(tmp_path / "several")
    assert one.keys() == several.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[name], several[name]) for name in one)
    assert index["metadata"]["total_size"] == 4 * sum(tensor.numel() for tensor in one.values())
    same(before.model, ovis_u1.open_model(tmp_path / "several").model)
    (tmp_path / "several" / shards[1]).unlink()
    with pytest.raises(X2IError, match=f"{shards[1]}, which is not there"):
        ovis_u1.open_model(tmp_path / "several")


def test_what_their_code_cannot_open_is_kept_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = PixelsConfig(factor=2)
    decoder = CONFIG.decoder.model_copy(update={"refiner_depth": 1, "in_channels": 48, "out_channels": 48})
    before = opened(place, Pixels(place), decoder=decoder)
    with caplog.at_level(logging.WARNING):
        layouts.save(before, tmp_path / "out", "published")
    assert "refiner_depth 1, not 2; its autoencoder is no AutoencoderKL" in caplog.text
    after = ovis_u1.open_model(tmp_path / "out")
    same(before.model, after.model)
    assert after.described == before.described and isinstance(after.vae, Pixels)


def test_the_published_numbers_are_the_presets() -> None:
    """Some of config.json of AIDC-AI/Ovis-U1-3B, by the names that its configuration classes read."""
    ours = PRESETS["ovis-u1-3b"]
    there = published.to_published(ours, {"latent_channels": 4}, "bfloat16")
    assert published.from_published(there, "config.json") == ours and not published.unusual(ours)
    llm, seen, drawn = (there[f"{part}_config"] for part in ("llm", "visual_tokenizer", "visual_generator"))
    assert (there["hidden_size"], there["multimodal_max_length"], there["model_type"]) == (2048, 4496, "ovis_u1")
    expected: dict[str, Any] = {
        "num_hidden_layers": 28,
        "head_dim": 128,
        "intermediate_size": 6144,
        "rope_theta": 1_000_000,
    }
    assert llm.items() >= expected.items() and llm["tie_word_embeddings"]
    expected = {"vocab_size": 65_536, "hidden_stride": 2, "min_pixels": 200_704, "max_pixels": 2_408_448, "tau": 1.0}
    assert seen.items() >= expected.items() and seen["interpolate_pe_method"] == "two_dim"
    expected = {"hidden_size": 1024, "num_attention_heads": 8, "disable_rope": False, "image_size": 448}
    assert seen["backbone_config"].items() >= expected.items() and seen["backbone_config"]["preserve_original_pe"]
    expected = {"depth": 6, "depth_single_blocks": 12, "num_heads": 12, "axes_dim": [16, 56, 56], "max_shift": 1.15}
    assert drawn.items() >= expected.items() and drawn["timestep_shift"] and drawn["txt_type"] == "refiner"


def test_frequencies_stay_float32_in_bfloat16(tmp_path: Path) -> None:
    layouts.save(made(tmp_path / "kl"), tmp_path / "out", "published")
    found = ovis_u1.open_model(tmp_path / "out", dtype=torch.bfloat16)
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16}
    frequencies = found.model.llm.model.rotary_emb.inv_freq
    assert torch.equal(frequencies, OvisU1(found.model.config).llm.model.rotary_emb.inv_freq)


def test_weights_and_numbers_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    layouts.save(made(tmp_path / "kl"), folder, "published")
    (folder / "x2i.json").unlink()
    numbers = json.loads((folder / "config.json").read_text())
    numbers["llm_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(numbers))
    with pytest.raises(X2IError, match=r"missing llm\.model\.layers\.2\.input_layernorm\.weight"):
        ovis_u1.open_model(folder)
    del numbers["llm_config"]["head_dim"]
    (folder / "config.json").write_text(json.dumps(numbers))
    with pytest.raises(X2IError, match="'head_dim' is not there"):
        ovis_u1.open_model(folder)
    with pytest.raises(X2IError, match="model_type ovis_u1"):
        ovis_u1.open_model(tmp_path / "kl")


def test_a_tokenizer_in_qwens_files_is_read(tmp_path: Path) -> None:
    tokenizer = words()
    parts = json.loads(tokenizer.to_str())
    (tmp_path / "vocab.json").write_text(json.dumps(parts["model"]["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in parts["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    added = {t["content"]: t["id"] for t in parts["added_tokens"]}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    kinds = {str(i): {"content": t, "special": True, "lstrip": False, "rstrip": False} for t, i in added.items()}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": kinds, "unk_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    # as published, with code of others named beside: nobody asks for it
    numbers = {"model_type": "ovis_u1", "auto_map": {"AutoConfig": "configuration_ovis_u1.OvisU1Config"}}
    (tmp_path / "config.json").write_text(json.dumps(numbers))
    found = folders.tokenizer_of(tmp_path)
    text = "<|im_start|>user\na red boat<|im_end|>\n"
    assert found.encode(text, add_special_tokens=False).ids == tokenizer.encode(text, add_special_tokens=False).ids
    (tmp_path / "none").mkdir()
    with pytest.raises(X2IError, match="no tokenizer that transformers can read"):
        folders.tokenizer_of(tmp_path / "none")
