"""Ovis-U1's packs: outputs and gradients of documents alone; what is missing takes part; what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.model.test_ovis_u1 import SMALL, TOKENIZER, model, picture, processor
from tests.model.test_packing import calls, chat, gradients
from x2i.base.errors import X2IError
from x2i.model.base import Chat, Request
from x2i.model.ovis_u1.model import OvisU1
from x2i.model.ovis_u1.packing import OvisU1Pack

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
    chat("Hello", "Good day.", "And <image> or <image>?", "The first.", images=[picture(6, 64, 64), picture(7, 32, 56)]),
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
