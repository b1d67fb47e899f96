"""OmniGen is the published model: its count, its names, its outputs (against diffusers' class), its mask."""

import pytest
import torch
from torch import nn

from x2i.base.errors import X2IError
from x2i.model.omnigen import names
from x2i.model.omnigen.config import PRESETS, LongRope, OmniGenConfig
from x2i.model.omnigen.masks import hybrid_mask
from x2i.model.omnigen.model import OmniGen
from x2i.model.omnigen.prompt import Prompt, PromptBatch, collate

SMALL = OmniGenConfig(
    hidden_size=32,
    layers=2,
    heads=4,
    kv_heads=4,
    intermediate_size=48,
    vocab_size=100,
    max_positions=512,
    in_channels=4,
    pos_embed_max_size=16,
    pos_embed_base_size=64,
    time_dim=16,
    rope_scaling=LongRope(short_factor=(1.0, 1.1, 1.2, 1.3), long_factor=(2.0, 3.0, 4.0, 5.0), original=128),
)


#: The trunks that are tested: Phi-3 with its long-rope; Qwen3 with heads wider than their share; Llama with few keys.
TRUNKS = {
    "phi3": SMALL,
    "qwen3": SMALL.model_copy(update={"trunk": "qwen3", "trunk_options": {"head_dim": 12}, "rope_scaling": None}),
    "llama": SMALL.model_copy(update={"trunk": "llama", "kv_heads": 2, "rope_scaling": None}),
}


def randomised(config: OmniGenConfig = SMALL) -> OmniGen:
    """A model whose every parameter is random, the zero-initialised head too."""
    torch.manual_seed(0)
    model = OmniGen(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def text(length: int, seed: int) -> Prompt:
    ids = torch.randint(3, 100, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Prompt(tuple(ids), (0,) * length, ())


def with_images(seed: int, before: int, *sizes: int, after: int = 3) -> Prompt:
    """Text, then image, then text …: `sizes` are the images' tokens."""
    ids, blocks = list(text(before, seed).ids), [0] * before
    for place, size in enumerate(sizes, 1):
        ids += [0] * size + list(text(after, seed + place).ids)
        blocks += [place] * size + [0] * after
    return Prompt(tuple(ids), tuple(blocks), tuple(range(len(sizes))))


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


@pytest.mark.parametrize("sizes", [(), (6,), (4, 6, 9)], ids=["text", "one image", "three images"])
@pytest.mark.parametrize("long", [False, True], ids=["short", "past the long-rope switch"])
def test_outputs_equal_those_of_diffusers(sizes: tuple[int, ...], long: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    ours = randomised()
    rope = SMALL.rope_scaling
    assert rope is not None
    theirs = diffusers.OmniGenTransformer2DModel(
        in_channels=4,
        patch_size=2,
        hidden_size=32,
        rms_norm_eps=SMALL.norm_eps,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=48,
        num_layers=2,
        pad_token_id=2,
        vocab_size=100,
        max_position_embeddings=512,
        original_max_position_embeddings=128,
        rope_scaling={"short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)},
        pos_embed_max_size=16,
        time_step_dim=16,
    ).eval()
    theirs.load_state_dict(names.to_diffusers(ours.state_dict(), SMALL))

    # rows of unequal length; the first is the longest, since diffusers takes every row's positions from the first
    prompts = [with_images(1, 150 if long else 12, *sizes), text(7, seed=9)]
    grids = {4: (4, 4), 6: (4, 6), 9: (6, 6)}
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(4, *grids[s], generator=generator) for s in sizes]
    batch = collate(prompts, [images, []])
    x, t = torch.randn(2, 4, 6, 10, generator=generator), torch.tensor([0.3, 0.8])
    noisy = 3 * 5

    length = batch.ids_BL.shape[1]
    spans: dict[int, list[list[int]]] = {}
    for block in range(1, len(sizes) + 1):
        where = (batch.blocks_BL[0] == block).nonzero().flatten()
        spans.setdefault(0, []).append([int(where[0]), int(where[-1]) + 1])
    positions = torch.zeros(2, length + 1 + noisy, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        pad = length - len(prompt.ids)
        positions[row, pad:] = torch.arange(length + 1 + noisy - pad)
    with torch.no_grad():
        expected = theirs(
            hidden_states=x,
            timestep=t,
            input_ids=batch.ids_BL,
            input_img_latents=[i[None] for i in images],
            input_image_sizes=spans,
            attention_mask=hybrid_mask(batch.valid_BL, batch.blocks_BL, noisy).float(),
            position_ids=positions,
            return_dict=False,
        )[0]
        found = ours(x, t, batch)
    assert found.shape == x.shape
    assert found.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


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
    diffusers = pytest.importorskip("diffusers")
    config = PRESETS["omnigen-3.8b"]
    with torch.device("meta"):
        ours = names.to_diffusers(OmniGen(config).state_dict(), config)
        rope = {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
        theirs = diffusers.OmniGenTransformer2DModel(rope_scaling=rope).state_dict()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}


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
