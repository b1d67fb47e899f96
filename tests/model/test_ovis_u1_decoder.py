"""Ovis-U1's decoder and refiner are the published ones: names, counts, outputs; rows of a batch stay apart."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.model.filling import fill
from x2i.base.errors import X2IError
from x2i.model.ovis_u1.decoder import Decoder, image_ids, pack, shift, unpack
from x2i.model.ovis_u1.decoder_config import DecoderConfig

SMALL = DecoderConfig(
    vec_in_dim=48,
    context_in_dim=40,
    hidden_size=48,
    heads=2,
    depth=2,
    depth_single=2,
    axes_dim=(8, 8, 8),
    refiner_heads=4,
)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)).float()


X, SOURCE, HIDDEN = draw(3, 2, 15, 16), draw(4, 2, 8, 16), draw(5, 2, 7, 40)
T = torch.tensor([0.3, 0.9])
IDS, SOURCE_IDS = image_ids(3, 5).expand(2, -1, -1), image_ids(4, 2, 1).expand(2, -1, -1)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    model = Decoder(SMALL).eval()
    fill(model, 0.2)
    return model


def check(x: Tensor, figures: list[float], mean: float, std: float) -> None:
    flat = x.double().flatten()
    assert flat[:: len(flat) // 12][:12].tolist() == pytest.approx(figures, abs=1e-4)
    assert flat.mean().item() == pytest.approx(mean, abs=1e-5)
    assert flat.std(correction=0).item() == pytest.approx(std, abs=1e-4)


def test_published_counts() -> None:
    with torch.device("meta"):
        model = Decoder(DecoderConfig())
    total = sum(p.numel() for p in model.parameters())
    refiner = sum(p.numel() for p in model.txt_in.parameters())
    assert refiner == 81_054_720
    assert total - refiner == 1_046_172_688


def test_published_names() -> None:
    attention = ("qkv.weight", "qkv.bias", "norm.query_norm.scale", "norm.key_norm.scale", "proj.weight", "proj.bias")
    double = {f"{stream}_attn.{name}" for stream in ("img", "img_self", "txt") for name in attention}
    linear = {f"{s}_{part}" for s in ("img", "txt") for part in ("mod.lin", "mlp.0", "mlp.2")}
    single = {"norm.query_norm.scale", "norm.key_norm.scale"}
    single |= {f"{part}.{kind}" for part in ("linear1", "linear2", "modulation.lin") for kind in ("weight", "bias")}
    refiner = {"norm1", "norm2", "self_attn_qkv", "self_attn_proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"}
    outside = {"img_in", "time_in.in_layer", "time_in.out_layer", "vector_in.in_layer", "vector_in.out_layer"}
    outside |= {"txt_in.input_embedder", "txt_in.c_embedder.linear_1", "txt_in.c_embedder.linear_2"}
    outside |= {"final_layer.linear", "final_layer.adaLN_modulation.1"}
    outside |= {f"txt_in.individual_token_refiner.blocks.{i}.{name}" for i in range(2) for name in refiner}
    outside |= {f"double_blocks.{i}.{name}" for i in range(6) for name in linear}
    names = {f"{name}.{kind}" for name in outside for kind in ("weight", "bias")} | {"txt_in.cls_token"}
    names |= {f"double_blocks.{i}.{name}" for i in range(6) for name in double}
    names |= {f"single_blocks.{i}.{name}" for i in range(12) for name in single}
    with torch.device("meta"):
        state = Decoder(DecoderConfig()).state_dict()
    assert set(state) == names
    assert state["double_blocks.0.img_mod.lin.weight"].shape == (9 * 1536, 1536)
    assert state["double_blocks.0.txt_mod.lin.weight"].shape == (6 * 1536, 1536)
    assert state["single_blocks.0.linear1.weight"].shape == (7 * 1536, 1536)
    assert state["txt_in.cls_token"].shape == (1, 1, 1536)


@torch.no_grad()
def test_published_codes_figures(decoder: Decoder) -> None:
    """Figures of YakTransformer in AIDC-AI/Ovis-U1-3B's modeling_yak.py on the same weights, without padding."""
    text, vector = decoder.context(HIDDEN)
    figures = [-0.823514, -0.798412, 0.376666, -1.146765, 0.812709, -0.112771]
    check(text, [*figures, -0.665293, -2.489160, 0.865538, -0.911308, -2.358160, 0.887347], 0.135849, 2.022648)
    figures = [0.919843, 0.999320, -0.003961, 0.006380, 0.310415, 1.444036]
    check(vector, [*figures, -1.064165, -2.309731, -1.168289, 1.301992, -0.549309, 3.156110], 0.060931, 1.926761)
    figures = [1.360144, 0.494159, 1.541557, 0.594960, 1.823789, 0.695536]
    drawn = decoder(X, IDS, text, vector, T)
    check(drawn, [*figures, -0.977174, 3.590641, -0.345581, 2.889215, -1.066899, 2.268368], -0.813937, 4.775568)
    figures = [1.048328, -0.411460, 1.295120, -0.266549, 1.516286, 0.011261]
    edited = decoder(X, IDS, text, vector, T, SOURCE, SOURCE_IDS)
    check(edited, [*figures, -1.758687, 4.144253, -1.167611, 3.408795, -1.825823, 2.893260], -0.859702, 4.731110)


