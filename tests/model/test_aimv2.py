"""AIMv2 and Ovis's visual tokenizer are the published ones: names, counts, outputs; packed images stay apart."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Aimv2VisionConfig, Aimv2VisionModel, Ovis2VisionConfig
from transformers.models.ovis2.modeling_ovis2 import Ovis2VisionModel, hard_softmax

from tests.model.filling import fill
from x2i.base.errors import X2IError
from x2i.model.layers.aimv2 import AIMv2, merge_order, patchify
from x2i.model.layers.config import AIMv2Config, VisualTokenizerConfig
from x2i.model.layers.visual_tokenizer import (
    VisualEmbedding,
    VisualTokenizer,
    annealed_tau,
    initialise_like,
    tokenize,
)

SMALL = AIMv2Config(hidden_size=32, layers=2, heads=2, intermediate_size=48, patch_size=4, image_size=32)
FIXED = SMALL.model_copy(update={"rope": False})


def draw(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)).float()


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
    patches, grids = patchify([draw(1, 3, 24, 40), draw(2, 3, 56, 16)], 4, 2)
    assert grids == [(6, 10), (14, 4)]
    with torch.no_grad():
        flat = encoder()(patches, grids).double().flatten()
    figures = [3.223115, 0.947681, -6.431258, -3.418037, -7.251678, 2.529290]
    figures += [-5.491569, -3.888959, -4.364002, 7.050662, 1.968625, -3.894120]
    assert flat[:: len(flat) // 12][:12].tolist() == pytest.approx(figures, abs=1e-4)
    assert flat.mean().item() == pytest.approx(-0.038298, abs=1e-5)
    assert flat.std(correction=0).item() == pytest.approx(6.107359, abs=1e-4)


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
    [(6, 10, SMALL, "need patches"), (3, 4, SMALL, "multiples"), (4, 4, FIXED, "resize images to 32 x 32")],
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


def blocks_of_transformers(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Our names and tensors from those of transformers' encoders (Aimv2 and Ovis2 share them)."""
    ours = {}
    for i in range(FIXED.layers):
        at = f"{prefix}encoder.layers.{i}."
        qkv = [state[f"{at}attention.{part}_proj.weight"] for part in "qkv"]
        ours[f"trunk.blocks.{i}.attn.qkv.weight"] = torch.cat(qkv)
        ours[f"trunk.blocks.{i}.attn.proj.weight"] = state[f"{at}attention.out_proj.weight"]
        for mine, theirs in (("fc1", "gate_proj"), ("fc2", "down_proj"), ("fc3", "up_proj")):
            ours[f"trunk.blocks.{i}.mlp.{mine}.weight"] = state[f"{at}ffn.{theirs}.weight"]
        for k in (1, 2):
            ours[f"trunk.blocks.{i}.norm_{k}.weight"] = state[f"{at}rms_norm{k}.weight"]
    patch = "patch_embed" if f"{prefix}embeddings.patch_embed.weight" in state else "patch_embedding"
    for kind in ("weight", "bias"):
        ours[f"preprocessor.patchifier.proj.{kind}"] = state[f"{prefix}embeddings.{patch}.{kind}"]
    ours["preprocessor.patchifier.norm.weight"] = state[f"{prefix}embeddings.rms_norm.weight"]
    ours["preprocessor.pos_embed"] = state[f"{prefix}embeddings.position_embedding.weight"][None]
    ours["trunk.post_trunk_norm.weight"] = state[f"{prefix}rms_norm.weight"]
    return ours


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "patch_size": 4}


def test_fixed_table_equals_transformers_aimv2() -> None:
    theirs = Aimv2VisionModel(Aimv2VisionConfig(**SIZES, image_size=32, use_head=False)).eval()
    fill(theirs, 0.3)
    ours = AIMv2(FIXED).eval()
    ours.load_state_dict(blocks_of_transformers(theirs.state_dict(), ""))
    images = draw(1, 2, 3, 32, 32)
    with torch.no_grad():
        normed = theirs(images).last_hidden_state.view(2, 8, 8, 32)
        features = ours(*patchify(list(images), 4, 2))
    expected = torch.cat([merge_order(grid, 2) for grid in normed])
    torch.testing.assert_close(ours.trunk.post_trunk_norm(features), expected, rtol=0, atol=2e-5)


def ovis2(how: str) -> tuple[Ovis2VisionModel, VisualTokenizer]:
    """transformers' vision model of Ovis2 and our tokenizer, on the same weights."""
    theirs = Ovis2VisionModel(
        Ovis2VisionConfig(**SIZES, image_size=32, vocab_size=60, hidden_stride=2, tokenize_function=how)
    ).eval()
    fill(theirs, 0.3)
    config = VisualTokenizerConfig(encoder=FIXED, vocab_size=60, indicators=5, tokenize=how)
    ours = VisualTokenizer(config).eval()
    state = theirs.state_dict()
    mapped = {f"backbone.{k}": v for k, v in blocks_of_transformers(state, "transformer.").items()}
    mapped |= {"head.0.weight": state["head_linear.weight"]}
    mapped |= {f"head.1.{kind}": state[f"head_norm.{kind}"] for kind in ("weight", "bias")}
    ours.load_state_dict(mapped)
    return theirs, ours


def test_tokenizer_equals_transformers_ovis2_but_for_the_last_norm() -> None:
    """transformers feeds the head with features after the trunk's norm; AIDC-AI/Ovis, and so we, before it."""
    theirs, ours = ovis2("softmax")
    images = draw(1, 2, 3, 32, 32)
    patches, grids = patchify(list(images), 4, 2)
    with torch.no_grad():
        published = theirs(images).pooler_output.flatten(0, 1)
        mine = ours(patches, grids)
        normed = ours.backbone.trunk.post_trunk_norm(ours.backbone(patches, grids))
        as_transformers = tokenize(ours.head(normed.view(32, -1)), "softmax")
        theirs.transformer.rms_norm = nn.Identity()
        without_norm = theirs(images).pooler_output.flatten(0, 1)
    assert mine.shape == (32, 60)
    torch.testing.assert_close(mine[:, :-5], without_norm, rtol=0, atol=1e-5)
    torch.testing.assert_close(as_transformers, published, rtol=0, atol=1e-5)
    assert (mine[:, :-5] - published).abs().max() > 1e-2


def test_weights_sum_to_one_and_indicators_get_none() -> None:
    for how in ("softmax", "gumbel_argmax", "st_argmax"):
        _, ours = ovis2(how)
        weights = ours(*patchify([draw(1, 3, 32, 32)], 4, 2))
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(16))
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
