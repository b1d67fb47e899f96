"""A published Ovis-U1 folder, tiny: `x2i sample` draws from it, `x2i convert` makes a checkpoint of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from typer.testing import CliRunner

from tests.model import tiny
from tests.model.filling import fill
from x2i.base.errors import RecipeError, X2IError
from x2i.cli.convert import convert
from x2i.cli.sample import sample
from x2i.model.base import Request
from x2i.model.layers.config import AIMv2Config, VisualTokenizerConfig
from x2i.model.ovis_u1 import layouts, names
from x2i.model.ovis_u1.config import PRESETS, OvisU1Config, Qwen3Numbers
from x2i.model.ovis_u1.decoder_config import DecoderConfig
from x2i.model.ovis_u1.model import OvisU1
from x2i.model.ovis_u1.processor import OvisU1Processor
from x2i.model.sampling import Options, Painter
from x2i.trainer.config import TokenizerTraining
from x2i.trainer.tokens import train

app = typer.Typer()
app.command()(sample)
app.command()(convert)


def x2i(*arguments: str | Path) -> str:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False, standalone_mode=False).stdout


def published(config: OvisU1Config, vae_config: dict[str, Any]) -> dict[str, Any]:
    """The published config.json, as far as it is read."""
    llm, seen, drawn = config.llm, config.tokenizer, config.decoder
    return {
        "model_type": "ovis_u1",
        "multimodal_max_length": config.max_tokens,
        "llm_config": {
            "hidden_size": llm.hidden_size,
            "num_hidden_layers": llm.layers,
            "num_attention_heads": llm.heads,
            "num_key_value_heads": llm.kv_heads,
            "head_dim": llm.head_dim,
            "intermediate_size": llm.intermediate_size,
            "vocab_size": llm.vocab_size,
            "rms_norm_eps": llm.norm_eps,
            "rope_theta": llm.rope_theta,
            "max_position_embeddings": llm.max_positions,
        },
        "visual_tokenizer_config": {
            "vocab_size": seen.vocab_size,
            "tokenize_function": seen.tokenize,
            "tau": seen.tau,
            "min_pixels": config.min_pixels,
            "max_pixels": config.max_pixels,
            "backbone_config": {
                "hidden_size": seen.encoder.hidden_size,
                "num_hidden_layers": seen.encoder.layers,
                "num_attention_heads": seen.encoder.heads,
                "intermediate_size": seen.encoder.intermediate_size,
                "patch_size": seen.encoder.patch_size,
                "image_size": seen.encoder.image_size,
                "rms_norm_eps": seen.encoder.norm_eps,
                "disable_rope": not seen.encoder.rope,
                "hidden_stride": seen.encoder.hidden_stride,
                "qkv_bias": seen.encoder.qkv_bias,
                "use_bias": seen.encoder.use_bias,
            },
        },
        "visual_generator_config": {
            **drawn.model_dump(mode="json", include={"in_channels", "out_channels", "vec_in_dim", "context_in_dim"}),
            **drawn.model_dump(mode="json", include={"hidden_size", "mlp_ratio", "depth", "axes_dim", "theta"}),
            **drawn.model_dump(mode="json", include={"qkv_bias", "base_shift", "max_shift"}),
            "num_heads": drawn.heads,
            "depth_single_blocks": drawn.depth_single,
            "vae_config": vae_config,
        },
    }


def words() -> Tokenizer:
    texts = [OvisU1Processor.learned_text("a red boat"), "Make the sky darker"] * 3
    return train(texts, TokenizerTraining(vocab_size=400), OvisU1Processor.special_tokens, OvisU1Processor.begin)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import diffusers

    folder = tmp_path_factory.mktemp("ovis")
    tiny.write_vae(folder / "kl")
    autoencoder = diffusers.AutoencoderKL.from_pretrained(folder / "kl")
    tokenizer = words()
    config = OvisU1Config(
        llm=Qwen3Numbers(
            hidden_size=32,
            layers=2,
            heads=2,
            kv_heads=1,
            head_dim=16,
            intermediate_size=48,
            vocab_size=tokenizer.get_vocab_size(),
            max_positions=2048,
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
    model = OvisU1(config)
    fill(model, 0.1)
    made = folder / "published"
    made.mkdir()
    state = names.with_vae(model.state_dict(), autoencoder.state_dict())
    state["llm.lm_head.weight"] = state["llm.model.embed_tokens.weight"].clone()  # as the published file may have it
    save_file({n: t.contiguous() for n, t in state.items()}, made / "model.safetensors")
    vae_config = {k: v for k, v in autoencoder.config.items() if not k.startswith("_name")}
    (made / "config.json").write_text(json.dumps(published(config, vae_config)))
    tokenizer.save(str(made / "tokenizer.json"))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (36, 50, 3), dtype=np.uint8)).save(folder / "photo.png")
    return folder


def drawn(home: Path, tmp_path: Path, *arguments: str | Path) -> np.ndarray:
    out = tmp_path / "out.png"
    x2i("sample", home, "Make the sky darker", "--steps", "2", "--out", out, *arguments)
    return np.asarray(Image.open(out), int)


@pytest.mark.parametrize("images", [False, True], ids=["words", "edit"])
def test_sample_draws_as_its_publishers_would(home: Path, tmp_path: Path, images: bool) -> None:
    photo = ("--image", home / "photo.png") if images else ()
    picture = drawn(home / "published", tmp_path, "--size", "48x32", *photo)
    opened = layouts.open_model(home / "published")
    processor = OvisU1Processor(opened.model.config, opened.tokenizer, opened.vae)
    painter = Painter(opened.model, opened.vae, processor)
    text, image = (6.0, 1.5) if images else (5.0, 1.0)
    shown = [Image.open(home / "photo.png")] if images else []
    options: dict[str, Any] = {"height": 32, "width": 48, "steps": 2, "guidance": text, "image_guidance": image}
    wanted = painter.generate("Make the sky darker", shown, **options)
    assert picture.shape == (32, 48, 3) and picture.std() > 5
    assert np.abs(picture - np.asarray(wanted, int)).max() <= 1
    if not images:  # shifted by the resolution
        request, plain = [Request("Make the sky darker")], Options(32, 48, steps=2, guidance=text, image_guidance=image)
        flat = painter.draw(request, Options(32, 48, steps=2, guidance=text, image_guidance=image, shift=1.0))
        assert (painter.draw(request, plain) - flat).abs().max() > 1e-4


def test_convert_makes_a_checkpoint_that_draws_the_same(home: Path, tmp_path: Path) -> None:
    x2i("convert", home / "published", tmp_path / "ours", "--layout", "x2i")
    options = ("--size", "32", "--image", home / "photo.png")
    there = drawn(home / "published", tmp_path, *options)
    here = drawn(tmp_path / "ours", tmp_path, *options, "--guidance", "6", "--image-guidance", "1.5")
    assert np.array_equal(there, here)
    with pytest.raises(X2IError, match="exists already"):
        x2i("convert", home / "published", tmp_path / "ours", "--layout", "x2i")
    with pytest.raises(RecipeError, match="as x2i alone"):
        x2i("convert", home / "published", tmp_path / "other", "--layout", "diffusers")


def test_an_edit_may_take_the_published_size_of_its_source(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OvisU1Processor, "edit_size", lambda self, height, width: (height - 4, width - 2))
    picture = drawn(home / "published", tmp_path, "--image", home / "photo.png", "--size", "input")
    assert picture.shape == (32, 48, 3)


def test_weights_that_do_not_fit_are_named(home: Path, tmp_path: Path) -> None:
    found = json.loads((home / "published/config.json").read_text())
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((home / "published" / name).read_bytes())
    found["llm_config"]["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(found))
    with pytest.raises(X2IError, match=r"missing llm.model.layers.2.input_layernorm.weight"):
        layouts.open_model(tmp_path)
    del found["llm_config"]["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(found))
    with pytest.raises(X2IError, match="'head_dim' is not there"):
        layouts.open_model(tmp_path)
    with pytest.raises(X2IError, match="model_type ovis_u1"):
        layouts.open_model(home / "kl")


def test_frequencies_stay_float32_in_bfloat16(home: Path) -> None:
    opened = layouts.open_model(home / "published", dtype=torch.bfloat16)
    assert {p.dtype for p in opened.model.parameters()} == {torch.bfloat16}
    assert opened.model.llm.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_the_published_numbers_are_the_presets() -> None:
    ours = PRESETS["ovis-u1-3b"]
    assert layouts.numbers(published(ours, {}), "config.json") == ours


def test_a_tokenizer_in_qwens_files_is_read(home: Path, tmp_path: Path) -> None:
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
    found = layouts.tokenizer_of(tmp_path)
    text = "<|im_start|>user\na red boat<|im_end|>\n"
    assert found.encode(text, add_special_tokens=False).ids == tokenizer.encode(text, add_special_tokens=False).ids
    with pytest.raises(X2IError, match="no tokenizer"):
        layouts.tokenizer_of(home / "kl")
