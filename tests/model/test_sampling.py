"""The flow's maths and the painter: exact paths, guidance by its formula, seeds; every way to compute, one picture."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.model import tiny
from x2i.base.errors import X2IError
from x2i.model import flow
from x2i.model.base import Request
from x2i.model.omnigen.processor import OmniGenProcessor
from x2i.model.omnigen.prompt import collate
from x2i.model.placeholders import image_only
from x2i.model.sampling import Options, Painter

PHOTO = np.full((8, 12, 3), 90, np.uint8)
NOISY = np.random.default_rng(0).integers(0, 255, (12, 8, 3), dtype=np.uint8)
#: Of unequal lengths, without images, with one and with two of different sizes.
REQUESTS = [
    Request(f"{image_only(1)} Sharpen", (PHOTO,)),
    Request("Draw a red boat on a lake"),
    Request(f"{image_only(2)} as one", (NOISY, PHOTO)),
]
OPTIONS = Options(8, 12, steps=3, guidance=2.5, image_guidance=1.6, seed=4)


@pytest.fixture(scope="module")
def painter() -> Painter:
    made = tiny.opened()
    assert made.vae is not None
    return Painter(made.model, made.vae, OmniGenProcessor(made.model.config, made.tokenizer, made.vae))


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


def test_a_shifted_grid_keeps_its_ends_and_is_ovis_u1s_formula() -> None:
    grid = flow.timesteps(10, shift=math.exp(0.8))
    assert grid[0] == 0 and grid[-1] == 1
    s = 1 - torch.linspace(0, 1, 11)[1:-1]  # counted from noise = 1: e^mu / (e^mu + 1 / s - 1)
    torch.testing.assert_close(grid[1:-1], 1 - math.exp(0.8) / (math.exp(0.8) + 1 / s - 1))


@pytest.mark.parametrize("cache", [False, True])
def test_a_guided_step_is_the_weighted_sum_of_its_branches(painter: Painter, cache: bool) -> None:
    text = f"{image_only(1)} Sharpen"
    drawn = painter.draw([Request(text, (PHOTO,))], replace(OPTIONS, steps=1, cache=cache))

    noise = torch.randn(12, 4, 6, generator=torch.Generator().manual_seed(4))[None]
    image = torch.full((12, 4, 6), 90 / 127.5 - 1)
    encode, zero = painter.processor.encoder.encode, torch.zeros(1)
    with torch.no_grad():
        c = painter.model(noise, zero, collate([encode(text, [6])], [[image]]))
        i = painter.model(noise, zero, collate([encode(image_only(1), [6])], [[image]]))
        u = painter.model(noise, zero, collate([encode("<cfg>", [])], [[]]))
    expected = painter.vae.decode(noise + u + 1.6 * (i - u) + 2.5 * (c - i))
    assert expected.std() > 0.1
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [{"separate": True}, {"cache": False}, {"separate": True, "cache": False}, {"offload_cache": True}],
    ids=str,
)
def test_every_way_to_compute_draws_the_same_pictures(painter: Painter, changes: dict[str, bool]) -> None:
    plain = painter.draw(REQUESTS, OPTIONS)
    other = painter.draw(REQUESTS, replace(OPTIONS, **changes))
    assert (plain - other).abs().max() < 2e-5  # seen: 1e-6
    assert plain.std() > 0.1


def test_a_picture_depends_on_its_request_and_seed_alone(painter: Painter) -> None:
    photo = Image.new("RGB", (40, 30), (200, 30, 60))
    again = [painter.generate("Sharpen", [photo], height=8, width=8, seed=s, steps=2).tobytes() for s in (1, 1, 2)]
    assert again[0] == again[1] != again[2]
    options = Options(8, 8, 2, 1.0, 1.0, 1)
    alone = painter.draw([Request("Sharpen")], options)
    together = painter.draw([Request("Sharpen"), Request("Draw " * 9)], options)
    torch.testing.assert_close(alone, together[:1], atol=1e-5, rtol=1e-4)


def test_noise_can_be_given_and_each_picture_has_its_own(painter: Painter) -> None:
    options = replace(OPTIONS, steps=2)
    noise = torch.stack([painter._noise(2, options)[1]] * 2)
    twice = painter.draw([REQUESTS[1]] * 2, options, noise)
    torch.testing.assert_close(twice[0], twice[1])
    second = painter.draw([REQUESTS[1]] * 2, options)[1]
    torch.testing.assert_close(second, twice[0])
    with pytest.raises(X2IError, match=r"noise of shape \[1, 12, 2, 2\]: expected \[2, 12, 4, 6\]"):
        painter.draw([REQUESTS[1]] * 2, options, torch.zeros(1, 12, 2, 2))


def test_the_negative_instruction_and_the_shift_change_the_picture(painter: Painter) -> None:
    plain = painter.draw(REQUESTS[1:2], OPTIONS)
    assert torch.equal(plain, painter.draw(REQUESTS[1:2], replace(OPTIONS, negative="<cfg>", shift=1.0)))
    for changes in ({"negative": "Make the sky darker"}, {"shift": 3.0}):
        assert (plain - painter.draw(REQUESTS[1:2], replace(OPTIONS, **changes))).abs().max() > 1e-3


def test_the_models_own_shift_is_used_unless_one_is_given(painter: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = painter.draw(REQUESTS[1:2], replace(OPTIONS, shift=3.0))
    monkeypatch.setattr(type(painter.processor), "shift", lambda self, height, width: height / width * 4.5)
    assert torch.equal(painter.draw(REQUESTS[1:2], OPTIONS), wanted)
    assert not torch.equal(painter.draw(REQUESTS[1:2], replace(OPTIONS, shift=1.0)), wanted)


def test_a_model_in_bfloat16_keeps_its_path_in_float32(painter: Painter) -> None:
    seen = []

    class Recorder(Painter):
        def _integrate(self, *given: object) -> Tensor:
            out = super()._integrate(*given)  # type: ignore[arg-type]
            seen.append(out.dtype)
            return out

    half = tiny.opened()
    half.model.to(torch.bfloat16)
    assert half.vae is not None
    processor = OmniGenProcessor(half.model.config, half.tokenizer, half.vae)
    drawn = Recorder(half.model, half.vae, processor).draw(REQUESTS, OPTIONS)
    full = painter.draw(REQUESTS, OPTIONS)
    assert seen == [torch.float32] and drawn.dtype == torch.float32
    assert 0 < (drawn - full).abs().mean() < 0.1 * full.std()


def test_input_images_may_keep_their_own_aspect(painter: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = []
    monkeypatch.setattr(painter, "paint", lambda requests, options: asked.extend(requests) or [None])
    photo = Image.new("RGB", (40, 21))
    painter.generate("Sharpen", [photo], height=8, width=8, steps=1)
    painter.generate("Sharpen", [photo], height=8, width=8, steps=1, max_input=20)
    assert [r.images[0].shape for r in asked] == [(8, 8, 3), (8, 20, 3)]
    assert {r.instruction for r in asked} == {"<img><|image_1|></img> Sharpen"}


@pytest.mark.parametrize(("height", "width"), [(10, 8), (8, 0), (8, 4 * 17)])
def test_sizes_that_are_no_whole_tokens_are_refused(painter: Painter, height: int, width: int) -> None:
    with pytest.raises(X2IError, match="multiple of 4, and at most 64"):
        painter.generate("Sharpen", height=height, width=width)


def test_what_cannot_be_drawn_is_said(painter: Painter) -> None:
    with pytest.raises(X2IError, match="steps 0"):
        painter.draw(REQUESTS, replace(OPTIONS, steps=0))
    with pytest.raises(X2IError, match="no request"):
        painter.draw([], OPTIONS)
    with pytest.raises(X2IError, match="must name every image"):
        painter.draw([Request("Sharpen", (PHOTO,))], OPTIONS)
    assert not painter.model.training


def test_the_model_is_left_as_it_was(painter: Painter) -> None:
    painter.model.train()
    try:
        painter.draw(REQUESTS[1:2], replace(OPTIONS, steps=1))
        assert painter.model.training
        with pytest.raises(X2IError):
            painter.draw([Request("Sharpen", (PHOTO,))], OPTIONS)
        assert painter.model.training
    finally:
        painter.model.eval()
