"""Lengths of Ovis2's sequences: of its image encoder, tile by tile, and language model (`x2i.model.lengths`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from x2i.base.errors import X2IError
from x2i.model.layers.chat import IGNORE
from x2i.model.layers.chat_pack import ChatPack
from x2i.model.lengths import Attention, Lengths, causal, of_documents
from x2i.model.ovis2.config import Ovis2Config
from x2i.model.ovis2.model import Ovis2Batch
from x2i.model.ovis2.partition import TILE, best_grid, layout


def drawing(config: Ovis2Config, text: int, inputs: int, size: tuple[int, int], shrink: int) -> Lengths:
    """It draws nothing. Raises X2IError."""
    raise X2IError("Ovis2 draws no pictures")


def chatting(config: Ovis2Config, text: int, learned: int, sizes: Sequence[tuple[int, int]]) -> Lengths:
    """A conversation; its images are cut into tiles, the marks between which count as text."""
    most = config.tiles.several if len(sizes) > 1 else config.tiles.single
    tiles = 0
    for height, width in sizes:
        places = layout(best_grid(width, height, config.side, most, config.tiles.covering))
        tiles += places.count(TILE)
        text += len(places) - places.count(TILE)
    return Lengths(text, (config.tile_tokens,) * tiles, learned=learned)


def probes(config: Ovis2Config, drawn: bool) -> list[Lengths]:
    """Lengths that tell words, tiles and learned words apart; tiles have one size."""
    tile = config.tile_tokens
    return [
        Lengths(11, (tile,), learned=4),
        Lengths(17, (tile,), learned=4),
        Lengths(11, (tile, tile), learned=4),
        Lengths(11, (tile,), learned=7),
    ]


def example(config: Ovis2Config, lengths: Lengths, device: str) -> Ovis2Batch:
    """A row of these lengths."""
    length, encoder = lengths.sequence, config.tokenizer.encoder
    side = encoder.image_size // encoder.patch_size
    return Ovis2Batch(
        ids_BL=torch.zeros(1, length, dtype=torch.long, device=device),
        valid_BL=torch.ones(1, length, dtype=torch.bool, device=device),
        labels_BL=torch.zeros(1, length, dtype=torch.long, device=device),
        patches_NF=torch.zeros(len(lengths.read) * side**2, 3 * encoder.patch_size**2, device=device),
        grids=((side, side),) * len(lengths.read),
        visual_P=torch.zeros(sum(lengths.read), dtype=torch.long, device=device),
    )


def attention(config: Ovis2Config, lengths: Lengths) -> list[Attention]:
    """Of the encoder within each tile, and of the language model."""
    encoder, length = config.tokenizer.encoder, lengths.sequence
    patches = (encoder.image_size // encoder.patch_size) ** 2
    return [Attention(patches, patches, len(lengths.read) * patches**2), Attention(length, length, causal(length))]


def rows(config: Ovis2Config, inputs: Ovis2Batch, drawn: int) -> list[Lengths]:
    """Of each row of a batch; a tile that is cut off counts in part."""
    tile, visual = config.tile_tokens, (inputs.ids_BL == TILE).sum(1).tolist()
    learned = [0] * len(visual) if inputs.labels_BL is None else (inputs.labels_BL[:, 1:] != IGNORE).sum(1).tolist()
    return [
        Lengths(valid - shown, (tile,) * (shown // tile) + ((shown % tile,) if shown % tile else ()), learned=words)
        for valid, shown, words in zip(inputs.valid_BL.sum(1).tolist(), visual, learned, strict=True)
    ]


def packed(config: Ovis2Config, inputs: ChatPack[Ovis2Batch]) -> tuple[list[Lengths], list[float]]:
    """Of a pack."""
    tile, encoder = config.tile_tokens, config.tokenizer.encoder
    shown = of_documents(inputs.lengths, (inputs.row.ids_BL[0] == TILE).nonzero()[:, 0])
    rows = [
        Lengths(length - visual, (tile,) * (visual // tile), learned=words)
        for length, visual, words in zip(inputs.lengths, shown, inputs.learned.counts_K.tolist(), strict=True)
    ]
    patches = (encoder.image_size // encoder.patch_size) ** 2
    return rows, [len(inputs.row.grids) * patches**2, inputs.pairs]
