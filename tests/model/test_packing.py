"""Packs: the same outputs and gradients as documents in batches, by either attention, whatever else a pack holds."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.model import test_mini_gemini, test_ovis2, test_ovis_u1
from tests.model.test_omnigen import TRUNKS, randomised
from tests.model.tiny import tokenizer
from x2i.base.errors import X2IError
from x2i.model import vae
from x2i.model.base import Chat, Message, Model, Request
from x2i.model.config import PixelsConfig
from x2i.model.layers.attention import mask_of
from x2i.model.layers.spans import spans
from x2i.model.lengths import lengths_of
from x2i.model.mini_gemini.processor import MiniGeminiProcessor
from x2i.model.omnigen import packing
from x2i.model.omnigen.config import OmniGenConfig
from x2i.model.omnigen.model import OmniGen
from x2i.model.omnigen.packing import OmniGenPack
from x2i.model.omnigen.processor import OmniGenProcessor
from x2i.model.omnigen.prompt import Prompt, collate

PIXELS = vae.build(PixelsConfig(factor=2))  # 4 pixels a token's side


def image(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)


def chat(*texts: str, images: Sequence[np.ndarray] = ()) -> Chat:
    messages = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))
    return Chat(messages, tuple(images))


A, B = "<img><|image_1|></img>", "<img><|image_2|></img>"
REQUESTS = [
    Request("Draw a red boat on a lake."),
    Request(f"Make {A} darker", (image(1, 8, 12),)),
    Request(f"{B} beside {A}", (image(2, 8, 8), image(3, 12, 4))),
    Request(f"Left out {A}", (image(4, 8, 8),)),
]
DROPPED = [False, False, False, True]
SIZES = [(8, 8), (16, 12), (12, 20), (8, 8)]
CHATS = [
    chat("<image> What is it?", "A boat.", images=[image(5, 21, 13)]),
    chat("Hello", "Good day.", "And <image> or <image>?", "The first one.", images=[image(6, 8, 8), image(7, 4, 12)]),
    chat("Words alone", "Yes, words."),
]


def small(trunk: str, **changes: Any) -> OmniGenConfig:
    numbers = {"vocab_size": tokenizer().get_vocab_size(), "in_channels": PIXELS.channels, "text_head": True}
    return TRUNKS[trunk].model_copy(update=numbers | changes)


@cache
def processor() -> OmniGenProcessor:
    return OmniGenProcessor(small("phi3"), tokenizer(), PIXELS)


@cache
def model(trunk: str) -> OmniGen:
    return randomised(small(trunk))


def noise(sizes: Sequence[tuple[int, int]] = SIZES) -> tuple[list[Tensor], Tensor]:
    """Noisy latents and timesteps."""
    drawn = torch.Generator().manual_seed(3)
    x = [torch.randn(PIXELS.channels, h // 2, w // 2, generator=drawn) for h, w in sizes]
    return x, torch.rand(len(sizes), generator=drawn)


def packed(requests: Sequence[Request], chats: Sequence[Chat], more: int = 0, length: int | None = None) -> OmniGenPack:
    """A pack of these, `more` tokens longer than they are."""
    places = [REQUESTS.index(r) for r in requests]
    dropped, sizes = [DROPPED[i] for i in places], [SIZES[i] for i in places]
    documents = processor().documents(requests, dropped, sizes, chats)
    return processor().pack(documents, length or sum(d.length for d in documents) + more)


def gradients(made: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    made.zero_grad()
    loss.backward()
    found = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
    made.zero_grad()
    return found


def furthest(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Largest difference; of gradients beyond 1 as a share of their largest."""
    assert first.keys() == second.keys()
    return max(float((first[n] - second[n]).abs().max()) / max(1, float(second[n].abs().max())) for n in first)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_a_pack_computes_what_padded_batches_compute(trunk: str) -> None:
    made, (x, t) = model(trunk), noise()
    pack = packed(REQUESTS, CHATS, more=21)
    velocities, sums, counts = made.packed(pack, x, t)
    of_pack = gradients(made, sum(v.pow(2).mean() for v in velocities) + sums.sum())

    loss = torch.zeros(())
    for request, drop, latents, time, velocity in zip(REQUESTS, DROPPED, x, t, velocities, strict=True):
        alone = made(latents[None], time[None], processor().requests([request], [drop]))[0]
        assert velocity.shape == latents.shape and float(alone.detach().abs().max()) > 1
        assert float((alone - velocity).detach().abs().max()) < 1e-5
        loss = loss + alone.pow(2).mean()
    padded_sums, padded_counts = made.next_token(processor().chats(CHATS, labels=True))
    assert sums.dtype == torch.float32 and torch.equal(counts, padded_counts) and int(counts.min()) > 0
    assert float((sums - padded_sums).detach().abs().max()) < 1e-4
    assert furthest(of_pack, gradients(made, loss + padded_sums.sum())) < 1e-5
    assert len(of_pack) == len(list(made.parameters()))


