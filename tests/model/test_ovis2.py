"""Ovis2 is the published model: its counts, names, stages, outputs and inputs, and where transformers differs.

Figures "of the published code" come from AIDC-AI/Ovis at 58b0ad6, run on weights filled by name.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from x2i.base.errors import X2IError
from x2i.model import weights
from x2i.model.base import Chat, Message
from x2i.model.layers.aimv2 import patchify
from x2i.model.layers.chat import IGNORE
from x2i.model.ovis2 import names, verify
from x2i.model.ovis2.config import PRESETS, STAGES, Tiles
from x2i.model.ovis2.model import Ovis2, Ovis2Batch
from x2i.model.ovis2.partition import TILE
from x2i.model.ovis2.processor import Ovis2Processor, Row, collate
from x2i.model.ovis2.verify import SMALL, filled, pixels, two_rows
from x2i.model.verify import Comparison, compared

COLOURS = {"red": (220, 30, 30), "green": (20, 200, 40), "blue": (30, 40, 230), "yellow": (240, 230, 20)}


def byte_tokenizer() -> Tokenizer:
    """Qwen's three special tokens, and one token for each byte."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer


def solid(colour: tuple[int, int, int], height: int = 24, width: int = 24) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def processor(max_text_tokens: int | None = None, **changes: object) -> Ovis2Processor:
    config = PRESETS["ovis2-tiny"].adapted(vocab_size=259, latent_channels=0).model_copy(update=changes)
    return Ovis2Processor(config, byte_tokenizer(), None, max_text_tokens)


def figures(tensor: Tensor) -> list[float]:
    """Mean, deviation, and twelve values spread evenly."""
    flat = tensor.detach().double().flatten()
    places = np.linspace(0, len(flat) - 1, 12).astype(int)
    return [float(flat.mean()), float(flat.std()), *flat[places].tolist()]


# --- counts, names, stages ---------------------------------------------------------------------------------------


def counted(model: nn.Module, *prefixes: str) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if n.startswith(prefixes or ("",)))


def test_published_counts() -> None:
    """Of the parts, and of 1b and 4b, as published; the other totals follow from their parts."""
    totals = {
        "ovis2-1b": 1_131_283_318,
        "ovis2-2b": 2_222_907_894,
        "ovis2-4b": 4_304_941_558,
        "ovis2-8b": 8_935_282_678,
        "ovis2-16b": 16_190_363_126,
        "ovis2-34b": 34_872_912_886,
    }
    rows = {name: verify.parameters(name) for name in totals}
    assert [row for each in rows.values() for row in each if not row.ok] == []
    assert {name: each[0].counted for name, each in rows.items()} == totals
    for total, llm, _, tokenizer, table in rows.values():
        assert total.counted == llm.counted + tokenizer.counted + table.counted


