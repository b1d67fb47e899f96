"""Ovis2 in the folders of others: what is written opens with transformers' class, and comes back to the last tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from x2i.base.errors import X2IError
from x2i.model import layouts, weights
from x2i.model.base import Chat, Message
from x2i.model.config import ModelFile
from x2i.model.filling import fill
from x2i.model.layers.config import AIMv2Config, VisualTokenizerConfig
from x2i.model.layouts import Opened
from x2i.model.ovis2 import layouts as ovis2
from x2i.model.ovis2 import published
from x2i.model.ovis2.config import PRESETS, Ovis2Config, Qwen2Numbers, Tiles
from x2i.model.ovis2.model import Ovis2
from x2i.model.ovis2.partition import START, TILE
from x2i.model.ovis2.processor import Ovis2Processor

CHAT = Chat(
    (Message("user", "<image>\nWhat is this?"),), (np.arange(20 * 44 * 3).reshape(20, 44, 3).astype(np.uint8) * 7,)
)


def qwen_like() -> Tokenizer:
    """Qwen's three special tokens, one token for each byte, and text cut as Qwen does."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    by_word = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([by_word])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer


def made(tied: bool = True, **changes: Any) -> Opened[Ovis2]:
    """A tiny model whose token table has no row to spare for transformers' tokens."""
    words = qwen_like()
    config = Ovis2Config(
        llm=Qwen2Numbers(
            hidden_size=32,
            layers=2,
            heads=4,
            kv_heads=2,
            intermediate_size=48,
            vocab_size=words.get_vocab_size(),
            tied=tied,
            max_positions=512,
        ),
        tokenizer=VisualTokenizerConfig(
            encoder=AIMv2Config(
                hidden_size=32, layers=2, heads=2, intermediate_size=48, patch_size=4, image_size=16, rope=False
            ),
            vocab_size=64,
            indicators=5,
        ),
        max_length=400,
        tiles=Tiles(single=4, several=2),
        **changes,
    )
    model = Ovis2(config).eval()
    fill(model, 0.3)
    described = ModelFile(architecture="ovis2", model=config.model_dump(mode="json"), max_text_tokens=99)
    return Opened(model, words, described, None, "x2i")


def same(one: Ovis2, other: Ovis2) -> None:
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", ["published", "transformers", "x2i"])
def test_what_is_written_comes_back(tmp_path: Path, layout: str, tied: bool) -> None:
    before = made(tied)
    layouts.save(before, tmp_path / "out", layout)
    if layout == "x2i":
        assert layouts.is_checkpoint(tmp_path / "out") and layouts.published(tmp_path / "out") is None
        assert weights.shapes(tmp_path / "out").keys() <= before.model.state_dict().keys()
        return
    assert layouts.published(tmp_path / "out") == "ovis2"
    after = ovis2.open_model(tmp_path / "out")
    same(before.model, after.model)
    assert (after.layout, after.described) == (layout, before.described)
    known = after.tokenizer.encode("<|im_start|>user\na boat", add_special_tokens=False).ids
    assert known == before.tokenizer.encode("<|im_start|>user\na boat", add_special_tokens=False).ids
    (tmp_path / "out/x2i.json").unlink()  # as others publish it: the numbers alone
    again = ovis2.open_model(tmp_path / "out", dtype=torch.bfloat16).model
    assert again.config.tokenizer == before.model.config.tokenizer and again.config.llm.tied is tied
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert again.llm.model.rotary_emb.inv_freq.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_transformers_opens_it_and_answers_the_same(tmp_path: Path, tied: bool) -> None:
    """But for the encoder's last norm, which its class applies and the published code does not."""
    transformers = pytest.importorskip("transformers")
    opened = made(tied)
    layouts.save(opened, tmp_path / "out", "transformers")
    theirs, told = transformers.Ovis2ForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    places = words.convert_tokens_to_ids(list(ovis2.TOKENS))
    assert places == [theirs.config.image_token_id, *theirs.config.visual_indicator_token_ids]
    processor = Ovis2Processor(opened.model.config, opened.tokenizer, None)
    batch = processor.chats([CHAT], labels=False)
    assert len(batch.grids) == 4  # the image, and three tiles
    ids_BL = batch.ids_BL.clone()
    for mark, place in zip([TILE, *range(START, START - 5, -1)], places, strict=True):
        ids_BL[batch.ids_BL == mark] = place
    # back from patches in merge order to pixels
    tiles = batch.patches_NF.view(4, 2, 2, 2, 2, 3, 4, 4).permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(4, 3, 16, 16)
    given = {"input_ids": ids_BL, "attention_mask": batch.valid_BL, "pixel_values": tiles}
    ours = opened.model.llm.lm_head(opened.model.hidden(batch))
    rows = opened.model.config.llm.vocab_size
    assert (theirs(**given).logits[..., :rows] - ours).abs().max() > 0.1
    theirs.model.vision_tower.transformer.rms_norm = nn.Identity()
    found = theirs(**given).logits
    torch.testing.assert_close(found[..., :rows], ours, rtol=0, atol=5e-5)
    # rows for transformers' own tokens are written, and never win
    assert found.shape[-1] == rows + 6
    torch.testing.assert_close(found[..., rows:], found[..., :1].expand(-1, -1, 6), rtol=0, atol=5e-5)
    assert (found.argmax(dim=-1) < rows).all()