def test_a_pack_says_what_it_costs() -> None:
    pack = packed(REQUESTS[:2], CHATS[:1], more=9)
    prompts = [int(processor().requests([r]).valid_BL.sum()) for r in REQUESTS[:2]]
    told = int(processor().chats(CHATS[:1], labels=True).valid_BL.sum())
    assert pack.lengths == (prompts[0] + 1 + 4, prompts[1] + 1 + 12, told)
    assert pack.pairs == int(pack.spans.dense()[0, 0, : sum(pack.lengths)].sum())
    assert len(pack.ids_T) == sum(pack.lengths) + 9


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("trunk", TRUNKS)
def test_flex_attention_and_sdpa_agree(trunk: str) -> None:
    """Llama and Qwen3 with fewer keys than queries, Qwen3's of another width; some packs of several blocks."""
    made = randomised(small(trunk, **({} if trunk == "phi3" else {"kv_heads": 2})))
    rng = np.random.default_rng(7)
    for length in (500, 384):
        chosen = [REQUESTS[i] for i in rng.permutation(len(REQUESTS))]
        pack = packed(chosen, [CHATS[i] for i in rng.permutation(len(CHATS))], length=length)
        x, t = noise([SIZES[REQUESTS.index(r)] for r in chosen])
        found = {}
        for made.flex in (True, False):
            with torch.no_grad():
                found[made.flex] = made.packed(pack, x, t)
        for ours, theirs in zip(found[True][0], found[False][0], strict=True):
            assert float((ours - theirs).abs().max()) < 1e-5
        assert float((found[True][1] - found[False][1]).abs().max()) < 1e-4
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            made.flex = True
            for half, whole in zip(made.packed(pack, x, t)[0], found[False][0], strict=True):
                assert half.dtype == torch.bfloat16
                assert float((half.float() - whole).abs().mean()) < 0.03 * float(whole.abs().mean())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("flex", [True, False])
def test_compiled_blocks_are_compiled_once_for_all_packs(flex: bool) -> None:
    made = randomised(small("qwen3", kv_heads=2)).requires_grad_(not flex)  # on a CPU flex has no backward
    made.flex = flex
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    given = [packed(REQUESTS[:n], CHATS[n:], length=400) for n in range(4)]
    before = [made.packed(pack, *noise(SIZES[:n])) for n, pack in enumerate(given)]
    for block in made.blocks():
        block.compile(backend=counter, fullgraph=True)
    for n, (pack, expected) in enumerate(zip(given, before, strict=True)):
        velocities, sums, _ = made.packed(pack, *noise(SIZES[:n]))
        assert float((sums - expected[1]).detach().abs().sum()) < 1e-3
        assert all(float((a - b).detach().abs().max()) < 1e-5 for a, b in zip(velocities, expected[0], strict=True))
    assert counter.frame_count == 1  # one graph for all layers and packs


@pytest.mark.parametrize("limit", [10, 60, 500])
def test_a_long_document_leaves_the_rotary_frequencies_of_short_ones_alone(limit: int) -> None:
    """Long-rope goes by the longest position of a call: 60 lies between the documents' lengths."""
    rope = small("phi3").rope_scaling
    assert rope is not None
    made = randomised(small("phi3", rope_scaling=rope.model_copy(update={"original": limit})))
    x, t = noise([(8, 8), (24, 24)])
    requests = [REQUESTS[0], REQUESTS[0]]
    documents = processor().documents(requests, None, [(8, 8), (24, 24)], CHATS[:1])
    assert [d.length > 60 for d in documents] == [False, True, False]
    velocities, sums, _ = made.packed(processor().pack(documents, 200), x, t)
    for latents, time, velocity in zip(x, t, velocities, strict=True):
        alone = made(latents[None], time[None], processor().requests(requests[:1]))[0]
        assert float((alone - velocity).detach().abs().max()) < 1e-5
    alone, _ = made.next_token(processor().chats(CHATS[:1], labels=True))
    assert float((sums - alone).detach().abs().max()) < 1e-4
    assert "forward" not in vars(made.llm.rotary_emb)