def test_names_and_bytes_of_the_published_checkpoint() -> None:
    """The index of AIDC-AI/Ovis2-4B, in bfloat16 with the tied output map written twice."""
    with torch.device("meta"):
        state = Ovis2(PRESETS["ovis2-4b"]).state_dict()
    total = 2 * sum(tensor.numel() for tensor in state.values())
    assert total == 9_232_212_972
    index = {"total_size": total}, dict.fromkeys(sorted(state), "model-00001-of-00002.safetensors")
    text = json.dumps(dict(zip(("metadata", "weight_map"), index, strict=True)), indent=2) + "\n"
    assert (len(state), len(text)) == (612, 54_910)
    expected = {
        "llm.lm_head.weight": (151_936, 2048),
        "llm.model.layers.35.self_attn.k_proj.bias": (256,),
        "visual_tokenizer.backbone.preprocessor.pos_embed": (1, 1024, 1536),
        "visual_tokenizer.backbone.preprocessor.patchifier.proj.weight": (1536, 3, 14, 14),
        "visual_tokenizer.backbone.trunk.blocks.7.mlp.fc3.weight": (4096, 1536),
        "visual_tokenizer.backbone.trunk.post_trunk_norm.weight": (1536,),
        "visual_tokenizer.head.0.weight": (65_531, 6144),
        "visual_tokenizer.head.1.bias": (65_531,),
        "vte.weight": (65_536, 2048),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected


def test_stages_train_their_parts() -> None:
    with torch.device("meta"):
        model = Ovis2(PRESETS["ovis2-1b"])
    found = {
        stage: counted(model, *(prefix for part in parts for prefix in model.parts[part]))
        for stage, parts in STAGES.items()
    }
    block = 4 * 1024**2 + 3 * 1024 * 2816 + 2 * 1024
    head, table = 4096 * 65_531 + 2 * 65_531, 65_536 * 896
    tokenizer = 578_530_294 + table  # all but the language model
    assert found["1a"] == block + head + table == 340_113_398
    assert found == {"1a": 340_113_398, "1b": tokenizer, "2": tokenizer, "3": 1_131_283_318, "4": 1_131_283_318}


# --- the published code's outputs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("comparison", verify.outputs(), ids=lambda comparison: comparison.what)
def test_outputs_are_those_of_the_published_code_and_of_transformers(comparison: Comparison) -> None:
    row = compared("ovis2", comparison)
    assert row.ok, row
    assert row.how == ("live" if row.public.startswith("transformers") else "recorded")
    assert row.largest > 0.1


def test_pixels_are_those_of_the_published_code() -> None:
    """`preprocess_image` with transformers' CLIP processor (Pillow): 50 x 90 pixels, tiles of 32."""
    numbers = np.arange(50 * 90 * 3).reshape(50, 90, 3)
    image = (numbers * 7919 % 251).astype(np.uint8)
    config = PRESETS["ovis2-tiny"].model_copy(update={"tiles": Tiles()})
    chat = Chat((Message("user", "<image>"),), (image,))
    batch = Ovis2Processor(config, byte_tokenizer(), None).chats([chat], labels=False)
    assert batch.grids == ((8, 8),) * 7  # the image, and 2 x 3 tiles
    # back from patches in merge order to pixels
    blocks = batch.patches_NF.view(7, 4, 4, 2, 2, 3, 4, 4).permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(7, 3, 32, 32)
    expected = [1.169163e-01, 6.359681e-01, 0.0, 0.0, -1.35431, -0.0439931, 0.198913, -0.303223, 0.382609, 1.41454]
    assert figures(blocks) == pytest.approx([*expected, 0.382903, -0.129313, 0.0, 0.0], rel=1e-5, abs=1e-6)
    filled_rows = blocks[0].abs().sum(dim=(0, 2)).nonzero().flatten().tolist()
    assert filled_rows == list(range(7, 24))  # 17 rows: the odd one of the 15 rows of zeros is below


# --- transformers ----------------------------------------------------------------------------------------------------


def test_transformers_takes_the_features_after_the_encoders_last_norm() -> None:
    """What `outputs` puts aside: the published code takes them before it, and the difference is no small one."""
    with torch.no_grad():
        ours, as_it_is = verify.logits(as_it_is=True)
    assert (as_it_is - ours).abs().max() > 0.1


def test_names_go_to_transformers_and_back() -> None:
    state = filled().state_dict()
    there = names.to_transformers(state)
    assert there.keys() == verify.of_transformers(filled()).state_dict().keys()
    back = names.from_transformers(there)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    for rename in (names.to_transformers, names.from_transformers):
        with pytest.raises(X2IError, match=r"decoder\.weight"):
            rename({"decoder.weight": torch.zeros(1)})


def test_straight_through_choice_passes_other_gradients_than_transformers() -> None:
    ovis2 = pytest.importorskip("transformers.models.ovis2.modeling_ovis2")
    config = SMALL.tokenizer.model_copy(update={"tokenize": "st_argmax"})
    model = filled(SMALL.model_copy(update={"tokenizer": config}))
    patches, grids = patchify(list(pixels()), 4, 2)
    logits = model.visual_tokenizer.logits(patches, grids).detach().requires_grad_()
    theirs = logits.detach().clone().requires_grad_()
    model.visual_tokenizer.logits = lambda *_: logits  # type: ignore[method-assign]
    chosen, chosen_by_them = model.visual_tokenizer(patches, grids), ovis2.hard_softmax(theirs, dim=-1)
    torch.testing.assert_close(chosen[:, :-5], chosen_by_them, rtol=0, atol=1e-6)
    direction = torch.linspace(-1, 1, 59)
    (chosen[:, :-5] * direction).sum().backward()
    (chosen_by_them * direction).sum().backward()
    assert logits.grad is not None and theirs.grad is not None
    torch.testing.assert_close(logits.grad, direction.expand(20, 59))  # straight on the logits
    assert (theirs.grad - logits.grad).abs().max() > 0.5


# --- visual tokens -----------------------------------------------------------------------------------------------------


def test_softmax_rows_sum_to_one_over_the_words_that_are_no_marks() -> None:
    patches, grids = patchify(list(pixels()), 4, 2)
    found = filled().visual_tokenizer(patches, grids)
    torch.testing.assert_close(found[:, :-5].sum(dim=-1), torch.ones(20))
    assert (found[:, :-5] > 0).all() and not found[:, -5:].any()


@pytest.mark.parametrize("tokenize", ["st_argmax", "gumbel_argmax"])
def test_hard_choices_equal_a_lookup_of_the_word(tokenize: str) -> None:
    config = SMALL.tokenizer.model_copy(update={"tokenize": tokenize})
    model = filled(SMALL.model_copy(update={"tokenizer": config}))
    patches, grids = patchify(list(pixels()), 4, 2)
    if tokenize == "gumbel_argmax":
        likeliest = model.eval().visual_tokenizer(patches, grids)
        assert torch.equal(likeliest, model.visual_tokenizer(patches, grids))  # answers do not change from day to day
        model.train()
    torch.manual_seed(3)
    words = model.visual_tokenizer(patches, grids).argmax(dim=-1)
    torch.manual_seed(3)
    torch.testing.assert_close(model.visual(patches, grids), model.vte(words))
    if tokenize == "gumbel_argmax":
        model.visual_tokenizer.tau = 0.05  # what annealing sets
        assert (model.visual_tokenizer(patches, grids).argmax(dim=-1) != words).any()  # drawn anew


def test_the_table_starts_like_the_word_embedding() -> None:
    torch.manual_seed(0)
    model = Ovis2(PRESETS["ovis2-tiny"])
    assert model.vte.weight.std().item() == pytest.approx(0.02, rel=0.02)
    with torch.no_grad():
        model.llm.model.embed_tokens.weight.normal_(0.5, 2.0)
    model.renew_table()
    assert model.vte.weight.mean().item() == pytest.approx(0.5, abs=0.05)
    assert model.vte.weight.std().item() == pytest.approx(2.0, rel=0.02)


# --- batches ------------------------------------------------------------------------------------------------------------


def row_of(batch: Ovis2Batch, row: int, tiles: slice) -> Ovis2Batch:
    """One row alone, without its padding."""
    keep = batch.valid_BL[row]
    before = int((batch.ids_BL[:row] == TILE).sum())
    count = int((batch.ids_BL[row] == TILE).sum())
    labels = None if batch.labels_BL is None else batch.labels_BL[row : row + 1, keep]
    patches = batch.patches_NF[tiles.start * 16 : tiles.stop * 16]
    visual = batch.visual_P[before : before + count] - tiles.start * 4
    ids = batch.ids_BL[row : row + 1, keep]
    return Ovis2Batch(ids, torch.ones_like(ids).bool(), labels, patches, batch.grids[tiles], visual)


def test_rows_of_a_batch_equal_rows_alone() -> None:
    model, batch, asked = filled(), two_rows(), two_rows(learn=False)
    with torch.no_grad():
        together, _ = model.next_token(batch)
        answers = model.answer(asked, 8, ())
        for row, tiles in enumerate((slice(0, 4), slice(4, 5))):
            alone, counts = model.next_token(row_of(batch, row, tiles))
            torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-4)
            assert counts.tolist() == [5]
            assert model.answer(row_of(asked, row, tiles), 8, ()) == [answers[row]]


