"""Lengths of Ovis-U1's sequences: of its image encoder, language model, refiner and decoder (`x2i.model.lengths`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from x2i.model.layers.chat import IGNORE
from x2i.model.lengths import Attention, Lengths, causal
from x2i.model.ovis_u1.config import OvisU1Config
from x2i.model.ovis_u1.packing import OvisU1Pack
from x2i.model.ovis_u1.prompt import TEXT, VISUAL, OvisInputs, smart_resize, tokens_to_draw

#: Marks around an image; they count as text.
_MARKS = 2


def drawing(config: OvisU1Config, text: int, inputs: int, size: tuple[int, int], shrink: int) -> Lengths:
    """Source images are read, and stand beside the noise; without any a blank image is read."""
    side, read = config.decoder.patch_size * shrink, tokens_to_draw(*size, config)
    drawn = (size[0] // side) * (size[1] // side)
    shown = max(inputs, 1)
    return Lengths(text + _MARKS * shown, (read,) * shown, drawn, (drawn,) * inputs)


def chatting(config: OvisU1Config, text: int, learned: int, sizes: Sequence[tuple[int, int]]) -> Lengths:
    """A conversation about images at their own size, up to `max_pixels`."""
    factor, read = config.image_factor, []
    for size in sizes:
        height, width = smart_resize(*size, factor, config.min_pixels, config.max_pixels)
        read.append(height * width // factor**2)
    return Lengths(text + _MARKS * len(sizes), tuple(read), learned=learned)


def probes(config: OvisU1Config, drawn: bool) -> list[Lengths]:
    """Lengths that tell words, images read, sources and noise (or learned words) apart."""
    if drawn:
        return [
            Lengths(11, (6,), 9, (5,)),
            Lengths(17, (6,), 9, (5,)),
            Lengths(11, (10,), 9, (5,)),
            Lengths(11, (6,), 15, (5,)),
            Lengths(11, (6,), 9, (8,)),
        ]
    return [
        Lengths(11, (6,), learned=4),
        Lengths(17, (6,), learned=4),
        Lengths(11, (10,), learned=4),
        Lengths(11, (6,), learned=7),
    ]


def example(config: OvisU1Config, lengths: Lengths, device: str) -> OvisInputs:
    """A row of these lengths; its images are one token high."""
    length, encoder = lengths.sequence, config.tokenizer.encoder
    stride, patch = encoder.hidden_stride, config.decoder.patch_size
    channels = config.decoder.in_channels // patch**2
    patches = sum(lengths.read) * stride**2
    return OvisInputs(
        ids_BL=torch.zeros(1, length, dtype=torch.long, device=device),
        marks_BL=torch.zeros(1, length, dtype=torch.long, device=device),
        lengths=(length,),
        patches_NF=torch.zeros(patches, 3 * encoder.patch_size**2, device=device) if patches else None,
        grids=tuple((stride, stride * n) for n in lengths.read),
        shown=tuple(range(len(lengths.read))),
        labels_BL=None if lengths.drawn else torch.zeros(1, length, dtype=torch.long, device=device),
        sources=(tuple(torch.zeros(channels, patch, patch * n, device=device) for n in lengths.sources),),
    )


def attention(config: OvisU1Config, lengths: Lengths) -> list[Attention]:
    """Encoder, language model; to draw: refiner, and in the decoder all tokens together and the images alone."""
    length, stride = lengths.sequence, config.tokenizer.encoder.hidden_stride
    patches = [n * stride**2 for n in lengths.read]
    first = patches[0] if patches else 0
    found = [Attention(first, first, sum(n**2 for n in patches)), Attention(length, length, causal(length))]
    if lengths.drawn:
        image = lengths.drawn + sum(lengths.sources)
        for tokens in (length + 1, length + image, image):
            found.append(Attention(tokens, tokens, tokens**2))
    return found


def rows(config: OvisU1Config, inputs: OvisInputs, drawn: int) -> list[Lengths]:
    """Of each row of a batch; an image that a row before has shown is encoded once, and counts as text there."""
    stride, patch = config.tokenizer.encoder.hidden_stride, config.decoder.patch_size
    marks, most = inputs.marks_BL, config.max_tokens  # longer rows are cut
    begun = ((marks != VISUAL) & (marks != TEXT)).sum(1).tolist()
    learned = [0] * len(marks) if inputs.labels_BL is None else (inputs.labels_BL[:, 1:most] != IGNORE).sum(1).tolist()
    sizes = [rows * columns // stride**2 for rows, columns in inputs.grids]
    found, first, seen = [], 0, set[int]()
    for row, length in enumerate(inputs.lengths):
        count = begun[row] // _MARKS
        new = dict.fromkeys(n for n in inputs.shown[first : first + count] if n not in seen)
        first += count
        seen.update(new)
        read = tuple(sizes[n] for n in new)
        latents = inputs.sources[row] if inputs.sources else ()
        sources = tuple(z.shape[-2] * z.shape[-1] // patch**2 for z in latents)
        found.append(Lengths(min(length, most) - sum(read), read, drawn, sources if drawn else (), learned[row]))
    return found


def packed(config: OvisU1Config, inputs: OvisU1Pack) -> tuple[list[Lengths], list[float]]:
    """Of a pack; without pictures to be drawn there are no pairs of the refiner and the decoder."""
    pairs = [float(sum((rows * columns) ** 2 for rows, columns in inputs.grids)), float(inputs.pairs)]
    drawn = [(row.sequence, row.drawn + sum(row.sources)) for row in inputs.rows if row.drawn]
    if drawn:
        kinds = [(1 + text, text + image, image) for text, image in drawn]
        pairs += [float(sum(n**2 for n in each)) for each in zip(*kinds, strict=True)]
    return list(inputs.rows), pairs
