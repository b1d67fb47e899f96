"""Mini-Gemini in its published folder: written and read, the encoders within or beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from x2i.base.errors import X2IError
from x2i.model import layouts, weights
from x2i.model.config import ModelFile
from x2i.model.filling import fill
from x2i.model.layouts import Opened
from x2i.model.mini_gemini import layouts as mgm
from x2i.model.mini_gemini import published
from x2i.model.mini_gemini.config import PRESETS, MiniGeminiConfig
from x2i.model.mini_gemini.model import MiniGemini
from x2i.model.mini_gemini.processor import MiniGeminiProcessor
from x2i.model.registry import changed
from x2i.trainer.config import TokenizerTraining
from x2i.trainer.tokens import train

TINY = PRESETS["mini-gemini-tiny"]
#: Numbers of a small Llama.
FEW = {"intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def like(config: Any, **changes: Any) -> MiniGeminiConfig:
    """The configuration with some numbers changed."""
    made = changed(config, changes)
    assert isinstance(made, MiniGeminiConfig)
    return made


WORDS = train(["a red boat on a lake"], TokenizerTraining(vocab_size=300), MiniGeminiProcessor.special_tokens)
GEMMA = TINY.adapted(vocab_size=WORDS.get_vocab_size(), latent_channels=0)
LLAMA = like(
    GEMMA,
    llm={"model_type": "llama", "numbers": FEW | {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 5e5}}},
    template="vicuna_v1",
    grid=2,
    overview=True,
    high={"image_size": 128},
)


def made(config: MiniGeminiConfig = GEMMA) -> Opened[MiniGemini]:
    model = MiniGemini(config).eval()
    fill(model, 0.2)
    described = ModelFile(architecture="mini_gemini", model=config.model_dump(mode="json"), max_text_tokens=99)
    return Opened(model, WORDS, described, None, "x2i")


def same(one: MiniGemini, other: MiniGemini) -> None:
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def rewritten(folder: Path, leave_out: str) -> dict[str, torch.Tensor]:
    """Take some tensors out of a published folder; they are returned."""
    state = weights.read(folder)
    for path in folder.glob("model*"):
        path.unlink()
    save_file({n: t for n, t in state.items() if not n.startswith(leave_out)}, folder / "model.safetensors")
    return {n: t for n, t in state.items() if n.startswith(leave_out)}


@pytest.mark.parametrize("config", [GEMMA, LLAMA], ids=["gemma", "llama, HD"])
def test_what_is_written_comes_back(tmp_path: Path, config: MiniGeminiConfig) -> None:
    before = made(config)
    layouts.save(before, tmp_path / "out", "published")
    assert layouts.published(tmp_path / "out") == "mini_gemini"
    after = mgm.open_model(tmp_path / "out")
    same(before.model, after.model)
    assert after.described == before.described and after.model.config == config
    # the index that MGM's code looks the miners up in
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {"model-00001-of-00001.safetensors"}
    assert set(index) == set(before.model.state_dict())
    if config is GEMMA:
        batch_of = MiniGeminiProcessor(config, after.tokenizer, None)
        assert batch_of.text(after.tokenizer.encode("a red boat", add_special_tokens=False).ids) == "a red boat"


@pytest.mark.parametrize("config", [GEMMA, LLAMA], ids=["gemma", "llama, HD"])
def test_numbers_and_shapes_alone_tell_the_model(tmp_path: Path, config: MiniGeminiConfig) -> None:
    """As MGM publishes it, without our file beside; CLIP's heads are 64 wide, where its own file is not at hand."""
    before = made(like(config, low={"hidden_size": 64, "heads": 1}))
    layouts.save(before, tmp_path / "out", "published")
    (tmp_path / "out/x2i.json").unlink()
    after = mgm.open_model(tmp_path / "out")
    same(before.model, after.model)
    ours, read = before.model.config, after.model.config
    assert (read.low, read.high) == (ours.low, ours.high)
    assert (read.template, read.grid, read.overview, read.aspect) == (ours.template, ours.grid, ours.overview, "pad")
    there, here = after.model.model.config.to_dict(), before.model.model.config.to_dict()
    changed = {key for key in here if here[key] != there.get(key)}
    assert changed <= {"dtype", "attn_implementation", "_attn_implementation", "rope_parameters"}
    assert after.model.model.rotary_emb.inv_freq.equal(before.model.model.rotary_emb.inv_freq)