def test_the_first_token_of_a_document_is_not_learned() -> None:
    """Nothing stands before it: neither the document that precedes it in a pack nor padding foretells it."""
    made = model("phi3")
    prompts = [Prompt((3, 5, 7), (0,) * 3, (), learned=(True, True, True)), Prompt((4,) * 5, (0,) * 5, (), (True,) * 5)]
    sums, counts = made.next_token(collate(prompts, [[], []]))
    _, in_pack, counted = made.packed(
        packing.pack([packing.document(p, []) for p in prompts], 9, 0), [], torch.zeros(0)
    )
    assert counts.tolist() == counted.tolist() == [2, 4]
    assert float((sums - in_pack).detach().abs().max()) < 1e-4


def calls(made: nn.Module, run: Callable[[], object]) -> Counter[str]:
    """How often each module with parameters of its own is run."""
    seen: Counter[str] = Counter()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: seen.update([name]))
        for name, module in made.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def test_what_a_pack_lacks_is_run_all_the_same() -> None:
    """So ranks with different packs gather and reduce the same; all gradients are there, and of dummies zero."""
    made = randomised(small("phi3"))
    kinds = {
        "all": (REQUESTS, CHATS),
        "no chats": (REQUESTS, []),
        "no pictures": ([], CHATS),
        "words alone": ([], CHATS[2:]),
        "a picture from words": (REQUESTS[:1], []),
        "nothing": ([], []),
    }
    seen, found = {}, {}
    for kind, (requests, chats) in kinds.items():
        pack, (x, t) = packed(requests, chats, length=300), noise(SIZES[: len(requests)])

        def run(kind: str = kind, pack: OmniGenPack = pack, x: list[Tensor] = x, t: Tensor = t) -> None:
            velocities, sums, counts = made.packed(pack, x, t)
            assert (len(velocities), len(sums), len(counts)) == (len(x), *[len(pack.learned.counts_K)] * 2)
            found[kind] = gradients(made, sum((v.pow(2).mean() for v in velocities), sums.sum()))

        seen[kind] = calls(made, run)
    assert all(of_one == seen["all"] and set(of_one.values()) == {1} for of_one in seen.values())
    assert set(seen["all"]) > {"input_x_embedder.proj", "final_layer.linear", "lm_head", "llm.layers.1.mlp.down_proj"}
    assert all(kind.keys() == dict(made.named_parameters()).keys() for kind in found.values())
    used = {kind: {n.split(".")[0] for n, g in of.items() if g.abs().max() > 0} for kind, of in found.items()}
    drawing = {"x_embedder", "time_token", "t_embedder", "final_layer"}
    assert used == {
        "all": {"llm", "lm_head", "input_x_embedder", *drawing},
        "no chats": {"llm", "input_x_embedder", *drawing},
        "no pictures": {"llm", "lm_head", "input_x_embedder"},
        "words alone": {"llm", "lm_head"},
        "a picture from words": {"llm", *drawing},
        "nothing": set(),
    }


def test_a_document_is_the_same_beside_any_other() -> None:
    """Alone, among others, in another order, with the same numbers."""
    made = model("qwen3")
    x, t = noise()
    with torch.no_grad():
        velocities, sums, _ = made.packed(packed(REQUESTS, CHATS), x, t)
        again, other, _ = made.packed(packed([REQUESTS[2], REQUESTS[0]], CHATS[1:2], more=40), [x[2], x[0]], t[[2, 0]])
    assert float((again[0] - velocities[2]).abs().max()) < 1e-5
    assert float((again[1] - velocities[0]).abs().max()) < 1e-5
    assert float((other[0] - sums[1]).abs()) < 1e-4


