"""Ovis-U1 is the published one: names, counts, prompts, outputs; its stages train what they name.

Figures were recorded from the published code (modeling_ovis_u1.py and modeling_yak.py of AIDC-AI/Ovis-U1-3B, run by
test_txt_to_img.py and test_img_edit.py of AIDC-AI/Ovis-U1, in float32) on the weights of `fill`.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.model.test_chat import byte_tokenizer
from x2i.base.errors import X2IError
from x2i.model import flow
from x2i.model.base import Branches, Chat, Message, Request
from x2i.model.config import PixelsConfig
from x2i.model.filling import fill
from x2i.model.layers.config import AIMv2Config, VisualTokenizerConfig
from x2i.model.ovis_u1.config import PARTS, PRESETS, STAGES, OvisU1Config, Qwen3Numbers
from x2i.model.ovis_u1.decoder_config import DecoderConfig
from x2i.model.ovis_u1.model import LanguageModel, OvisU1
from x2i.model.ovis_u1.names import split_vae, with_vae
from x2i.model.ovis_u1.processor import OvisU1Processor
from x2i.model.ovis_u1.prompt import OvisInputs
from x2i.model.sampling import Options, Painter
from x2i.model.vae import Pixels

TOKENIZER = byte_tokenizer()
SMALL = OvisU1Config(
    llm=Qwen3Numbers(
        hidden_size=32,
        layers=3,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate_size=48,
        vocab_size=TOKENIZER.get_vocab_size(),
        max_positions=1024,
    ),
    tokenizer=VisualTokenizerConfig(
        encoder=AIMv2Config(hidden_size=32, layers=2, heads=2, intermediate_size=48, patch_size=4, image_size=32),
        vocab_size=64,
    ),
    decoder=DecoderConfig(
        vec_in_dim=48, context_in_dim=64, hidden_size=48, heads=2, depth=1, depth_single=1, axes_dim=(8, 8, 8),
        refiner_heads=4,
    ),
    min_pixels=32 * 32,
    max_pixels=64 * 64,
    max_tokens=512,
)  # fmt: skip


class Means:
    """A stand-in for an autoencoder of 4 channels, 8 pixels per latent: means of the colours, and of all of them."""

    channels, shrink = 4, 8

    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        means = torch.nn.functional.avg_pool2d(pixels, 8)
        return torch.cat([means, means.mean(dim=1, keepdim=True)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3].repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)

    def to(self, device: torch.device) -> Means:
        return self


def processor(config: OvisU1Config = SMALL, max_text_tokens: int | None = None) -> OvisU1Processor:
    return OvisU1Processor(config, TOKENIZER, Means(), max_text_tokens)


@cache
def model() -> OvisU1:
    made = OvisU1(SMALL).eval()
    fill(made, 0.1)
    return made


def picture(seed: int, height: int, width: int) -> np.ndarray:
    drawn = np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return drawn.repeat(8, axis=0).repeat(8, axis=1)


def noise(height: int, width: int) -> Tensor:
    drawn = np.random.Generator(np.random.PCG64(7)).standard_normal((1, 4, height // 8, width // 8))
    return torch.from_numpy(drawn).float()


ASK = Chat((Message("user", "<image>\nWhat is it?"),), (picture(3, 40, 56),))
TOLD = Chat((*ASK.messages, Message("assistant", "A cat.")), ASK.images)
EDIT = Request("<img><|image_1|></img> make it blue", (picture(1, 64, 96),))
DRAW = Request("a red square")


def check(x: Tensor, figures: list[float], mean: float, std: float) -> None:
    flat = x.double().flatten()
    assert flat[:: len(flat) // 12][:12].tolist() == pytest.approx(figures, abs=1e-4)
    assert flat.mean().item() == pytest.approx(mean, abs=1e-5)
    assert flat.std(correction=0).item() == pytest.approx(std, abs=1e-4)


def guided(branches: list[Branches[OvisInputs]], height: int, width: int, steps: int = 3) -> Tensor:
    """Latents of the first picture, drawn from `noise`."""
    with torch.no_grad():
        parts = [(model().condition(b.inputs), b) for b in branches]

        def velocity(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
            total = torch.zeros_like(x_BCHW)
            for condition, b in parts:
                each = model().velocity(x_BCHW[b.rows_R], t_B[b.rows_R], condition)
                total.index_add_(0, b.rows_R, each * b.weights_R[:, None, None, None])
            return total

        return flow.euler(velocity, noise(height, width), steps, processor().shift(height, width))


FIGURES: dict[str, Any] = {
    "edit": (
        [
            -0.15348,
            -0.858513,
            -0.111905,
            -0.831674,
            -1.568618,
            -1.166413,
            1.532139,
            0.455067,
            0.391549,
            -0.051967,
            -1.388662,
            0.929944,
        ],
        -0.164648,
        1.050788,
    ),
    "embeds": (
        [
            -0.177202,
            0.058528,
            -0.01279,
            0.003867,
            0.001043,
            -0.008286,
            -0.010101,
            -0.016398,
            0.038095,
            -0.147248,
            0.0281,
            0.099857,
        ],
        -0.004381,
        0.075948,
    ),
    "nll": 39.41111,
    "t2i": (
        [
            -0.153677,
            0.078646,
            -2.083309,
            0.575122,
            -1.439764,
            0.152212,
            -0.54536,
            0.485083,
            0.460635,
            -0.420643,
            -1.468034,
            0.774776,
        ],
        -0.058227,
        1.005517,
    ),
    "text": (
        [
            -0.072728,
            0.321298,
            -0.699212,
            0.016182,
            -0.202293,
            -0.458912,
            -0.111927,
            0.04323,
            -0.486378,
            -0.315167,
            -0.141862,
            0.556215,
        ],
        -0.008946,
        0.719733,
    ),
    "vector": (
        [
            -0.086252,
            0.065508,
            0.182243,
            -0.069316,
            -0.011216,
            -0.167316,
            0.134213,
            0.020219,
            0.176277,
            0.076884,
            -0.003911,
            0.03975,
        ],
        0.00609,
        0.126046,
    ),
}


# ---- the published model


def test_published_counts() -> None:
    with torch.device("meta"):
        made = OvisU1(PRESETS["ovis-u1-3b"])
    sizes = {name: p.numel() for name, p in made.named_parameters()}
    parts = {part: sum(n for name, n in sizes.items() if name.startswith(PARTS[part])) for part in PARTS}
    assert parts["llm"] == 1_720_574_976
    assert parts["encoder"] == 578_534_392
    assert parts["encoder"] - parts["head"] == 309_984_256
    assert parts["adapter"] == 134_217_728
    assert parts["refiner"] == 81_054_720
    assert parts["decoder"] == 1_046_172_688
    assert parts["all"] == sum(parts[p] for p in ("llm", "encoder", "adapter", "refiner", "decoder")) == 3_560_554_504
    assert {stage: sum(parts[p] for p in trained) for stage, trained in STAGES.items()} == {
        "s0": 1_127_227_408,
        "s1": 134_217_728,
        "s2": 712_752_120,
        "s3": 2_433_327_096,
        "s4": 1_127_227_408,
        "s5": 1_127_227_408,
    }


def test_published_names() -> None:
    """Names and shapes of all tensors but the autoencoder's and the copy of the embedding, at the published numbers."""
    with torch.device("meta"):
        state = OvisU1(PRESETS["ovis-u1-3b"]).state_dict()
    lines = "\n".join(f"{name} {list(state[name].shape)}" for name in sorted(state))
    assert len(state) == 812
    assert (
        hashlib.sha256(lines.encode()).hexdigest() == "2fa4a8b2f5977980e7c8d034913c44d70c04083a67ac8cab03d81840e2df2ed5"
    )