def test_answers_are_greedy_and_end_before_a_stop_token() -> None:
    model = filled()
    batch = row_of(two_rows(learn=False), 0, slice(0, 4))
    [written] = model.answer(batch, 6, ())
    expected: list[int] = []
    with torch.no_grad():
        for _ in range(6):  # without a cache
            ids = torch.cat([batch.ids_BL, torch.tensor([expected], dtype=torch.long)], dim=1)
            longer = Ovis2Batch(ids, torch.ones_like(ids).bool(), None, batch.patches_NF, batch.grids, batch.visual_P)
            expected.append(int(model.llm.lm_head(model.hidden(longer)[0, -1]).argmax()))
    assert written == expected
    place = next(i for i in range(1, 6) if expected[i] not in expected[:i])
    assert model.answer(batch, 6, (expected[place],)) == [expected[:place]]


def test_a_batch_of_text_uses_every_parameter_in_training_and_changes_nothing() -> None:
    model = filled()
    row = Row([5, 6, 7, 8], [IGNORE, IGNORE, 7, 8], [], [])
    batch = collate([row], True, SMALL)
    assert batch.patches_NF.shape == (0, 48)
    expected, _ = model.next_token(batch)
    model.train()
    sums, _ = model.next_token(batch)
    assert torch.equal(sums, expected)
    sums.sum().backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None]
    assert unused == ["visual_tokenizer.backbone.trunk.post_trunk_norm.weight"]  # kept for its name only
    assert not model.visual_tokenizer.head[0].weight.grad.any()


