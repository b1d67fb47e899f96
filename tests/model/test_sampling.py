"""The flow's maths and the painter: exact paths, guidance by its formula, seeds, weights that do not fit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.model.test_omnigen import SMALL, randomised
from x2i.base.errors import X2IError
from x2i.model import flow, vae, weights
from x2i.model.config import PixelsConfig
from x2i.model.omnigen import OmniGen
from x2i.model.prompt import PromptEncoder, collate, image_only
from x2i.model.sampling import Options, Painter, Request
from x2i.trainer.config import TokenizerTraining
from x2i.trainer.tokens import train


@pytest.fixture(scope="module")
def painter() -> Painter:
    tokenizer = train(["Sharpen it"], TokenizerTraining(vocab_size=300))
    pixels = vae.build(PixelsConfig(factor=2))
    update = {"vocab_size": tokenizer.get_vocab_size(), "in_channels": pixels.channels}
    return Painter(randomised(SMALL.model_copy(update=update)), pixels, PromptEncoder(tokenizer))


def test_the_true_velocity_leads_to_the_data_in_any_number_of_steps() -> None:
    noise, data = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for steps in (1, 7):
        torch.testing.assert_close(flow.euler(lambda x, t: data - noise, noise, steps), data)
    t = torch.tensor([0.0, 1.0])
    path = flow.interpolate(noise, data, t)
    assert torch.equal(path[0], noise[0]) and torch.equal(path[1], data[1])
    assert flow.squared_error(data - noise, noise, data).max() == 0


def test_guidance_weights_are_the_published_formula() -> None:
    c, i, u = 3.0, 5.0, 7.0
    full, image, none = flow.guidance_weights(2.5, 1.6, has_images=True)
    assert full * c + image * i + none * u == pytest.approx(u + 1.6 * (i - u) + 2.5 * (c - i))
    full, image, none = flow.guidance_weights(2.5, 1.6, has_images=False)
    assert full * c + image * i + none * u == pytest.approx(u + 2.5 * (c - u))
    assert flow.guidance_weights(1, 1, has_images=True) == (1, 0, 0)


def test_a_guided_step_is_the_weighted_sum_of_its_branches(painter: Painter) -> None:
    photo = np.full((8, 12, 3), 90, np.uint8)
    options = Options(8, 12, steps=1, guidance=2.5, image_guidance=1.6, seed=4)
    text = f"{image_only(1)} Sharpen"
    drawn = painter.paint([Request(text, (photo,))], options)[0]

    noise = torch.randn(12, 4, 6, generator=torch.Generator().manual_seed(4))[None]
    image = torch.full((12, 4, 6), 90 / 127.5 - 1)
    encode, zero = painter.encoder.encode, torch.zeros(1)
    with torch.no_grad():
        c = painter.model(noise, zero, collate([encode(text, [6])], [[image]]))
        i = painter.model(noise, zero, collate([encode(image_only(1), [6])], [[image]]))
        u = painter.model(noise, zero, collate([encode("<cfg>", [])], [[]]))
    expected = painter.vae.decode(noise + u + 1.6 * (i - u) + 2.5 * (c - i))
    expected = ((expected.clamp(-1, 1) + 1) * 127.5).round()[0].permute(1, 2, 0).numpy()
    assert drawn.size == (12, 8)
    np.testing.assert_allclose(np.asarray(drawn, float), expected, atol=1)


def test_a_picture_depends_on_its_request_and_seed_alone(painter: Painter) -> None:
    photo = Image.new("RGB", (40, 30), (200, 30, 60))
    again = [painter.generate("Sharpen", [photo], height=8, width=8, seed=s, steps=2).tobytes() for s in (1, 1, 2)]
    assert again[0] == again[1] != again[2]
    options = Options(8, 8, 2, 1.0, 1.0, 1)
    alone = painter.paint([Request("Sharpen")], options)[0]
    together = painter.paint([Request("Sharpen"), Request("Draw " * 9)], options)[0]
    np.testing.assert_allclose(np.asarray(alone, int), np.asarray(together, int), atol=1)


@pytest.mark.parametrize(("height", "width"), [(10, 8), (8, 0), (8, 4 * 17)])
def test_sizes_that_are_no_whole_tokens_are_refused(painter: Painter, height: int, width: int) -> None:
    with pytest.raises(X2IError, match="multiple of 4, and at most 64"):
        painter.generate("Sharpen", height=height, width=width)


def test_weights_survive_the_disk_and_others_are_refused_by_name(tmp_path: Path) -> None:
    model, other = randomised(), OmniGen(SMALL)
    weights.save(model.state_dict(), tmp_path / "model.safetensors")
    weights.load(other, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))

    wider = OmniGen(SMALL.model_copy(update={"intermediate_size": 64}))
    with pytest.raises(X2IError, match=r"gate_up_proj.weight is \[96, 32\], expected \[128, 32\]"):
        weights.load(wider, tmp_path)
    with pytest.raises(X2IError, match="missing bias"):
        weights.load(nn.Linear(2, 2), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(X2IError, match="cannot be read as safetensors"):
        weights.load(other, tmp_path)
