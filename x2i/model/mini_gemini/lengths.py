"""Lengths of Mini-Gemini's sequences: of its CLIP, view by view, and language model (`x2i.model.lengths`).

An image is read in views of one size, so that it always takes the same work; the high-resolution encoder is counted
with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from x2i.base.errors import X2IError
from x2i.model.layers.chat_pack import ChatPack
from x2i.model.lengths import Attention, Lengths, causal, of_documents
from x2i.model.mini_gemini.batch import IGNORE, ChatBatch
from x2i.model.mini_gemini.config import MiniGeminiConfig


def drawing(config: MiniGeminiConfig, text: int, inputs: int, size: tuple[int, int], shrink: int) -> Lengths:
    """It draws nothing itself. Raises X2IError."""
    raise X2IError("Mini-Gemini draws no pictures itself")


def chatting(config: MiniGeminiConfig, text: int, learned: int, sizes: Sequence[tuple[int, int]]) -> Lengths:
    """A conversation."""
    return Lengths(text, (config.image_tokens,) * len(sizes), learned=learned)


def probes(config: MiniGeminiConfig, drawn: bool) -> list[Lengths]:
    """Lengths that tell words, images and learned words apart; images have one size."""
    image = config.image_tokens
    return [
        Lengths(11, (image,), learned=4),
        Lengths(17, (image,), learned=4),
        Lengths(11, (image, image), learned=4),
        Lengths(11, (image,), learned=7),
    ]


def example(config: MiniGeminiConfig, lengths: Lengths, device: str) -> ChatBatch:
    """A row of these lengths."""
    length, images = lengths.sequence, len(lengths.read)
    low, high = config.low.image_size, config.high.image_size
    return ChatBatch(
        ids_BL=torch.zeros(1, length, dtype=torch.long, device=device),
        valid_BL=torch.ones(1, length, dtype=torch.bool, device=device),
        image_BL=torch.zeros(1, length, dtype=torch.bool, device=device),
        labels_BL=torch.zeros(1, length, dtype=torch.long, device=device),
        low_MVCHW=torch.zeros(images, config.views, 3, low, low, device=device) if images else None,
        high_MCHW=torch.zeros(images, 3, high, high, device=device) if images else None,
    )


def attention(config: MiniGeminiConfig, lengths: Lengths) -> list[Attention]:
    """Of CLIP within each view (with its class token), and of the language model."""
    length, view = lengths.sequence, config.low.side**2 + 1
    views = len(lengths.read) * config.views
    return [Attention(view, view, views * view**2), Attention(length, length, causal(length))]


def rows(config: MiniGeminiConfig, inputs: ChatBatch, drawn: int) -> list[Lengths]:
    """Of each row of a batch."""
    shown = inputs.image_BL.sum(1).tolist()
    learned = [0] * len(shown) if inputs.labels_BL is None else (inputs.labels_BL[:, 1:] != IGNORE).sum(1).tolist()
    image = config.image_tokens
    return [
        Lengths(valid - tokens, (image,) * (tokens // image), learned=words)
        for valid, tokens, words in zip(inputs.valid_BL.sum(1).tolist(), shown, learned, strict=True)
    ]


def packed(config: MiniGeminiConfig, inputs: ChatPack[ChatBatch]) -> tuple[list[Lengths], list[float]]:
    """Of a pack."""
    image, view = config.image_tokens, config.low.side**2 + 1
    shown = of_documents(inputs.lengths, inputs.row.image_BL[0].nonzero()[:, 0])
    rows = [
        Lengths(length - tokens, (image,) * (tokens // image), learned=words)
        for length, tokens, words in zip(inputs.lengths, shown, inputs.learned.counts_K.tolist(), strict=True)
    ]
    views = sum(len(row.read) for row in rows) * config.views
    return rows, [views * view**2, inputs.pairs]