@torch.no_grad()
def test_rows_of_unequal_lengths_equal_each_alone(decoder: Decoder) -> None:
    """Padding on either side of the text, whatever it holds, and after the source."""
    hidden = torch.full((2, 9, 40), float("nan"))
    valid = torch.zeros(2, 9, dtype=torch.bool)
    hidden[0, 2:], valid[0, 2:] = HIDDEN[0], True
    hidden[1, :4], valid[1, :4] = HIDDEN[1, :4], True
    source_valid = torch.tensor([[False] * 8, [True] * 5 + [False] * 3])
    text, vector = decoder.context(hidden, valid)
    batch = decoder(X, IDS, text, vector, T, SOURCE, SOURCE_IDS, valid, source_valid)
    first = decoder(X[:1], IDS[:1], *decoder.context(HIDDEN[:1]), T[:1])
    short = decoder.context(HIDDEN[1:, :4])
    second = decoder(X[1:], IDS[1:], *short, T[1:], SOURCE[1:, :5], SOURCE_IDS[1:, :5])
    torch.testing.assert_close(batch, torch.cat([first, second]), rtol=0, atol=5e-5)


def test_first_output_is_zero_and_its_head_learns() -> None:
    torch.manual_seed(0)
    model = Decoder(SMALL)
    output = model(X, IDS, *model.context(HIDDEN), T, SOURCE, SOURCE_IDS)
    assert output.shape == X.shape
    assert output.abs().max() == 0
    (output - X).pow(2).mean().backward()
    assert model.final_layer.linear.weight.grad.abs().max() > 0
    assert all(p.isfinite().all() for p in model.parameters())


def test_gradients_reach_every_parameter_that_can_matter(decoder: Decoder) -> None:
    model = Decoder(SMALL)
    model.load_state_dict(decoder.state_dict())
    model(X, IDS, *model.context(HIDDEN), T, SOURCE, SOURCE_IDS).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


@torch.no_grad()
def test_half_precision_and_autocast_stay_close(decoder: Decoder) -> None:
    expected = decoder(X, IDS, *decoder.context(HIDDEN), T, SOURCE, SOURCE_IDS)
    with torch.autocast("cpu", torch.bfloat16):
        cast = decoder(X, IDS, *decoder.context(HIDDEN), T, SOURCE, SOURCE_IDS)
    half = Decoder(SMALL).eval()
    half.load_state_dict(decoder.state_dict())
    half.to(torch.bfloat16)
    halved = half(X, IDS, *half.context(HIDDEN), T, SOURCE, SOURCE_IDS)
    assert halved.dtype == torch.bfloat16
    for got in (cast, halved):
        assert (got.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_tokens_and_positions() -> None:
    latents = torch.arange(2 * 4 * 6 * 10).view(2, 4, 6, 10).float()
    tokens = pack(latents)
    assert tokens.shape == (2, 15, 16)
    assert torch.equal(tokens[0, 1], latents[0, :, :2, 2:4].flatten())
    assert torch.equal(tokens[0, 5], latents[0, :, 2:4, :2].flatten())
    assert torch.equal(unpack(tokens, 3, 5), latents)
    assert image_ids(2, 3, 1).tolist() == [[1, 0, 0], [1, 0, 1], [1, 0, 2], [1, 1, 0], [1, 1, 1], [1, 1, 2]]
    with pytest.raises(X2IError, match="multiple of 2"):
        pack(latents[:, :, :5])


def test_shift_of_the_schedule() -> None:
    config = DecoderConfig()
    assert shift(256, config) == pytest.approx(math.exp(0.5))
    assert shift(1024, config) == pytest.approx(1.877611, abs=1e-6)
    assert shift(4096, config) == pytest.approx(math.exp(1.15))


def test_wrong_use_is_told(decoder: Decoder) -> None:
    with pytest.raises(X2IError, match="positions"):
        decoder(X, IDS, *decoder.context(HIDDEN), T, SOURCE)
    for wrong in ({"axes_dim": (16, 56, 54)}, {"heads": 7}, {"vec_in_dim": 768}, {"out_channels": 32}):
        with pytest.raises(ValidationError):
            DecoderConfig(**wrong)