def test_published_file_is_split() -> None:
    state = {"llm.model.norm.weight": torch.ones(2), "llm.lm_head.weight": torch.zeros(3)}
    vae = {"decoder.conv_in.weight": torch.full((1,), 5.0)}
    mine, theirs = split_vae(with_vae(state, vae))
    assert set(mine) == {"llm.model.norm.weight", "llm.model.embed_tokens.weight"}
    assert theirs == vae
    both, _ = split_vae({**state, "llm.model.embed_tokens.weight": torch.ones(3)})
    assert both["llm.model.embed_tokens.weight"].tolist() == [1, 1, 1]


def test_embeddings_of_a_conversation() -> None:
    with torch.no_grad():
        check(model().embed(processor().chats([TOLD], labels=True)), *FIGURES["embeds"])


def test_context_of_an_edit() -> None:
    inputs = processor().requests([EDIT])
    with torch.no_grad():
        condition = model().condition(inputs)
        check(condition.text_BLD, *FIGURES["text"])
        check(condition.vector_BD, *FIGURES["vector"])


def test_next_token_loss() -> None:
    total, count = model().next_token(processor().chats([TOLD], labels=True))
    assert count.tolist() == [7]  # six bytes and the end
    assert total.item() == pytest.approx(FIGURES["nll"], abs=1e-3)


