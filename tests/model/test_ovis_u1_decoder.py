"""Ovis-U1's decoder and refiner are the published ones: names, counts, outputs; rows of a batch stay apart."""

import math

import pytest
import torch
from pydantic import ValidationError

from x2i.base.errors import X2IError
from x2i.model.ovis_u1 import verify
from x2i.model.ovis_u1.decoder import Decoder, image_ids, pack, shift, unpack
from x2i.model.ovis_u1.decoder_config import DecoderConfig
from x2i.model.verify import Comparison, compared

X, IDS, SOURCE, SOURCE_IDS, HIDDEN, T = verify.decoder_inputs()


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return verify.decoder()


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


@pytest.mark.parametrize(
    "comparison", [c for c in verify.outputs() if c.what.startswith(("refiner", "decoder"))], ids=lambda c: c.what
)
def test_published_codes_figures(comparison: Comparison) -> None:
    """Figures of YakTransformer in AIDC-AI/Ovis-U1-3B's modeling_yak.py on the same weights, without padding."""
    row = compared("ovis_u1", comparison)
    assert row.how == "recorded"
    assert row.largest > 5
    assert row.difference is not None and row.difference < 1e-4


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
    model = Decoder(verify.DECODER)
    output = model(X, IDS, *model.context(HIDDEN), T, SOURCE, SOURCE_IDS)
    assert output.shape == X.shape
    assert output.abs().max() == 0
    (output - X).pow(2).mean().backward()
    assert model.final_layer.linear.weight.grad.abs().max() > 0
    assert all(p.isfinite().all() for p in model.parameters())


def test_gradients_reach_every_parameter_that_can_matter(decoder: Decoder) -> None:
    model = Decoder(verify.DECODER)
    model.load_state_dict(decoder.state_dict())
    model(X, IDS, *model.context(HIDDEN), T, SOURCE, SOURCE_IDS).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


@torch.no_grad()
def test_half_precision_and_autocast_stay_close(decoder: Decoder) -> None:
    expected = decoder(X, IDS, *decoder.context(HIDDEN), T, SOURCE, SOURCE_IDS)
    with torch.autocast("cpu", torch.bfloat16):
        cast = decoder(X, IDS, *decoder.context(HIDDEN), T, SOURCE, SOURCE_IDS)
    half = Decoder(verify.DECODER).eval()
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
