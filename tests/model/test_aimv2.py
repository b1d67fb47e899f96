"""AIMv2 and Ovis's visual tokenizer are the published ones: names, counts, outputs; packed images stay apart."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.ovis2.modeling_ovis2 import hard_softmax

from x2i.base.errors import X2IError
from x2i.model.filling import draw, fill
from x2i.model.layers.aimv2 import AIMv2, merge_order, patchify
from x2i.model.layers.config import AIMv2Config, VisualTokenizerConfig
from x2i.model.layers.visual_tokenizer import (
    VisualEmbedding,
    VisualTokenizer,
    annealed_tau,
    initialise_like,
    tokenize,
)
from x2i.model.ovis2 import verify as of_ovis2
from x2i.model.ovis_u1 import verify as of_ovis_u1
from x2i.model.verify import compared

SMALL, FIXED = of_ovis_u1.ENCODER, of_ovis2.SMALL.tokenizer.encoder


def encoder(config: AIMv2Config = SMALL, std: float = 0.3) -> AIMv2:
    model = AIMv2(config).eval()
    fill(model, std)
    return model


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_counts_of_the_published_encoder_and_tokenizers() -> None:
    with torch.device("meta"):
        u1 = VisualTokenizer(VisualTokenizerConfig())
        ovis2 = VisualTokenizer(VisualTokenizerConfig(encoder=AIMv2Config(rope=False), indicators=5))
        table = VisualEmbedding(65_536, 2048)
    assert count(u1.backbone) == 309_984_256
    assert count(u1) == 578_534_392
    assert count(ovis2) == 578_530_294
    assert count(table) == 134_217_728


def test_published_names() -> None:
    with torch.device("meta"):
        state = VisualTokenizer(VisualTokenizerConfig()).state_dict()
    block = ["attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2", "mlp.fc3", "norm_1", "norm_2"]
    expected = {f"backbone.trunk.blocks.{i}.{name}.weight" for i in range(24) for name in block}
    patchifier = ("proj.weight", "proj.bias", "norm.weight")
    expected |= {f"backbone.preprocessor.patchifier.{name}" for name in patchifier}
    expected |= {"backbone.preprocessor.pos_embed", "backbone.trunk.post_trunk_norm.weight"}
    assert set(state) == expected | {"head.0.weight", "head.1.weight", "head.1.bias"}
    assert state["backbone.preprocessor.patchifier.proj.weight"].shape == (1024, 3, 14, 14)
    assert state["backbone.preprocessor.pos_embed"].shape == (1, 1024, 1024)
    assert state["head.0.weight"].shape == (65_532, 4096)


def test_native_resolution_gives_the_published_codes_figures() -> None:
    """Figures of AIMv2Model in AIDC-AI/Ovis-U1-3B's modeling_aimv2.py (hidden_states[-1]) on the same weights,
    with attention within each image in place of flash_attn; two images of 24 x 40 and 56 x 16 pixels."""
    row = compared("ovis_u1", of_ovis_u1.outputs()[0])
    assert (row.what, row.how) == ("encoder at native resolution, two images", "recorded")
    assert row.largest > 20
    assert row.difference is not None and row.difference < 2e-4


def test_packed_images_equal_each_alone() -> None:
    model = encoder()
    images = [draw(1, 3, 16, 24), draw(2, 3, 16, 24), draw(3, 3, 40, 8), draw(4, 3, 32, 32), draw(5, 3, 16, 24)]
    with torch.no_grad():
        packed = model(*patchify(images, 4, 2))
        alone = torch.cat([model(*patchify([image], 4, 2)) for image in images])
    torch.testing.assert_close(packed, alone, rtol=0, atol=2e-5)


def test_patches_are_the_convolutions_in_merge_order() -> None:
    model = encoder()
    image = draw(1, 3, 16, 24)
    patches, (grid,) = patchify([image], 4, 2)
    with torch.no_grad():
        tokens = model.preprocessor.patchifier(patches)
        whole = model.preprocessor.patchifier.proj(image[None])[0].permute(1, 2, 0)
        whole = merge_order(model.preprocessor.patchifier.norm(whole), 2)
    assert grid == (4, 6)
    torch.testing.assert_close(tokens, whole, rtol=0, atol=1e-5)
    # the first block holds the four patches of the upper left corner
    assert torch.equal(patches[1], image[:, :4, 4:8].flatten())
    assert torch.equal(patches[2], image[:, 4:8, :4].flatten())
    assert torch.equal(patches[4], image[:, :4, 8:12].flatten())


def test_gradients_reach_every_parameter_but_the_norm_that_is_not_applied() -> None:
    model = encoder()
    model(*patchify([draw(1, 3, 16, 24)], 4, 2)).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == ["trunk.post_trunk_norm.weight"]


@pytest.mark.parametrize(
    ("rows", "columns", "config", "words"),
    [(6, 10, SMALL, "need patches"), (3, 4, SMALL, "multiples"), (2, 8, FIXED, "resize images to 16 x 16")],
)
def test_wrong_grids_are_told(rows: int, columns: int, config: AIMv2Config, words: str) -> None:
    patches = draw(1, 12 if rows == 3 else 16, 48)
    with pytest.raises(X2IError, match=words):
        encoder(config)(patches, [(rows, columns)])


def test_images_that_cannot_be_cut_are_told() -> None:
    with pytest.raises(X2IError, match="multiples of 8"):
        patchify([draw(1, 3, 16, 20)], 4, 2)
    with pytest.raises(X2IError, match="no images"):
        patchify([], 4, 2)


@torch.no_grad()
def test_fixed_table_equals_transformers_aimv2() -> None:
    ours, theirs = of_ovis2.encoded()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-5)


@torch.no_grad()
def test_tokenizer_equals_transformers_ovis2_but_for_the_last_norm() -> None:
    """transformers feeds the head with features after the trunk's norm; AIDC-AI/Ovis, and so we, before it."""
    mine, without_norm = of_ovis2.tokenized(normed=False)
    normed, as_published_there = of_ovis2.tokenized(normed=True)
    assert mine.shape == (20, 59)
    torch.testing.assert_close(mine, without_norm, rtol=0, atol=1e-5)
    torch.testing.assert_close(normed, as_published_there, rtol=0, atol=1e-5)
    assert (mine - as_published_there).abs().max() > 1e-2