@pytest.mark.parametrize("separate", [False, True])
def test_drawing_from_text(separate: bool) -> None:
    rows = processor().branches([DRAW], height=32, width=48, guidance=5, image_guidance=1.5, separate=separate)
    assert len(rows) == (2 if separate else 1)
    check(guided(rows, 32, 48), *FIGURES["t2i"])


@pytest.mark.parametrize("separate", [False, True])
def test_editing(separate: bool) -> None:
    assert processor().edit_size(64, 96) == (64, 96)
    rows = processor().branches([EDIT], height=64, width=96, guidance=6, image_guidance=1.5, separate=separate)
    assert len(rows) == (3 if separate else 1)
    check(guided(rows, 64, 96), *FIGURES["edit"])


def test_answers_are_those_of_transformers() -> None:
    from transformers import Qwen3ForCausalLM

    theirs = Qwen3ForCausalLM(model().llm.model.config).eval()
    theirs.model.load_state_dict(model().llm.model.state_dict())
    theirs.tie_weights()
    short = Chat((Message("user", "hi"),))
    inputs = processor().chats([ASK, short], labels=False)
    answers = model().answer(inputs, 12, ())
    for row, chat in enumerate((ASK, short)):
        alone = processor().chats([chat], labels=False)
        embeds = model().embed(alone)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        expected = theirs.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        assert answers[row] == expected[0].tolist() == model().answer(alone, 12, ())[0]
    stop = answers[0][2]
    cut = model().answer(inputs, 12, (stop,))
    assert cut == [row[: row.index(stop)] if stop in row else row for row in answers]


# ---- invariants


def test_first_output_is_zero() -> None:
    torch.manual_seed(0)
    fresh = OvisU1(SMALL)
    velocity = fresh.velocity(noise(32, 48), torch.tensor([0.4]), fresh.condition(processor().requests([EDIT])))
    assert torch.equal(velocity, torch.zeros_like(velocity))


def test_guidance_of_one_is_the_plain_condition() -> None:
    (branch,) = processor().branches([DRAW, EDIT], height=64, width=96, guidance=1, image_guidance=1)
    assert branch.rows_R.tolist() == [0, 1] and branch.weights_R.tolist() == [1, 1]
    x, t = noise(64, 96), torch.tensor([0.3])
    with torch.no_grad():
        condition = model().condition(branch.inputs)
        both = model().velocity(x.expand(2, -1, -1, -1), t.expand(2), condition)
        alone = model().velocity(x, t, model().condition(processor().requests([EDIT])))
    assert torch.allclose(both[1:], alone, atol=1e-5)


