"""Keys and values of the condition, kept over the steps: the same velocity, whatever the trunk, the length, the place."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from tests.model.test_omnigen import SMALL, TRUNKS, randomised, text, with_images
from x2i.base.errors import X2IError
from x2i.model.omnigen.model import OmniGen
from x2i.model.omnigen.prompt import PromptBatch, collate

GRIDS = {4: (4, 4), 6: (4, 6), 9: (6, 6)}
TARGET = (6, 10)  # 15 tokens


def batch_of(before: int, *sizes: int) -> PromptBatch:
    """Two rows of unequal length; the first has images of these many tokens after `before` tokens of text."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(4, *GRIDS[s], generator=generator) for s in sizes]
    return collate([with_images(1, before, *sizes), text(7, seed=9)], [images, []])


def noisy() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 4, *TARGET, generator=torch.Generator().manual_seed(2)), torch.tensor([0.3, 0.8])


@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "offloaded"])
@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("sizes", [(), (6,), (4, 6, 9)], ids=["text", "one image", "three images"])
@torch.no_grad()
def test_cached_steps_equal_uncached_ones(trunk: str, sizes: tuple[int, ...], offload: bool) -> None:
    model, batch = randomised(TRUNKS[trunk]), batch_of(12, *sizes)
    x, t = noisy()
    condition = model.condition(batch, cache=True, target=TARGET, offload=offload)
    assert condition.cache is not None
    kept = condition.cache.nbytes()
    for step in range(3):
        found = model.velocity(x + step, t, condition)
        torch.testing.assert_close(found, model(x + step, t, batch), rtol=1e-5, atol=5e-6)
    assert condition.cache.nbytes() == kept  # nothing was added by the steps
    attention = model.llm.layers[0].self_attn
    heads = model.config.kv_heads * attention.head_dim
    assert kept == 2 * model.config.layers * batch.ids_BL.numel() * heads * 4


@torch.no_grad()
def test_an_offloaded_layer_is_fetched_while_the_one_before_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Stream:
        device = torch.device("cpu")

        def wait_stream(self, other: object) -> None:
            events.append("wait")

    model, batch = randomised(), batch_of(12, 6)
    condition = model.condition(batch, cache=True, target=TARGET, offload=True)
    cache = condition.cache
    assert cache is not None
    monkeypatch.setattr(cache, "_stream", Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    fetch = cache._fetch

    def noted(layer: int, device: torch.device) -> tuple[Tensor, Tensor]:
        events.append(f"fetch {layer}")
        return fetch(layer, device)

    monkeypatch.setattr(cache, "_fetch", noted)
    x, t = noisy()
    for _ in range(2):
        torch.testing.assert_close(model.velocity(x, t, condition), model(x, t, batch), rtol=1e-5, atol=5e-6)
    # two layers, two steps: each waits for its own and sends for the next; the first of all has nobody before it
    assert events == ["fetch 0", *["wait", "fetch 1", "wait", "fetch 0"] * 2]
    assert list(cache._ahead) == [0]


@pytest.mark.parametrize("before", [109, 120, 150])  # with the images: condition and picture together pass position 128
@torch.no_grad()
def test_the_long_rope_is_chosen_by_the_whole_sequence(before: int) -> None:
    model, batch = randomised(), batch_of(before, 6)
    assert SMALL.rope_scaling is not None
    assert (before < 119) == (batch.ids_BL.shape[1] <= SMALL.rope_scaling.original)
    x, t = noisy()
    expected = model(x, t, batch)
    found = model.velocity(x, t, model.condition(batch, cache=True, target=TARGET))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-6)
    if before < 119:  # the condition alone would have taken the short factors
        wrong = model.velocity(x, t, model.condition(batch, cache=True, target=(2, 2)))
        assert (wrong - expected).abs().max() > 1e-3


def test_a_cache_without_what_it_needs_is_refused() -> None:
    model, batch = randomised(), batch_of(12)
    with pytest.raises(X2IError, match="no_grad"):
        model.condition(batch, cache=True, target=TARGET)
    with torch.no_grad():
        with pytest.raises(X2IError, match="needs `target`"):
            model.condition(batch, cache=True)
        randomised(TRUNKS["llama"]).condition(batch, cache=True)  # its frequencies are always the same


def test_an_uncached_condition_has_gradients_down_to_the_images() -> None:
    model = OmniGen(SMALL)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    x, t = noisy()
    model.velocity(x, t, model.condition(batch_of(3, 6))).pow(2).mean().backward()
    gradient = model.input_x_embedder.proj.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0