def test_encoders_may_lie_in_checkpoints_of_their_own(tmp_path: Path) -> None:
    before = made()
    folder = tmp_path / "mgm"
    layouts.save(before, folder, "published")
    (folder / "x2i.json").unlink()
    state = weights.read(folder)
    low, high = MiniGemini.pretrained["low_encoder"], MiniGemini.pretrained["high_encoder"]
    rewritten(folder, leave_out="model.vision_tower")
    for name, prefixes, file in (
        ("clip", low, "model.safetensors"),
        ("convnext", high, "open_clip_model.safetensors"),
    ):
        (tmp_path / name).mkdir()
        theirs = {
            there + n.removeprefix(here): t
            for n, t in state.items()
            for here, there in prefixes.items()
            if n.startswith(here)
        }
        assert theirs
        save_file({**theirs, "text_model.final_layer_norm.weight": torch.ones(3)}, tmp_path / name / file)
    heads = {"vision_config": {"num_attention_heads": TINY.low.heads}}
    (tmp_path / "clip/config.json").write_text(json.dumps(heads))
    numbers = json.loads((folder / "config.json").read_text())
    numbers |= {"mm_vision_tower": str(tmp_path / "clip"), "mm_vision_tower_aux": "../convnext"}
    (folder / "config.json").write_text(json.dumps(numbers))
    after = mgm.open_model(folder)
    same(before.model, after.model)
    assert after.model.config.low == GEMMA.low
    (folder / "config.json").write_text(json.dumps(numbers | {"mm_vision_tower_aux": "../clip"}))
    with pytest.raises(X2IError, match=r"its high encoder is not within, and .*clip has no visual\.trunk\.stem"):
        mgm.open_model(folder)
    (folder / "config.json").write_text(json.dumps(numbers | {"mm_vision_tower_aux": "./nowhere"}))
    with pytest.raises(X2IError, match="nowhere: no such file or folder"):
        mgm.open_model(folder)
    (folder / "config.json").write_text(json.dumps(numbers | {"mm_vision_tower_aux": None}))
    with pytest.raises(X2IError, match="its high encoder is not within, and no mm_vision_tower_aux"):
        mgm.open_model(folder)


def test_names_of_mgms_tree_are_the_hubs() -> None:
    for key, spec in published.TOWERS.items():
        assert mgm._tower(f"./{spec}", Path("nowhere")).spec in mgm._HUB.values(), key


def test_pickles_are_refused_with_a_remedy(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    layouts.save(made(), folder, "published")
    for path in folder.glob("model*"):
        path.unlink()
    for name in ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"):
        (folder / name).write_bytes(b"")
    with pytest.raises(X2IError, match=r"pytorch_model-00001-of-00002\.bin.* any code .*save_file\(torch\.load"):
        mgm.open_model(folder)


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    numbers = published.to_published(GEMMA, made().model.model.config.to_dict(), "float32")
    for change, message in (
        ({"model_type": "mgm_mixtral"}, "model_type 'mgm_mixtral' .*known: mgm_gemma"),
        ({"vocab_size": 64_000}, "with 64000 tokens"),
        ({"mm_projector_type": "linear"}, "known: mlp2x_gelu"),
    ):
        with pytest.raises(X2IError, match=message):
            published.from_published(numbers | change, {}, {}, "config.json")
    with pytest.raises(X2IError, match=r"patch_embedding\.weight' is not there"):
        published.from_published(numbers, {}, {}, "config.json")
    with pytest.raises(X2IError, match="gemma or llama as language model, not qwen2"):
        layouts.save(made(like(GEMMA, llm={"model_type": "qwen2"})), tmp_path / "out", "published")
    assert not (tmp_path / "out").exists()