def test_rows_of_a_batch_stay_apart() -> None:
    """Unequal texts, none, one and two sources: each row equals itself alone."""
    two = Request("<img><|image_1|></img> wears <img><|image_2|></img>", (picture(1, 32, 48), picture(2, 64, 64)))
    requests, dropped = [DRAW, EDIT, two, EDIT], [False, False, False, True]
    x = torch.cat([noise(32, 48) * (1 + i) for i in range(4)])
    t = torch.tensor([0.1, 0.4, 0.7, 0.9])
    with torch.no_grad():
        together = model().velocity(x, t, model().condition(processor().requests(requests, dropped)))
        for i, (request, drop) in enumerate(zip(requests, dropped, strict=True)):
            alone = model().condition(processor().requests([request], [drop]))
            assert torch.allclose(model().velocity(x[i : i + 1], t[i : i + 1], alone)[0], together[i], atol=2e-5)
        chats = [TOLD, Chat((Message("user", "hi"), Message("assistant", "yes")))]
        sums, counts = model().next_token(processor().chats(chats, labels=True))
        for i, chat in enumerate(chats):
            total, count = model().next_token(processor().chats([chat], labels=True))
            assert total.item() == pytest.approx(sums[i].item(), abs=1e-4) and count.item() == counts[i].item()


@pytest.mark.parametrize("stage", STAGES)
def test_stages_train_their_parts(stage: str) -> None:
    """Drawing and, where the stage reads, answering reach every parameter of its parts, and no other."""
    made = OvisU1(SMALL)
    fill(made, 0.1)
    prefixes = tuple(prefix for part in STAGES[stage] for prefix in made.parts[part])
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))
    seen: list[bool] = []
    made.llm.model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    condition = made.condition(processor().requests([DRAW, EDIT]))
    loss = made.velocity(torch.cat([noise(32, 48)] * 2), torch.tensor([0.2, 0.6]), condition).pow(2).mean()
    if "adapter" in STAGES[stage]:
        loss = loss + made.next_token(processor().chats([TOLD], labels=True))[0].sum()
    loss.backward()
    # stages of the decoder alone must not pay for the language model's graph
    assert seen[0] is ("adapter" in STAGES[stage])
    for name, parameter in made.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        unused = "post_trunk_norm" in name  # kept for the published file; features are taken before it
        assert reached is (name.startswith(prefixes) and not unused), name


def test_text_alone_uses_every_parameter() -> None:
    """On several devices the same parameters must take part in each step; the loss is that of text alone."""
    made = OvisU1(SMALL)
    fill(made, 0.1)
    inputs = processor().chats([Chat((Message("user", "hi"), Message("assistant", "yes")))], labels=True)
    learning = made.next_token(inputs)[0]
    learning.sum().backward()
    used = {n for n, p in made.named_parameters() if p.grad is not None}
    assert used == {
        n for n, _ in made.named_parameters() if n.startswith(("llm.", "vis", "vte")) and "post_trunk" not in n
    } - {n for n, _ in made.named_parameters() if n.startswith("visual_generator")}
    assert torch.allclose(learning, made.eval().next_token(inputs)[0], atol=1e-5)


def test_parts_of_other_models() -> None:
    """A fresh model takes a Qwen3 by its own names; the visual table is then drawn like its embedding."""
    from transformers import Qwen3ForCausalLM

    made = OvisU1(SMALL)
    theirs = Qwen3ForCausalLM(made.llm.model.config).state_dict()
    (ours, prefix), *_ = made.pretrained["llm"].items()
    names = {ours + name.removeprefix(prefix) for name in theirs if name.startswith(prefix)}
    assert names == {name for name in made.state_dict() if name.startswith("llm.")}
    with torch.no_grad():
        made.llm.model.embed_tokens.weight.normal_(mean=3, std=0.5)
    before = made.vte.weight.clone()
    made.begin(["encoder"])
    assert torch.equal(made.vte.weight, before)
    made.begin(["llm"])
    assert made.vte.weight.mean().item() == pytest.approx(3, abs=0.05)
    assert made.vte.weight.std().item() == pytest.approx(0.5, abs=0.05)