def test_what_does_not_fit_is_refused() -> None:
    made, (x, t) = model("phi3"), noise(SIZES[:1])
    pack = packed(REQUESTS[:1], [])
    count = sum(pack.lengths)
    with pytest.raises(X2IError, match=f"1 documents of {count} tokens do not fit into a pack of {count - 1}"):
        packed(REQUESTS[:1], [], more=-1)
    with pytest.raises(X2IError, match=r"latent sizes \[\(4, 4\)\] was given \[\(8, 6\)\]"):
        made.packed(pack, [torch.zeros(PIXELS.channels, 8, 6)], t)
    with pytest.raises(X2IError, match="2 timesteps"):
        made.packed(pack, x, torch.zeros(2))
    with pytest.raises(X2IError, match="no turn of the assistant"):
        processor().documents([], None, [], [chat("What?")])
    with pytest.raises(X2IError, match="height 9"):
        processor().documents(REQUESTS[:1], None, [(9, 8)], [])
    silent = randomised(small("phi3", text_head=False))
    silent.packed(pack, x, t)
    with pytest.raises(X2IError, match="no text head"):
        silent.packed(packed([], CHATS[:1]), [], torch.zeros(0))
    with pytest.raises(X2IError, match="takes no packs"):
        Model.packed(made, pack, x, t)


# --- Ovis2 -------------------------------------------------------------------------------------------------------


def test_ovis2_packs_conversations() -> None:
    """With tiles of several images, as in padded batches; what a pack lacks is run all the same."""
    words = test_ovis2.processor()
    made = test_ovis2.Ovis2(words.config).train()
    told = [
        chat("<image>\nWhat?", "A boat.", images=[image(5, 40, 24)]),
        CHATS[2],
        chat("<image> or <image>?", "The first.", "Why?", "It is red.", images=[image(6, 24, 24), image(7, 8, 24)]),
    ]
    documents = words.documents([], None, [], told)
    pack = words.pack(documents, sum(d.length for d in documents) + 19)
    velocities, sums, counts = made.packed(pack, [], torch.zeros(0))
    expected, expected_counts = made.next_token(words.chats(told, labels=True))
    assert velocities == [] and torch.equal(counts, expected_counts)
    assert float((sums - expected).detach().abs().max()) < 1e-4
    slopes = gradients(made, sums.sum() / counts.sum())
    assert furthest(slopes, gradients(made, expected.sum() / counts.sum())) < 1e-5
    assert pack.lengths == tuple(words.chats(told, labels=True).valid_BL.sum(dim=1).tolist())
    made.flex = True
    with torch.no_grad():
        assert float((made.packed(pack, [], torch.zeros(0))[1] - sums).abs().max()) < 1e-4
    made.flex = None

    everything = calls(made, lambda: made.packed(pack, [], torch.zeros(0)))
    for few in ([told[1]], []):
        other = words.pack(words.documents([], None, [], few), 120)
        assert calls(made, partial(made.packed, other, [], torch.zeros(0))) == everything
        found = gradients(made, made.packed(other, [], torch.zeros(0))[1].sum())
        assert found.keys() == slopes.keys()
        assert max(float(found[n].abs().max()) for n in found if n.startswith("visual_tokenizer")) == 0
    with pytest.raises(X2IError, match="3 conversations of .* do not fit into a pack of 100"):
        words.pack(documents, 100)
    with pytest.raises(X2IError, match="draws no pictures"):
        words.documents(REQUESTS[:1], None, [(8, 8)], [])


