"""OmniGen is the published model: its count, its names, its outputs (against diffusers' class), its mask."""

import pytest
import torch

from x2i.base.errors import X2IError
from x2i.model.omnigen import names, verify
from x2i.model.omnigen.config import PRESETS
from x2i.model.omnigen.masks import hybrid_mask
from x2i.model.omnigen.model import OmniGen
from x2i.model.omnigen.prompt import PromptBatch, collate
from x2i.model.omnigen.verify import SMALL, randomised, text, with_images
from x2i.model.verify import Comparison, compared

#: The trunks that are tested: Phi-3 with its long-rope; Qwen3 with heads wider than their share; Llama with few keys.
TRUNKS = {
    "phi3": SMALL,
    "qwen3": SMALL.model_copy(update={"trunk": "qwen3", "trunk_options": {"head_dim": 12}, "rope_scaling": None}),
    "llama": SMALL.model_copy(update={"trunk": "llama", "kv_heads": 2, "rope_scaling": None}),
}


def test_published_model_has_the_published_count_and_names() -> None:
    with torch.device("meta"):
        model = OmniGen(PRESETS["omnigen-3.8b"])
    assert sum(p.numel() for p in model.parameters()) == 3_762_072_592
    state = model.state_dict()
    assert state["pos_embed"].numel() == 113_246_208
    expected = {
        "llm.embed_tokens.weight": (32064, 3072),
        "llm.layers.0.self_attn.qkv_proj.weight": (9216, 3072),
        "llm.layers.31.self_attn.o_proj.weight": (3072, 3072),
        "llm.layers.31.mlp.gate_up_proj.weight": (16384, 3072),
        "llm.layers.31.mlp.down_proj.weight": (3072, 8192),
        "llm.layers.31.input_layernorm.weight": (3072,),
        "llm.layers.31.post_attention_layernorm.weight": (3072,),
        "llm.norm.weight": (3072,),
        "x_embedder.proj.weight": (3072, 4, 2, 2),
        "x_embedder.proj.bias": (3072,),
        "input_x_embedder.proj.weight": (3072, 4, 2, 2),
        "time_token.mlp.0.weight": (3072, 256),
        "time_token.mlp.2.bias": (3072,),
        "t_embedder.mlp.2.weight": (3072, 3072),
        "pos_embed": (1, 36864, 3072),
        "final_layer.linear.weight": (16, 3072),
        "final_layer.adaLN_modulation.1.weight": (6144, 3072),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected
    # 6 tensors a layer; embedding and norm; two patchers, two time MLPs, two head linears; the table
    assert len(state) == 32 * 6 + 2 + 4 + 8 + 4 + 1
    assert model.llm.rotary_emb.attention_scaling == pytest.approx(1.1902381)


@pytest.mark.parametrize("comparison", verify.outputs(), ids=lambda comparison: comparison.what)
def test_outputs_equal_those_of_diffusers_and_of_the_published_code(comparison: Comparison) -> None:
    row = compared("omnigen", comparison)
    assert row.how == ("live" if "diffusers" in row.public else "recorded")
    assert row.largest > 1
    assert row.difference is not None and row.difference < 2e-5


def test_names_of_diffusers_lead_back_to_ours() -> None:
    model = OmniGen(SMALL.model_copy(update={"kv_heads": 2}))
    state = model.state_dict()
    there = names.to_diffusers(state, model.config)
    assert {"patch_embedding.pos_embed", "layers.1.self_attn.to_k.weight", "norm_out.linear.bias"} <= there.keys()
    back = names.from_diffusers(there, model.config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)

    del there["layers.0.self_attn.to_v.weight"]
    with pytest.raises(X2IError, match=r"missing layers.0.self_attn.to_v.weight"):
        names.from_diffusers(there, model.config)
    with pytest.raises(X2IError, match="not a weight of OmniGen: head.weight"):
        names.to_diffusers({"head.weight": state["pos_embed"]}, model.config)
    with pytest.raises(X2IError, match="phi3 trunk, this one llama"):
        names.to_diffusers(state, TRUNKS["llama"])


def test_published_names_become_those_of_the_whole_diffusers_model() -> None:
    checkpoint, diffusers = verify.names("omnigen-3.8b")
    assert (checkpoint.matched, checkpoint.ours, checkpoint.published) == (211, 211, 211)
    assert (diffusers.matched, diffusers.ours, diffusers.published) == (275, 275, 275)
    with torch.device("meta"):
        theirs = verify.of_diffusers(PRESETS["omnigen-3.8b"])
    assert sum(p.numel() for p in theirs.parameters()) == 3_762_072_592


def test_other_trunks_are_what_transformers_counts() -> None:
    with torch.device("meta"):
        model = OmniGen(PRESETS["omnigen-qwen3-1.7b"])
    assert sum(p.numel() for p in model.llm.parameters()) == 1_720_574_976  # Qwen3-1.7B without its tied head
    assert not hasattr(model, "lm_head")
    with pytest.raises(X2IError, match="trunk 'qwen33'"):
        OmniGen(SMALL.model_copy(update={"trunk": "qwen33"}))


def test_rotary_frequencies_survive_a_cast_and_the_meta_device() -> None:
    model = OmniGen(SMALL)
    kept = model.llm.rotary_emb.inv_freq.clone()
    assert model.to(torch.bfloat16).llm.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(model.llm.rotary_emb.inv_freq, kept)
    x, t = torch.randn(1, 4, 4, 4), torch.tensor([0.5])
    assert model(x, t, collate([with_images(1, 3, 4)], [[torch.randn(4, 4, 4)]])).dtype == torch.bfloat16
    with torch.device("meta"):
        empty = OmniGen(SMALL)
    assert torch.equal(empty.to_empty(device="cpu").llm.rotary_emb.inv_freq, kept)


def test_mask_of_a_padded_row_with_an_image() -> None:
    valid = torch.tensor([[False, True, True, True, True]])
    blocks = torch.tensor([[0, 0, 1, 1, 0]])
    allowed = hybrid_mask(valid, blocks, noisy=2)[0].int().tolist()
    assert allowed == [
        # pad text image image text time noisy noisy
        [1, 1, 1, 1, 1, 1, 1, 1],  # padding: anything but an empty row
        [0, 1, 0, 0, 0, 0, 0, 0],  # text: what came before
        [0, 1, 1, 1, 0, 0, 0, 0],  # image: itself, both ways
        [0, 1, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 1, 1, 0, 0],  # time: all of the condition, no noise
        [0, 1, 1, 1, 1, 1, 1, 1],  # noisy: everything
        [0, 1, 1, 1, 1, 1, 1, 1],
    ]


def changed(model: OmniGen, batch: PromptBatch, other: PromptBatch, x: torch.Tensor, y: torch.Tensor) -> list[bool]:
    """At which positions the trunk's output differs between two inputs."""
    t = torch.tensor([0.5])
    with torch.no_grad():
        difference = model.hidden(x, t, model.condition(batch)) - model.hidden(y, t, model.condition(other))
    return (difference.abs().amax(dim=-1)[0] > 1e-6).tolist()


@pytest.mark.parametrize("trunk", TRUNKS)
def test_the_mask_is_what_acts_in_the_trunk(trunk: str) -> None:
    model = randomised(TRUNKS[trunk])
    prompt = with_images(1, 3, 4, after=3)  # text 0-2, image 3-6, text 7-9, then time 10 and noisy 11-12
    image = torch.randn(4, 4, 4)
    batch, x = collate([prompt], [[image]]), torch.randn(1, 4, 2, 4)

    later = batch.ids_BL.clone()
    later[0, 8] = 99 if later[0, 8] != 99 else 98
    edited = PromptBatch(later, batch.valid_BL, batch.blocks_BL, batch.images)
    assert changed(model, batch, edited, x, x) == [False] * 8 + [True] * 5

    corner = image.clone()
    corner[:, 2:, 2:] += 1  # the last patch only: its block sees it, both ways; the text before does not
    edited = collate([prompt], [[corner]])
    assert changed(model, batch, edited, x, x) == [False] * 3 + [True] * 10

    noise = x.clone()
    noise[..., 2:] += 1  # the last noisy patch: the other noisy one sees it, nothing earlier does
    assert changed(model, batch, batch, x, noise) == [False] * 11 + [True] * 2


@pytest.mark.parametrize("trunk", TRUNKS)
def test_padding_changes_nothing(trunk: str) -> None:
    model = randomised(TRUNKS[trunk])
    prompts, images = [with_images(1, 9, 4), text(5, seed=3)], [[torch.randn(4, 4, 4)], []]
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        together = model(x, t, collate(prompts, images))
        alone = [model(x[i : i + 1], t[i : i + 1], collate([prompts[i]], [images[i]])) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_first_output_is_zero_and_gradients_reach_the_head() -> None:
    model = OmniGen(SMALL)
    x, t = torch.randn(1, 4, 4, 4), torch.tensor([0.5])
    out = model(x, t, collate([text(4, seed=0)], [[]]))
    assert torch.equal(out, torch.zeros_like(x))
    (out - 1).pow(2).mean().backward()
    assert model.final_layer.linear.bias.grad is not None and model.final_layer.linear.bias.grad.abs().sum() > 0


def test_an_image_that_does_not_fit_the_table_is_refused() -> None:
    model = OmniGen(SMALL)
    prompt = collate([text(4, seed=0)], [[]])
    with pytest.raises(X2IError, match="at most 32"):
        model(torch.randn(1, 4, 34, 4), torch.tensor([0.5]), prompt)
    with pytest.raises(X2IError, match="multiple of 2"):
        model(torch.randn(1, 4, 3, 4), torch.tensor([0.5]), prompt)