def test_an_image_shown_twice_is_encoded_once() -> None:
    twice = processor().requests([EDIT, EDIT])
    assert twice.shown == (0, 0) and len(twice.grids) == 1
    other = Request(EDIT.instruction, (EDIT.images[0].copy(),))
    apart = processor().requests([EDIT, other])
    assert apart.shown == (0, 1)
    with torch.no_grad():
        assert torch.allclose(model().embed(twice), model().embed(apart), atol=1e-6)


def test_times_are_bent_as_published() -> None:
    """e^mu / (e^mu + 1 / t - 1) from 1 (noise) down, mu from 0.5 at 256 tokens to 1.15 at 4096."""
    full = OvisU1Processor(PRESETS["ovis-u1-3b"], TOKENIZER, Means())
    assert full.shift(256, 256) == pytest.approx(math.exp(0.5))
    assert full.shift(1024, 1024) == pytest.approx(math.exp(1.15))
    pixels = OvisU1Processor(SMALL, TOKENIZER, Pixels(PixelsConfig(factor=4)))  # 8 x 8 pixels a token
    assert pixels.shift(128, 128) == pytest.approx(math.exp(0.5))
    mu = math.log(full.shift(512, 512))
    t = torch.linspace(1, 0, 11)
    published = math.exp(mu) / (math.exp(mu) + 1 / t - 1)
    assert torch.allclose(1 - flow.timesteps(10, full.shift(512, 512)), published, atol=1e-6)


def test_half_precision() -> None:
    half = OvisU1(SMALL).to(torch.bfloat16)
    fill(half, 0.1)
    inputs = processor().requests([DRAW, EDIT])
    velocity = half.velocity(
        torch.cat([noise(32, 48)] * 2).bfloat16(), torch.tensor([0.2, 0.6]), half.condition(inputs)
    )
    assert velocity.dtype == torch.bfloat16 and velocity.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model().velocity(noise(32, 48), torch.tensor([0.2]), model().condition(processor().requests([EDIT])))
        loss, _ = model().next_token(processor().chats([TOLD], labels=True))
    assert mixed.isfinite().all() and loss.dtype == torch.float32


def test_a_painter_draws_with_it() -> None:
    painter = Painter(model(), Means(), processor())
    options = Options(32, 48, steps=2, guidance=3, image_guidance=1.5)
    together = painter.draw([DRAW, EDIT], options, torch.cat([noise(32, 48)] * 2))
    alone = painter.draw([DRAW], options, noise(32, 48))
    assert together.shape == (2, 3, 32, 48)
    assert torch.allclose(together[:1], alone, atol=1e-3)


def test_presets_fit_tokenizer_and_autoencoder() -> None:
    fitted = PRESETS["ovis-u1-tiny"].adapted(vocab_size=300, latent_channels=12)
    assert (fitted.llm.vocab_size, fitted.decoder.in_channels, fitted.decoder.out_channels) == (300, 48, 48)
    assert sum(p.numel() for p in OvisU1(fitted).parameters()) < 8_000_000
    with pytest.raises(ValidationError, match="context_in_dim"):
        OvisU1Config(llm=SMALL.llm)


def test_what_is_not_prepared_is_refused() -> None:
    with pytest.raises(X2IError, match="without labels"):
        model().next_token(processor().chats([ASK], labels=False))
    with pytest.raises(X2IError, match="no autoencoder"):
        OvisU1Processor(SMALL, TOKENIZER, None).requests([DRAW, EDIT])
    assert OvisU1Processor(SMALL, TOKENIZER, None).chats([ASK], labels=False).lengths


def test_the_output_map_is_the_embedding() -> None:
    made = LanguageModel(SMALL.llm)
    hidden = torch.randn(2, 32)
    assert torch.equal(made.logits(hidden), hidden @ made.model.embed_tokens.weight.T)