# --- Mini-Gemini -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "hd", "vicuna"])
def test_mini_gemini_packs_conversations(kind: str) -> None:
    """With several images, plain and in views, as in padded batches; what a pack lacks is run all the same."""
    config = test_mini_gemini.TINY_HD if kind == "hd" else test_mini_gemini.TINY
    if kind == "vicuna":  # no scaled embeddings, and another template
        llm = config.llm.model_copy(update={"model_type": "llama"})
        config = config.model_copy(update={"llm": llm, "template": "vicuna_v1"})
    made = test_mini_gemini.filled(config)
    special = (*MiniGeminiProcessor.special_tokens, "<s>", "</s>")
    words = MiniGeminiProcessor(config, test_mini_gemini.byte_tokenizer("What? A boat. Words", special=special), None)
    told = [
        chat("<image>\nWhat?", "A boat.", images=[image(5, 40, 24)]),
        CHATS[2],
        chat("<image> or <image>?", "The first.", "Why?", "It is red.", images=[image(6, 24, 24), image(7, 8, 24)]),
    ]
    documents = words.documents([], None, [], told)
    pack = words.pack(documents, sum(d.length for d in documents) + 19)
    velocities, sums, counts = made.packed(pack, [], torch.zeros(0))
    expected, expected_counts = made.next_token(words.chats(told, labels=True))
    assert velocities == [] and torch.equal(counts, expected_counts) and int(counts.min()) > 3
    assert float((sums - expected).detach().abs().max()) < 1e-5 * float(expected.detach().max())
    slopes = gradients(made, sums.sum() / counts.sum())
    assert furthest(slopes, gradients(made, expected.sum() / counts.sum())) < 1e-5
    alone = [words.chats([one], labels=True) for one in told]
    assert pack.lengths == tuple(row.ids_BL.shape[1] for row in alone)
    ways = lengths_of(config)
    rows, pairs = ways.packed(config, pack)
    assert rows == [row for one in alone for row in ways.rows(config, one, 0)]
    assert pairs == [
        sum(a.pairs for a in kind) for kind in zip(*(ways.attention(config, r) for r in rows), strict=True)
    ]
    assert {words.picture_tokens(24, 24, True)} == {n for row in rows for n in row.read}
    made.flex = True
    with torch.no_grad():
        assert float((made.packed(pack, [], torch.zeros(0))[1] - sums).abs().max()) < 1e-5 * float(
            expected.detach().max()
        )
    made.flex = None

    everything = calls(made, lambda: made.packed(pack, [], torch.zeros(0)))
    for few in ([told[1]], []):
        other = words.pack(words.documents([], None, [], few), 250)
        assert calls(made, partial(made.packed, other, [], torch.zeros(0))) == everything
        found = gradients(made, made.packed(other, [], torch.zeros(0))[1].sum())
        assert found.keys() == slopes.keys()
        assert max(float(found[n].abs().max()) for n in found if "vision_tower" in n or "vlm_uni" in n) == 0
    with pytest.raises(X2IError, match="3 conversations of .* do not fit into a pack of 100"):
        words.pack(documents, 100)
    with pytest.raises(X2IError, match="draws no pictures"):
        words.documents(REQUESTS[:1], None, [(8, 8)], [])


