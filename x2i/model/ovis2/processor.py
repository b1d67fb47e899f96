"""Conversations and images into Ovis2's inputs.

- chats in ChatML with Qwen2.5's default system message; bare captions in a template instead (stages 1a and 1b)
- an `<image>` becomes the tiles of its image (`partition.py`); alone it may have more of them than among others
- each view: bicubic to the tile's side, CLIP's mean and deviation, zeros around
- cut twice, as published: to `max_text_tokens` with a tile counted as one token (learning only), and to the model's
  longest sequence with all visual tokens; what is learned loses its end, what is answered its beginning

Source: AIDC-AI/Ovis at 58b0ad6 (`preprocess_inputs`, `preprocess_image`, `CaptionDataset`, `pad_truncate_sequence`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from x2i.base.errors import X2IError
from x2i.model.base import Chat, Processor, Request
from x2i.model.layers import chat_pack
from x2i.model.layers.aimv2 import Grid, patchify
from x2i.model.layers.chat import END, IGNORE, IMAGE, MARK, START, ChatML
from x2i.model.layers.chat_pack import ChatPack
from x2i.model.ovis2.config import Ovis2Config
from x2i.model.ovis2.model import Ovis2Batch
from x2i.model.ovis2.partition import TILE, best_grid, fitted, layout, views
from x2i.model.vae import VAE

SYSTEM = "You are a helpful assistant."
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


@dataclass(frozen=True)
class Row:
    """One conversation: `ids` and `labels` of one length, its tiles [3, side, side], and which visual token of them
    stands at each `TILE` of `ids`.
    """

    ids: list[int]
    labels: list[int]
    tiles: list[Tensor]
    visual: list[int]

    @property
    def length(self) -> int:
        """Tokens that it takes in a pack."""
        return len(self.ids)


class Ovis2Processor(Processor[Ovis2Batch]):
    """Words and images into Ovis2's inputs."""

    special_tokens = ("<|endoftext|>", START, END)
    needed_tokens = (START, END)

    def __init__(
        self, config: Ovis2Config, tokenizer: Tokenizer, vae: VAE | None, max_text_tokens: int | None = None
    ) -> None:
        super().__init__(config, tokenizer, vae, max_text_tokens)
        self.chat = ChatML(tokenizer, system=SYSTEM)

    @property
    def token_side(self) -> int:
        """Pixels per side of one visual token. Ovis2 draws no pictures."""
        encoder = self.config.tokenizer.encoder
        return int(encoder.patch_size * encoder.hidden_stride)

    def picture_tokens(self, width: int, height: int, chat: bool) -> int:
        """As the contract; where a conversation has several, each may take less."""
        grid = best_grid(width, height, self.config.side, self.config.tiles.single, self.config.tiles.covering)
        places = layout(grid)
        return len(places) + places.count(TILE) * (self.config.tile_tokens - 1)

    @classmethod
    def learned_text(cls, instruction: str) -> str:
        return f"system\n{SYSTEM}\nuser\n{instruction}\nassistant\n"

    @property
    def stop(self) -> tuple[int, ...]:
        found = (self.tokenizer.token_to_id(token) for token in (END, "<|endoftext|>"))
        return tuple(token for token in found if token is not None)

    def chats(
        self, chats: Sequence[Chat], labels: bool, plain: bool = False, max_tiles: int | None = None
    ) -> Ovis2Batch:
        """One row per conversation: with `labels` to be learned (the assistant's turns), without to be answered.

        Args:
            chats: images of any size.
            labels: whether the batch has labels.
            plain: bare captions: the images in the config's `caption_template`, then the assistant's last text.
            max_tiles: most tiles of an image; default: the config's, by the number of images. Frames of a video take
                `config.tiles.video`.

        Raises:
            X2IError: the `<image>` marks of a conversation are not as many as its images.
        """
        rows = [self._row(chat, labels, plain, max_tiles) for chat in chats]
        return collate(rows, labels, self.config)

    def documents(
        self,
        requests: Sequence[Request],
        dropped: Sequence[bool] | None,
        sizes: Sequence[tuple[int, int]],
        chats: Sequence[Chat],
        plain: bool = False,
        generators: Sequence[torch.Generator] | None = None,
    ) -> list[Row]:
        """As the contract. Raises X2IError besides if there are requests: Ovis2 draws no pictures."""
        chat_pack.no_pictures("Ovis2", requests)
        return [self._row(chat, learn=True, plain=plain, max_tiles=None) for chat in chats]

    def pack(self, documents: Sequence[Row], length: int) -> ChatPack[Ovis2Batch]:
        """As the contract."""
        rest = chat_pack.room([row.length for row in documents], length)
        row = collate([joined(documents, rest, self.config)], True, self.config)
        return ChatPack.of(row, [row.labels for row in documents], length)

    def _row(self, chat: Chat, learn: bool, plain: bool, max_tiles: int | None) -> Row:
        most = max_tiles or (self.config.tiles.several if len(chat.images) > 1 else self.config.tiles.single)
        placed, given = self._caption(chat, learn) if plain else self._conversation(chat, learn)
        if placed.count(IMAGE) != len(chat.images):
            raise X2IError(
                f"a conversation with {len(chat.images)} images and {placed.count(IMAGE)} {MARK} marks: "
                "there must be one mark for each"
            )
        ids, labels, tiles = list[int](), list[int](), list[Tensor]()
        images = iter(chat.images)
        for token, label in zip(placed, given, strict=True):
            places = [token]
            if token == IMAGE:
                places = self._cut(next(images), most, tiles)
            ids += places
            labels += [label] * len(places)
        if learn and self.max_text_tokens is not None:
            ids, labels = ids[: self.max_text_tokens], labels[: self.max_text_tokens]
        return expanded(ids, labels, tiles, learn, self.config)

    def _conversation(self, chat: Chat, learn: bool) -> tuple[list[int], list[int]]:
        form = self.chat.learn(chat.messages) if learn else self.chat.ask(chat.messages)
        return list(form.ids), list(form.labels)

    def _caption(self, chat: Chat, learn: bool) -> tuple[list[int], list[int]]:
        said = [m.text for m in chat.messages if m.role == "assistant"]
        caption = self._ids(self.chat.control.broken(said[-1].replace(MARK, "").strip())) if learn and said else []
        head, tail = self.config.caption_template.split(MARK)
        ids = [*self._ids(head), *[IMAGE] * len(chat.images), *self._ids(tail)]
        return ids + caption, [IGNORE] * len(ids) + caption

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _cut(self, image: np.ndarray, max_tiles: int, tiles: list[Tensor]) -> list[int]:
        """Add an image's views to `tiles`; its places in the text."""
        side, covering = self.config.side, self.config.tiles.covering
        height, width = image.shape[:2]
        grid = best_grid(width, height, side, max_tiles, covering)
        whole = Image.fromarray(image)
        tiles += [view(whole.crop(box), side) for box in views(width, height, grid)]
        return layout(grid)