def test_weights_sum_to_one_and_indicators_get_none() -> None:
    for how in ("softmax", "gumbel_argmax", "st_argmax"):
        ours = VisualTokenizer(VisualTokenizerConfig(encoder=FIXED, vocab_size=60, indicators=5, tokenize=how)).eval()
        fill(ours, 0.3)
        weights = ours(*patchify([draw(1, 3, 16, 16)], 4, 2))
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4))
        assert weights[:, -5:].abs().sum() == 0


def test_hard_tokens_are_one_word_in_any_dtype_and_look_up_its_row() -> None:
    table = VisualEmbedding(40, 8)
    logits = draw(1, 6, 40) * 30
    for dtype in (torch.float32, torch.bfloat16):
        chosen = tokenize(logits.to(dtype), "st_argmax")
        assert torch.equal(chosen, F.one_hot(logits.to(dtype).argmax(-1), 40).to(dtype))
    torch.testing.assert_close(table(tokenize(logits, "st_argmax")), table(logits.argmax(-1)), rtol=0, atol=1e-6)


def test_straight_through_gradient_is_the_repositorys_and_not_that_of_transformers() -> None:
    row = draw(2, 40)
    gradients = []
    for way in (lambda x: tokenize(x, "st_argmax"), lambda x: hard_softmax(x, -1)):
        logits = draw(1, 6, 40).requires_grad_()
        chosen = way(logits)
        (chosen @ row).sum().backward()
        gradients.append((chosen.detach(), logits.grad))
    (ours, gradient), (theirs, other) = gradients
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, row.expand(6, -1))
    assert (gradient - other).abs().max() > 0.1


def test_gumbel_equals_torchs_and_takes_a_generator() -> None:
    logits = draw(1, 6, 40)
    torch.manual_seed(3)
    expected = F.gumbel_softmax(logits, tau=0.7, hard=True)
    drawn = tokenize(logits, "gumbel_argmax", 0.7, torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn, expected)


def test_unknown_way_is_told() -> None:
    with pytest.raises(X2IError, match="st_argmax"):
        tokenize(draw(1, 2, 3), "argmax")


def test_temperature_falls_linearly() -> None:
    assert [annealed_tau(step, 10) for step in (0, 5, 10, 11)] == pytest.approx([5.0, 2.525, 0.05, 0.05])


def test_table_takes_ids_and_weights_and_starts_like_the_language_models() -> None:
    table = VisualEmbedding(500, 64)
    initialise_like(table, draw(1, 300, 64) * 0.02 + 0.01)
    assert table.weight.mean().item() == pytest.approx(0.01, abs=1e-3)
    assert table.weight.std().item() == pytest.approx(0.02, abs=1e-3)
    weights = draw(2, 3, 500).softmax(-1)
    torch.testing.assert_close(table(weights), weights @ table.weight)
    assert torch.equal(table(torch.tensor([499, 0])), table.weight[[499, 0]])
