"""Ovis-U1's packs: outputs and gradients of documents alone; what is missing takes part; what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.model.test_ovis_u1 import SMALL, TOKENIZER, model, picture, processor
from tests.model.test_packing import calls, chat, gradients
from x2i.base.errors import X2IError
from x2i.model.base import Chat, Request
from x2i.model.ovis_u1 import packing
from x2i.model.ovis_u1.config import PARTS, STAGES
from x2i.model.ovis_u1.model import OvisU1
from x2i.model.ovis_u1.packing import OvisU1Pack
from x2i.model.ovis_u1.processor import OvisU1Processor
from x2i.model.ovis_u1.prompt import TEXT, VISUAL, Row

A, B = "<img><|image_1|></img>", "<img><|image_2|></img>"
REQUESTS = [
    Request("a red square"),
    Request(f"{A} make it blue", (picture(1, 32, 64),)),
    Request(f"{B} beside {A}", (picture(2, 32, 32), picture(3, 64, 32))),
    Request(f"left out {A}", (picture(4, 32, 32),)),
    Request("a green square and a yellow one"),
]
DROPPED = [False, False, False, True, False]
SIZES = [(32, 32), (32, 64), (64, 48), (32, 32), (32, 32)]  # of the first and the last one white image
CHATS = [
    chat("<image> What is it?", "A boat.", images=[picture(5, 40, 24)]),
    chat(
        "Hello", "Good day.", "And <image> or <image>?", "The first.", images=[picture(6, 64, 64), picture(7, 32, 56)]
    ),
    chat("Words alone", "Yes, words."),
]


def noise(sizes: Sequence[tuple[int, int]] = SIZES) -> tuple[list[Tensor], Tensor]:
    drawn = torch.Generator().manual_seed(3)
    return [torch.randn(4, h // 8, w // 8, generator=drawn) for h, w in sizes], torch.rand(len(sizes), generator=drawn)


def packed(requests: Sequence[int], chats: Sequence[Chat], more: int = 0) -> OvisU1Pack:
    """A pack of the requests of these numbers, `more` tokens longer than needed; made one by one, as the trainer does."""
    words = processor()
    documents = [words.documents([REQUESTS[i]], [DROPPED[i]], [SIZES[i]], [])[0] for i in requests]
    documents += words.documents([], None, [], chats)
    return words.pack(documents, sum(d.length for d in documents) + more)


def losses(made: OvisU1, requests: Sequence[int], chats: Sequence[Chat]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Of each document in a batch of its own: velocities, sums, counts."""
    x, t = noise()
    velocities = [
        made(x[i][None], t[i : i + 1], processor().requests([REQUESTS[i]], [DROPPED[i]], size=SIZES[i]))[0]
        for i in requests
    ]
    told = [made.next_token(processor().chats([one], labels=True)) for one in chats]
    sums, counts = (torch.cat([each[n] for each in told]) if told else torch.zeros(0) for n in (0, 1))
    return velocities, sums, counts


@cache
def whole() -> OvisU1:
    return model()


def check(requests: Sequence[int], chats: Sequence[Chat], more: int = 0) -> None:
    made, (x, t) = whole(), noise()
    pack = packed(requests, chats, more)
    velocities, sums, counts = made.packed(pack, [x[i] for i in requests], t[list(requests)])
    alone, alone_sums, alone_counts = losses(made, requests, chats)
    for one, other in zip(velocities, alone, strict=True):
        assert one.shape == other.shape and float(other.detach().abs().max()) > 0.1
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.detach().abs().max()))
    torch.testing.assert_close(sums, alone_sums, rtol=1e-5, atol=0)
    assert counts.tolist() == alone_counts.tolist()
    slopes = gradients(made, sum((v.pow(2).mean() for v in velocities), sums.sum()))
    expected = gradients(made, sum((v.pow(2).mean() for v in alone), alone_sums.sum()))
    assert slopes.keys() >= expected.keys()
    for name, slope in slopes.items():
        other = expected.get(name, torch.zeros_like(slope))
        assert float((slope - other).abs().max()) <= 2e-5 * float(other.abs().max()) + 1e-7, name


@pytest.mark.parametrize(
    ("requests", "chats"),
    [([0, 4], []), ([0, 1, 2, 3, 4], []), ([], CHATS), ([4, 2, 3, 1, 0], CHATS), ([1], CHATS[2:])],
    ids=["words", "several sizes, edits, a dropped one", "conversations", "mixed", "one of each"],
)
def test_a_pack_computes_what_its_documents_compute_alone(requests: list[int], chats: list[Chat]) -> None:
    check(requests, chats, more=33)