def test_a_cast_to_bfloat16_leaves_the_rotary_frequencies_alone() -> None:
    model, batch = filled(), two_rows()
    with torch.no_grad():
        expected, _ = model.next_token(batch)
        before = model.llm.model.rotary_emb.inv_freq.clone()
        model.to(torch.bfloat16)
        after, dtype = model.llm.model.rotary_emb.inv_freq, model.vte.weight.dtype
        assert dtype == torch.bfloat16 and torch.equal(after, before)
        found, _ = model.next_token(batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    model = filled()
    weights.save(model.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        other = Ovis2(SMALL).eval()
    other.to_empty(device="cpu")
    weights.load(other, tmp_path)
    assert other.llm.lm_head.weight is other.llm.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(other.next_token(two_rows())[0], model.next_token(two_rows())[0])


def test_parts_come_from_public_checkpoints_of_other_models(tmp_path: Path) -> None:
    model, source = Ovis2(SMALL), filled()
    for part, found in (("llm", source.llm), ("encoder", source.visual_tokenizer.backbone)):
        path = tmp_path / f"{part}.safetensors"
        weights.save(found.state_dict(), path)  # as transformers and apple/aimv2 name them
        weights.load_part(model, path, weights.prefixed(model, path, model.pretrained[part]))
    loaded = [n for n, p in model.named_parameters() if torch.equal(p, source.get_parameter(n))]
    assert loaded == [n for n, _ in model.named_parameters() if n.startswith(("llm.", "visual_tokenizer.backbone."))]


def test_no_labels_no_loss() -> None:
    with pytest.raises(X2IError, match="labels=True"):
        filled().next_token(two_rows(learn=False))


# --- learning ---------------------------------------------------------------------------------------------------------------


def naming(shift: int) -> Ovis2Batch:
    """Bare captions that name the colour of a square; shifted, each square has its neighbour's name."""
    values = list(COLOURS.values())
    chats = [Chat((Message("assistant", name),), (solid(values[(i + shift) % 4]),)) for i, name in enumerate(COLOURS)]
    return processor().chats(chats, labels=True, plain=True)


def train(model: Ovis2, batch: Ovis2Batch, parts: tuple[str, ...], lr: float, steps: int) -> float:
    prefixes = tuple(prefix for part in parts for prefix in model.parts[part])
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if n.startswith(prefixes)], lr=lr)
    for _ in range(steps):
        sums, counts = model.next_token(batch)
        model.zero_grad()
        (sums.sum() / counts.sum()).backward()
        optimizer.step()
    with torch.no_grad():
        return float(model.next_token(batch)[0].mean())


def test_it_learns_to_name_colours_and_the_visual_table_carries_them() -> None:
    torch.manual_seed(0)
    model = Ovis2(processor().config)
    right, wrong = naming(0), naming(1)
    assert train(model, right, STAGES["3"], lr=2e-3, steps=40) < 1.0  # nats; without its eyes at least log 4 = 1.39
    with torch.no_grad():
        assert (model.next_token(wrong)[0] > 5).all()  # what it says depends on the picture
    assert model.vte.weight.grad is not None and model.visual_tokenizer.head[0].weight.grad is not None
    assert model.vte.weight.grad[:-5].abs().max() > 0 and model.visual_tokenizer.head[0].weight.grad.abs().max() > 0
    assert train(model, wrong, ("table",), lr=3e-2, steps=15) < 4.0  # the table alone can exchange the names

    asked = processor().chats([Chat((), (solid(c),)) for c in COLOURS.values()], labels=False, plain=True)
    words = [processor().text(ids)[:3] for ids in model.answer(asked, 3, processor().stop)]
    names_of = list(COLOURS)
    assert sum(word == names_of[i - 1][:3] for i, word in enumerate(words)) >= 3