def test_mini_gemini_packs_only_what_a_pack_leaves_as_it_is() -> None:
    """Not with a language model whose layers look back a few tokens only, or whose frequencies follow the longest."""
    llm = test_mini_gemini.TINY.llm
    words = MiniGeminiProcessor(test_mini_gemini.TINY, test_mini_gemini.byte_tokenizer("Words"), None)
    pack = words.pack(words.documents([], None, [], CHATS[2:]), 200)
    for kind, numbers in (
        ("mistral", {"sliding_window": 16}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    ):
        odd = llm.model_copy(update={"model_type": kind, "numbers": llm.numbers | numbers})
        made = test_mini_gemini.filled(test_mini_gemini.TINY.model_copy(update={"llm": odd}))
        assert not made.packs
        with pytest.raises(X2IError, match="takes no packs"):
            made.packed(pack, [], torch.zeros(0))
    plain = llm.model_copy(update={"model_type": "mistral", "numbers": llm.numbers | {"sliding_window": None}})
    assert test_mini_gemini.filled(test_mini_gemini.TINY.model_copy(update={"llm": plain})).packs


# --- all architectures -------------------------------------------------------------------------------------------


def omnigen() -> tuple[Model[Any], dict[str, Callable[[], Any]]]:
    made, (x, t) = model("llama"), noise(SIZES[:1])
    return made, {
        "a picture": lambda: made(torch.stack(x), t, processor().requests(REQUESTS[:1])),
        "chats": lambda: made.next_token(processor().chats(CHATS, labels=True)),
        "words": lambda: made.next_token(processor().chats(CHATS[2:], labels=True)),
        "a pack": lambda: made.packed(packed([], CHATS, more=3), [], torch.zeros(0)),
    }


def ovis_u1() -> tuple[Model[Any], dict[str, Callable[[], Any]]]:
    made, words = test_ovis_u1.model(), test_ovis_u1.processor()
    x = test_ovis_u1.noise(32, 32)
    requests = [Request("Draw a boat."), Request("<img><|image_1|></img> darker", (image(1, 64, 64),))]
    told = [chat("<image>\nWhat?", "A boat.", images=[image(5, 64, 64)]), CHATS[2]]
    return made, {
        "a picture": lambda: made(x, torch.rand(1), words.requests(requests[:1])),
        "an edit": lambda: made(x, torch.rand(1), words.requests(requests[1:])),
        "chats": lambda: made.next_token(words.chats(told, labels=True)),
        "words": lambda: made.next_token(words.chats(told[1:], labels=True)),
        "a pack": lambda: made.packed(words.pack(words.documents([], None, [], told), 300), [], torch.zeros(0)),
    }


def ovis2() -> tuple[Model[Any], dict[str, Callable[[], Any]]]:
    words = test_ovis2.processor()
    made = test_ovis2.Ovis2(words.config)
    told = [chat("<image>\nWhat?", "A boat.", images=[image(5, 24, 24)]), CHATS[2]]
    none = torch.zeros(0)
    return made, {
        "chats": lambda: made.next_token(words.chats(told, labels=True)),
        "words": lambda: made.next_token(words.chats(told[1:], labels=True)),
        "a pack": lambda: made.packed(words.pack(words.documents([], None, [], told), 200), [], none),
    }


def mini_gemini() -> tuple[Model[Any], dict[str, Callable[[], Any]]]:
    made = test_mini_gemini.filled()
    words = MiniGeminiProcessor(made.config, test_mini_gemini.byte_tokenizer("What? A boat. Words alone"), None)
    told = [chat("<image>\nWhat?", "A boat.", images=[image(5, 24, 24)]), CHATS[2]]
    return made, {
        "chats": lambda: made.next_token(words.chats(told, labels=True)),
        "words": lambda: made.next_token(words.chats(told[1:], labels=True)),
        "a pack": lambda: made.packed(words.pack(words.documents([], None, [], told), 300), [], torch.zeros(0)),
    }


@pytest.mark.parametrize("architecture", [omnigen, ovis_u1, ovis2, mini_gemini])
def test_every_kind_of_batch_runs_each_block_once_and_in_order(
    architecture: Callable[[], tuple[Model[Any], dict[str, Callable[[], Any]]]],
) -> None:
    made, batches = architecture()
    blocks = made.blocks()
    assert len(blocks) > 1 and all(any(b is m for m in made.modules()) for b in blocks)
    for kind, run in batches.items():
        order: list[int] = []
        hooks = [b.register_forward_hook(lambda *_, i=i, o=order: o.append(i)) for i, b in enumerate(blocks)]
        run()
        for hook in hooks:
            hook.remove()
        assert order == list(range(len(blocks))), kind


def test_the_module_itself_is_called_to_train_on_pictures() -> None:
    """The hooks on a model, as of sharding, run; the numbers are those of its two halves."""
    made, words = test_ovis_u1.model(), test_ovis_u1.processor()
    x, t = test_ovis_u1.noise(32, 32), torch.tensor([0.3])
    inputs = words.requests([Request("Draw a boat.")])
    ran: list[int] = []
    made.register_forward_pre_hook(lambda *_: ran.append(1))
    assert torch.equal(made(x, t, inputs), made.velocity(x, t, made.condition(inputs, target=(4, 4)))) and ran == [1]


# --- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: FlexAttention's backward pass needs one")
@pytest.mark.parametrize("trunk", ["phi3", "qwen3"])
def test_on_a_gpu_flex_attention_trains_as_sdpa_does(trunk: str) -> None:
    """bfloat16, compiled, several blocks of 128, heads of 64; gradients to bfloat16's precision."""
    wide = {"hidden_size": 256, "heads": 4, "intermediate_size": 256, "trunk_options": {}, "rope_scaling": None}
    made = randomised(small(trunk, kv_heads=4 if trunk == "phi3" else 2, **wide)).to("cuda")
    pack = packed(REQUESTS, CHATS, length=512).to("cuda")
    x, t = noise()
    x, t = [latents.to("cuda") for latents in x], t.to("cuda")
    assert not isinstance(mask_of(spans([[0]], 1).to("cuda")), Tensor)
    outputs, slopes = {}, {}
    for made.flex in (None, False):
        with torch.autocast("cuda", torch.bfloat16):
            velocities, sums, _ = made.packed(pack, x, t)
        outputs[made.flex] = torch.cat([v.detach().float().flatten() for v in velocities] + [sums.detach()])
        slopes[made.flex] = gradients(made, sum(v.float().pow(2).mean() for v in velocities) + sums.sum())
    assert float((outputs[None] - outputs[False]).norm() / outputs[False].norm()) < 0.02
    for name, slope in slopes[False].items():
        assert float((slopes[None][name] - slope).norm()) < 0.05 * float(slope.norm()) + 1e-3, name