def expanded(ids: Sequence[int], labels: Sequence[int], tiles: list[Tensor], learn: bool, config: Ovis2Config) -> Row:
    """A row with as many ids for a tile as it has visual tokens, cut to the model's longest sequence.

    Args:
        ids: with one `TILE` for each tile, or fewer: the last tiles are then left out.
        labels: as many.
        tiles: views [3, side, side].
        learn: what is too long loses its end; otherwise its beginning.
        config: says how many visual tokens a tile has, and how long a sequence may be.
    """
    per_tile = config.tile_tokens
    longer, learned = list[int](), list[int]()
    for token, label in zip(ids, labels, strict=True):
        count = per_tile if token == TILE else 1
        longer += [token] * count
        learned += [label] * count
    start = 0 if learn else max(len(longer) - config.max_length, 0)
    before = longer[:start].count(TILE)
    longer, learned = longer[start : start + config.max_length], learned[start : start + config.max_length]
    visual = range(before, before + longer.count(TILE))
    if not visual:
        return Row(longer, learned, [], [])
    first, last = visual[0] // per_tile, visual[-1] // per_tile  # tiles that are cut off need not be encoded
    return Row(longer, learned, tiles[first : last + 1], [place - first * per_tile for place in visual])


def view(image: Image.Image, side: int) -> Tensor:
    """One view [3, side, side], float32: resized with its aspect kept, normalised, in the middle of zeros."""
    out = torch.zeros(3, side, side)
    width, height = fitted(image.width, image.height, side)
    pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    normal = torch.from_numpy((pixels / 255 - MEAN) / STD).permute(2, 0, 1)
    top, left = (side - height) // 2, (side - width) // 2
    out[:, top : top + height, left : left + width] = normal
    return out


def joined(rows: Sequence[Row], rest: int, config: Ovis2Config) -> Row:
    """Rows one after the other as one, with `rest` tokens of padding behind them."""
    whole = Row([], [], [], [])
    for row in rows:
        before = len(whole.tiles) * config.tile_tokens
        whole.visual.extend(before + place for place in row.visual)
        whole.ids.extend(row.ids)
        whole.labels.extend(row.labels)
        whole.tiles.extend(row.tiles)
    whole.ids.extend([0] * rest)
    whole.labels.extend([IGNORE] * rest)
    return whole


def collate(rows: Sequence[Row], learn: bool, config: Ovis2Config) -> Ovis2Batch:
    """Pad rows into one batch: on the right to be learned, on the left to be answered."""
    length = max(len(row.ids) for row in rows)

    def padded(values: Sequence[Sequence[int]], filling: int) -> Tensor:
        fill = [[filling] * (length - len(v)) for v in values]
        return torch.tensor([[*v, *f] if learn else [*f, *v] for v, f in zip(values, fill, strict=True)])

    visual, before = list[int](), 0
    for row in rows:
        visual += [before + place for place in row.visual]
        before += len(row.tiles) * config.tile_tokens
    tiles = [tile for row in rows for tile in row.tiles]
    encoder = config.tokenizer.encoder
    patches_NF, grids = torch.zeros(0, 3 * encoder.patch_size**2), list[Grid]()
    if tiles:
        patches_NF, grids = patchify(tiles, encoder.patch_size, encoder.hidden_stride)
    return Ovis2Batch(
        ids_BL=padded([row.ids for row in rows], 0),
        valid_BL=padded([[1] * len(row.ids) for row in rows], 0).bool(),
        labels_BL=padded([row.labels for row in rows], IGNORE) if learn else None,
        patches_NF=patches_NF,
        grids=tuple(grids),
        visual_P=torch.tensor(visual, dtype=torch.long),
    )


PROCESSOR = Ovis2Processor