def test_a_folder_that_transformers_wrote_is_read(tmp_path: Path) -> None:
    """Its config.json leaves out what is so by default."""
    transformers = pytest.importorskip("transformers")
    opened = made()
    layouts.save(opened, tmp_path / "ours", "transformers")
    theirs = transformers.Ovis2ForConditionalGeneration.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    shutil.copyfile(tmp_path / "ours/tokenizer.json", tmp_path / "theirs/tokenizer.json")
    text = json.loads((tmp_path / "theirs/config.json").read_text())["text_config"]
    assert "hidden_size" in text
    found = ovis2.open_model(tmp_path / "theirs").model
    rows = opened.model.config.llm.vocab_size
    assert found.config.llm.model_copy(update={"vocab_size": rows}) == opened.model.config.llm
    assert found.config.tokenizer == opened.model.config.tokenizer
    before, after = opened.model.state_dict(), found.state_dict()
    assert before.keys() == after.keys() and len(after["llm.lm_head.weight"]) == rows + 6
    assert all(torch.equal(before[name], after[name][: len(before[name])]) for name in before)


def test_the_published_folder_has_what_the_published_code_reads(tmp_path: Path) -> None:
    """Keys of AIDC-AI/Ovis at 58b0ad6 (ovis/model/configuration_ovis.py, visual_tokenizer/base_visual_tokenizer.py)."""
    layouts.save(made(), tmp_path / "out", "published")
    numbers = json.loads((tmp_path / "out/config.json").read_text())
    assert numbers["model_type"] == "ovis" and numbers["llm_config"]["model_type"] == "qwen2"
    assert numbers["hidden_size"] == numbers["llm_config"]["hidden_size"] == 32
    assert numbers["conversation_formatter_class"] == "QwenConversationFormatter"
    seen = numbers["visual_tokenizer_config"]
    assert (seen["model_type"], seen["backbone_config"]["model_type"]) == ("aimv2_visual_tokenizer", "aimv2")
    image = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert image["crop_size"] == {"height": 16, "width": 16} and not image["do_center_crop"]  # whence a tile's side
    state = weights.read(tmp_path / "out")
    assert torch.equal(state["llm.lm_head.weight"], state["llm.model.embed_tokens.weight"])  # written twice, as there
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False, config=None, use_fast=True)
    assert type(words).__name__ == "Qwen2Tokenizer"


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "ovis2-tiny"])
def test_numbers_go_there_and_back(preset: str) -> None:
    ours = PRESETS[preset]
    assert published.from_published(published.to_published(ours, "bfloat16"), "config.json") == ours
    there = published.to_transformers(ours, ours.llm.vocab_size, range(151_665, 151_671), "bfloat16")
    assert published.from_transformers(there, "config.json") == ours


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    layouts.save(made(), folder, "published")
    numbers = json.loads((folder / "config.json").read_text())
    with pytest.raises(X2IError, match="exists already"):
        layouts.save(made(), folder, "published")
    with pytest.raises(X2IError, match="ovis2 can be written as published, transformers, x2i"):
        layouts.save(made(), tmp_path / "other", "diffusers")
    state = weights.read(folder)
    state["llm.lm_head.weight"] += 1
    save_file(state, folder / "model.safetensors")
    with pytest.raises(X2IError, match=r"lm_head\.weight differ, but the numbers say that they are one"):
        ovis2.open_model(folder)
    state["llm.lm_head.weight"] -= 1
    save_file(state, folder / "model.safetensors")
    (folder / "x2i.json").unlink()
    for change, message in (
        ({"llm_config": numbers["llm_config"] | {"num_hidden_layers": 3}}, r"missing llm\.model\.layers\.2\."),
        ({"llm_config": numbers["llm_config"] | {"model_type": "gemma2"}}, "an Ovis of gemma2 and aimv2"),
        ({"multimodal_max_length": None}, "max_length"),
        ({"model_type": "ovis2_5"}, "model_type ovis or ovis2"),
    ):
        (folder / "config.json").write_text(json.dumps(numbers | change))
        with pytest.raises(X2IError, match=message):
            ovis2.open_model(folder)
    del numbers["visual_tokenizer_config"]["hidden_stride"]
    (folder / "config.json").write_text(json.dumps(numbers))
    with pytest.raises(X2IError, match="'hidden_stride' is not there"):
        ovis2.open_model(folder)