def test_what_is_dropped_or_cut_is_so_in_a_pack() -> None:
    """A conversation beyond the longest sequence loses its end: words, part of an image, all of a later one."""
    words = " ".join(["word"] * 62)
    images = [picture(8, 64, 64), picture(9, 64, 64), picture(10, 64, 64)]
    long = chat(f"{words} <image>", "Yes.", f"{words[:140]} <image> or <image>", "No.", images=images)
    batch = processor().chats([long], labels=True)
    assert batch.lengths[0] > SMALL.max_tokens
    (document,) = processor().documents([], None, [], [long])
    first, second, _ = (document.images[number].shape[1:].numel() // 64 for number in document.row.shown)
    assert document.length == SMALL.max_tokens and first < document.row.marks.count(VISUAL) < first + second
    assert packed([], [long]).rows[0].read == (first, second)
    check([0], [long, CHATS[0]])
    longer = chat(" ".join([words] * 2), "Yes.", "<image> What?", "No.", images=images[:1])
    pack = packed([], [longer, CHATS[2]])
    assert pack.patches_NF is None and pack.rows[0].tokens == SMALL.max_tokens
    check([], [longer, CHATS[2]])


def test_images_that_are_the_same_are_encoded_once() -> None:
    """Whichever call made the documents; the language model sees them in each."""
    pack = packed([0, 4, 3, 2], CHATS[:1])
    blank, *others = pack.grids
    assert blank == (8, 8) and len(others) == 3  # two sources and the conversation's
    assert [row.read for row in pack.rows] == [(16,), (), (), (16, 21), (24,)]
    assert [int((pack.visual_V < 16).sum())] == [3 * 16]
    assert len(pack.places_V) == 3 * 16 + 16 + 21 + 24
    again = [chat("<image> What else?", "Water.", images=[image.copy() for image in CHATS[0].images])]
    odd = picture(5, 40, 24)
    odd[-1, -1] += 1
    other = [chat("<image> What is it?", "A boat.", images=[odd])]
    pack = packed([], [CHATS[0], *again, *other])
    assert [row.read for row in pack.rows] == [(24,), (), (24,)]
    check([0, 4], [CHATS[0], *again, *other])


def test_a_pack_says_what_it_costs() -> None:
    """Each document in the language model, and its noise and sources in the decoder."""
    pack = packed([0, 2], CHATS[:1], more=9)
    alone = processor().requests([REQUESTS[0]], size=SIZES[0]).lengths[0]
    edit = processor().requests([REQUESTS[2]], size=SIZES[2]).lengths[0]
    told = processor().chats(CHATS[:1], labels=True).lengths[0]
    assert pack.lengths == (alone + 4, edit + 12 + 4 + 8, told)
    assert pack.pairs == sum(n * (n + 1) // 2 for n in (alone, edit, told))
    assert pack.pairs == int(pack.spans.dense()[0, 0, : alone + edit + told].sum())
    for count in (1, 100, 1000, 4097, 15_000):
        padded = len(packed_words(count))
        assert 0 <= padded - count < max(count / 16, 16) and padded % 16 == 0
        assert padded < 2048 or padded % 128 == 0


def packed_words(count: int) -> Tensor:
    """Ids of a pack of one document of so many words."""
    row = Row((1,) * count, (TEXT,) * count, (-100,) * count, ())
    return packing.pack([packing.OvisU1Document(row, ())], 1 << 20, SMALL).ids_T


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_and_sdpa_agree() -> None:
    made, (x, t) = whole(), noise()
    pack, found = packed(range(5), CHATS), {}
    for made.flex in (True, False):
        with torch.no_grad():
            found[made.flex] = made.packed(pack, x, t)
    made.flex = None
    for ours, theirs in zip(found[True][0], found[False][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[True][1], found[False][1], rtol=1e-5, atol=0)


def test_in_bfloat16_a_pack_is_close() -> None:
    """Under autocast, as the trainer computes."""
    made, (x, t) = whole(), noise()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        velocities, sums, _ = made.packed(packed(range(5), CHATS), x, t)
        alone, alone_sums, _ = losses(made, range(5), CHATS)
    for one, other in zip(velocities, alone, strict=True):
        assert float((one - other).abs().mean()) < 0.03 * float(other.abs().mean())
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums, alone_sums, rtol=0.02, atol=0)


KINDS: dict[str, tuple[list[int], list[Chat]]] = {
    "all": ([0, 1, 3], CHATS),
    "no conversations": ([1], []),
    "no pictures": ([], CHATS),
    "words alone": ([], CHATS[2:]),
    "a picture from words": ([0], []),
    "nothing": ([], []),
}


def test_what_a_pack_lacks_is_run_all_the_same() -> None:
    """So ranks with different packs gather and reduce the same; all gradients are there, and of dummies zero."""
    made = OvisU1(SMALL).train()
    made.load_state_dict(model().state_dict())
    x, t = noise()
    seen, found = {}, {}
    for kind, (requests, chats) in KINDS.items():
        pack = processor().pack([], 100) if kind == "nothing" else packed(requests, chats)

        def run(kind: str = kind, pack: OvisU1Pack = pack, requests: Sequence[int] = requests) -> None:
            velocities, sums, counts = made.packed(pack, [x[i] for i in requests], t[requests])
            assert (len(velocities), len(sums), len(counts)) == (len(requests), *[len(pack.learned.counts_K)] * 2)
            found[kind] = gradients(made, sum((v.pow(2).mean() for v in velocities), sums.sum()))

        seen[kind] = calls(made, run)
    assert all(of_one == seen["all"] for of_one in seen.values())
    assert set(seen["all"]) > {"vte", "visual_tokenizer.head.0", "visual_generator.backbone.final_layer.linear"}
    unused = {"visual_tokenizer.backbone.trunk.post_trunk_norm.weight"}  # as published: kept, not applied
    assert all(of_one.keys() == dict(made.named_parameters()).keys() - unused for of_one in found.values())
    used = {kind: {n.split(".")[0] for n, g in of.items() if g.abs().max() > 0} for kind, of in found.items()}
    seeing = {"llm", "visual_tokenizer", "vte"}
    assert used == {
        "all": {*seeing, "visual_generator"},
        "no conversations": {*seeing, "visual_generator"},
        "no pictures": seeing,
        "words alone": {"llm"},
        "a picture from words": {*seeing, "visual_generator"},
        "nothing": set(),
    }


@pytest.mark.parametrize("stage", STAGES)
def test_stages_train_their_parts_on_packs(stage: str) -> None:
    """What a stage trains has a gradient from any pack, what it freezes none, nor a graph where nothing asks for one."""
    made = OvisU1(SMALL).train()
    made.load_state_dict(model().state_dict())
    prefixes = tuple(prefix for part in STAGES[stage] for prefix in PARTS[part])
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))
    x, t = noise()
    drawing = {"refiner", "decoder"} >= set(STAGES[stage])
    for kind, (requests, chats) in KINDS.items():
        if kind == "nothing":
            continue
        velocities, sums, _ = made.packed(packed(requests, chats), [x[i] for i in requests], t[requests])
        found = gradients(made, sum((v.pow(2).mean() for v in velocities), sums.sum()))
        assert {n for n in found if not n.startswith(prefixes)} == set()
        expected = {n for n, p in made.named_parameters() if p.requires_grad and "post_trunk_norm" not in n}
        assert found.keys() == expected, kind
        moved = {n.split(".")[0] for n, g in found.items() if g.abs().max() > 0}
        assert ("visual_generator" in moved) is (drawing and bool(requests)), kind
    hidden: list[bool] = []
    hook = made.llm.model.norm.register_forward_hook(lambda *given: hidden.append(given[2].requires_grad))
    made.packed(packed([0], []), x[:1], t[:1])
    hook.remove()
    assert hidden == [not drawing]


