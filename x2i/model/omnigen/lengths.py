"""Lengths of OmniGen's sequences, [text and condition images][time token][noisy patches] (`x2i.model.lengths`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from x2i.model.lengths import Attention, Lengths, causal, of_documents
from x2i.model.omnigen.config import OmniGenConfig
from x2i.model.omnigen.packing import OmniGenPack
from x2i.model.omnigen.prompt import IGNORED, PromptBatch
from x2i.model.pixels import fitted

#: Longest side of a conversation's image in pixels, as its processor has it.
LARGEST = 1024


def drawing(config: OmniGenConfig, text: int, inputs: int, size: tuple[int, int], shrink: int) -> Lengths:
    """A sample with input images of the size that is drawn."""
    side = config.patch_size * shrink
    tokens = (size[0] // side) * (size[1] // side)
    return Lengths(text, (tokens,) * inputs, tokens)


def chatting(config: OmniGenConfig, text: int, learned: int, sizes: Sequence[tuple[int, int]]) -> Lengths:
    """A conversation; images are scaled down to the published side. Counted at 8 pixels a latent (SDXL's)."""
    read = []
    for size in sizes:
        token = 8 * config.patch_size
        width, height = fitted(size[1], size[0], LARGEST, token)
        read.append((width // token) * (height // token))
    return Lengths(text, tuple(read), learned=learned)


def probes(config: OmniGenConfig, drawn: bool) -> list[Lengths]:
    """Lengths that tell words, condition images and noise (or learned words) apart."""
    if drawn:
        return [
            Lengths(11, (6,), 9),
            Lengths(17, (6,), 9),
            Lengths(11, (10,), 9),
            Lengths(11, (6,), 13),
        ]
    return [
        Lengths(11, (6,), learned=4),
        Lengths(17, (6,), learned=4),
        Lengths(11, (10,), learned=4),
        Lengths(11, (6,), learned=7),
    ]


def example(config: OmniGenConfig, lengths: Lengths, device: str) -> PromptBatch:
    """A row of these lengths; its images are one patch high."""
    length, patch = lengths.sequence, config.patch_size
    return PromptBatch(
        ids_BL=torch.zeros(1, length, dtype=torch.long, device=device),
        valid_BL=torch.ones(1, length, dtype=torch.bool, device=device),
        blocks_BL=torch.zeros(1, length, dtype=torch.long, device=device),
        images=tuple(torch.zeros(config.in_channels, patch, patch * n, device=device) for n in lengths.read),
        labels_BL=None if lengths.drawn else torch.zeros(1, length, dtype=torch.long, device=device),
    )


def attention(config: OmniGenConfig, lengths: Lengths) -> list[Attention]:
    """The trunk's. The condition is causal, its images see themselves; time sees the condition, noise sees all."""
    length, noisy = lengths.sequence, lengths.drawn
    pairs = causal(length) + sum(n * (n - 1) / 2 for n in lengths.read)
    if not noisy:
        return [Attention(length, length, pairs)]
    whole = length + 1 + noisy
    return [Attention(whole, whole, pairs + (length + 1) + noisy * whole)]


def rows(config: OmniGenConfig, inputs: PromptBatch, drawn: int) -> list[Lengths]:
    """Of each row of a batch."""
    blocks = inputs.blocks_BL
    count = int(blocks.max()) if blocks.numel() else 0
    images = [(blocks == k).sum(1).tolist() for k in range(1, count + 1)]
    learned = [0] * len(blocks) if inputs.labels_BL is None else (inputs.labels_BL[:, 1:] != IGNORED).sum(1).tolist()
    found = []
    for row, valid in enumerate(inputs.valid_BL.sum(1).tolist()):
        read = tuple(each[row] for each in images if each[row])
        found.append(Lengths(valid - sum(read), read, drawn, learned=learned[row]))
    return found


def packed(config: OmniGenConfig, inputs: OmniGenPack) -> tuple[list[Lengths], list[float]]:
    """Of a pack; all condition images of a document count as one."""
    images, times = (of_documents(inputs.lengths, places) for places in (inputs.image_M, inputs.time_G))
    drawn = iter([height * width // config.patch_size**2 for height, width in inputs.sizes])
    learned = iter(inputs.learned.counts_K.tolist())
    found = []
    for length, read, time in zip(inputs.lengths, images, times, strict=True):
        noisy = next(drawn) if time else 0
        words = 0 if time else next(learned)
        found.append(Lengths(length - read - time - noisy, (read,) if read else (), noisy, learned=words))
    return found, [inputs.pairs]