def test_compiled_blocks_are_compiled_no_more_after_the_second_length() -> None:
    made = OvisU1(SMALL)
    made.load_state_dict(model().state_dict())
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    for block in made.blocks():
        block.compile(backend=counter, fullgraph=True)
    (x, t), counts = noise(), []
    for requests, chats in (([0], []), ([0, 1], CHATS), ([2, 3], CHATS[:1]), ([], CHATS[1:]), (list(range(5)), CHATS)):
        pack, given = packed(requests, chats), ([x[i] for i in requests], t[requests])
        velocities, sums, _ = made.packed(pack, *given)
        expected, expected_sums, _ = whole().packed(pack, *given)
        torch.testing.assert_close(velocities, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(sums, expected_sums)
        counts.append(counter.frame_count)
    assert counts[1:] == counts[1:2] * 4


def test_what_does_not_fit_is_refused() -> None:
    made, (x, t) = whole(), noise(SIZES[:1])
    pack = packed([0], [])
    count = sum(pack.lengths)
    with pytest.raises(X2IError, match=f"1 documents of {count} tokens do not fit into a pack of {count - 1}"):
        packed([0], [], more=-1)
    with pytest.raises(X2IError, match=r"latent sizes \[\(4, 4\)\] was given \[\(8, 6\)\]"):
        made.packed(pack, [torch.zeros(4, 8, 6)], t)
    with pytest.raises(X2IError, match="2 timesteps"):
        made.packed(pack, x, torch.zeros(2))
    with pytest.raises(X2IError, match="no turn of the assistant"):
        processor().documents([], None, [], [chat("What?")])
    with pytest.raises(X2IError, match="height 9"):
        processor().documents(REQUESTS[:1], None, [(9, 16)], [])
    with pytest.raises(X2IError, match="no autoencoder"):
        OvisU1Processor(SMALL, TOKENIZER, None).documents(REQUESTS[:1], None, [(32, 32)], [])
    assert OvisU1Processor(SMALL, TOKENIZER, None).documents([], None, [], CHATS)
