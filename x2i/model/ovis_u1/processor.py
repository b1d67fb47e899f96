"""Ovis-U1's prompts: what the language model is shown to draw from, to answer, and to learn.

Drawing (AIDC-AI/Ovis-U1, its scripts test_txt_to_img.py and test_img_edit.py): one user's turn, not answered.
- from text: a blank white image, and a fixed request to describe one, in front of the instruction
- editing: the source images, then the instruction; the decoder is given the latents of the sources besides
- unconditional: a blank image, "Generate an image.", no source; of the images alone: the sources and the same words
- images are read at about `min_pixels`
Several sources stand under "Image 1: " …, as the published script shows several images to be read; the decoder's
position of the k-th is image k. (The published scripts edit one image.)

Understanding: Qwen3's chat with an empty think block; images at their own resolution up to `max_pixels`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from x2i.base.errors import X2IError
from x2i.model import flow
from x2i.model.base import Branches, Chat, Message, Processor, Request
from x2i.model.layers.chat import EMPTY_THINK, END, IGNORE, IMAGE, MARK, START, ChatML, Formatted
from x2i.model.ovis_u1.config import OvisU1Config
from x2i.model.ovis_u1.decoder import shift
from x2i.model.ovis_u1.packing import OvisU1Document, OvisU1Pack, cut, pack
from x2i.model.ovis_u1.prompt import (
    OvisInputs,
    Pictures,
    Row,
    drawing_size,
    named,
    resized,
    resized_to_draw,
    smart_resize,
    tokens_to_draw,
    white,
)
from x2i.model.pixels import centre_crop, to_tensor
from x2i.model.placeholders import with_placeholders
from x2i.model.vae import VAE

DESCRIBE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, and spatial relationships of the "
    "objects:"
)
UNCONDITIONAL = "Generate an image."


class OvisU1Processor(Processor[OvisInputs]):
    """Words and pictures into Ovis-U1's inputs.

    Attributes:
        guidance_text: published weight of the text when drawing from text.
        guidance_edit: published weights of the text and of the source when editing.
    """

    special_tokens: ClassVar[tuple[str, ...]] = ("<|endoftext|>", START, END, "<think>", "</think>")
    needed_tokens: ClassVar[tuple[str, ...]] = (START, END, "<think>", "</think>")
    guidance_text: ClassVar[float] = 5.0
    guidance_edit: ClassVar[tuple[float, float]] = (6.0, 1.5)

    config: OvisU1Config

    @property
    def token_side(self) -> int:
        return self._vae().shrink * self.config.decoder.patch_size

    @property
    def stop(self) -> tuple[int, ...]:
        return tuple(i for t in (END, "<|endoftext|>") if (i := self.tokenizer.token_to_id(t)) is not None)

    @cached_property
    def chat(self) -> ChatML:
        """The conversation's formatter. Raises X2IError if the tokenizer lacks its special tokens."""
        return ChatML(self.tokenizer, think=EMPTY_THINK, last_newline=False)

    @classmethod
    def learned_text(cls, instruction: str) -> str:
        return f"user\n{DESCRIBE}{instruction}\n\nassistant\n"

    def shift(self, height: int, width: int) -> float:
        return shift(height * width // self.token_side**2, self.config.decoder)

    def edit_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the picture that the published script draws when it edits one of this size."""
        return smart_resize(height, width, factor=32)

    def requests(
        self,
        requests: Sequence[Request],
        dropped: Sequence[bool] | None = None,
        generators: Sequence[torch.Generator] | None = None,
        size: tuple[int, int] | None = None,
    ) -> OvisInputs:
        """As the contract. Sources must have sides that are multiples of `token_side`.

        A blank image has the picture's size; where it is not told, its source's, or else it is a square.
        """
        pictures = Pictures(self.config)
        pairs = list(zip(requests, dropped or [False] * len(requests), strict=True))
        sources = self._latents([() if drop else request.images for request, drop in pairs], generators)
        rows = [self._asked(pictures, request, drop, size) for request, drop in pairs]
        return pictures.collate(rows, labels=False, sources=sources)

    def branches(
        self,
        requests: Sequence[Request],
        *,
        height: int,
        width: int,
        guidance: float,
        image_guidance: float,
        separate: bool = False,
        negative: str | None = None,
    ) -> list[Branches[OvisInputs]]:
        """As the contract. Sources of another size are cropped around their centre to the picture's."""
        self.check_size(height, width)
        pictures = Pictures(self.config)
        nothing = UNCONDITIONAL if negative is None else negative
        found: list[tuple[int, int, float, Row, tuple[Tensor, ...]]] = []  # kind, picture, weight, row, sources
        held = [tuple(_fitted(image, height, width) for image in request.images) for request in requests]
        latents = self._latents(held, None)
        for place, (request, images) in enumerate(zip(requests, held, strict=True)):
            weights = flow.guidance_weights(guidance, image_guidance, bool(images))
            for kind, weight in enumerate(weights):
                if abs(weight) < 1e-9:
                    continue
                if images and kind < 2:
                    words = request.instruction if kind == 0 else with_placeholders(nothing, len(images))
                    row = self._edit(pictures, words, images)
                else:
                    words = DESCRIBE + request.instruction if kind == 0 else nothing
                    row = self._blank(pictures, words, height, width)
                found.append((kind, place, weight, row, latents[place] if kind < 2 else ()))
        groups = [[f for f in found if f[0] == kind] for kind in range(3)] if separate else [found]
        return [
            Branches(
                pictures.collate([f[3] for f in group], labels=False, sources=[f[4] for f in group]),
                torch.tensor([f[1] for f in group]),
                torch.tensor([f[2] for f in group]),
            )
            for group in groups
            if group
        ]

    def chats(self, chats: Sequence[Chat], labels: bool, plain: bool = False) -> OvisInputs:
        """As the contract. Where a conversation would be too long, its images share `max_pixels`.

        Raises:
            X2IError: images and `<image>` marks do not agree, or a conversation to be answered is too long.
        """
        pictures = Pictures(self.config)
        rows = [self._chat(pictures, chat, labels, plain) for chat in chats]
        return pictures.collate(rows, labels=labels)

    def documents(
        self,
        requests: Sequence[Request],
        dropped: Sequence[bool] | None,
        sizes: Sequence[tuple[int, int]],
        chats: Sequence[Chat],
        plain: bool = False,
        generators: Sequence[torch.Generator] | None = None,
    ) -> list[OvisU1Document]:
        """As the contract. What of a conversation lies beyond the longest sequence is cut off, as in `chats`."""
        for height, width in sizes:
            self.check_size(height, width)
        found = []
        pairs = list(zip(requests, dropped or [False] * len(requests), strict=True))
        sources = self._latents([() if drop else request.images for request, drop in pairs], generators)
        for (request, drop), latents, (height, width) in zip(pairs, sources, sizes, strict=True):
            pictures, shrink = Pictures(self.config), self._vae().shrink
            row = self._asked(pictures, request, drop, (height, width))
            size = height // shrink, width // shrink
            found.append(OvisU1Document(row, tuple(pictures.images), latents, size, self.config.decoder.patch_size))
        for chat in chats:
            pictures = Pictures(self.config)
            row = cut(self._chat(pictures, chat, labels=True, plain=plain), self.config.max_tokens)
            found.append(OvisU1Document(row, tuple(pictures.images)))
        return found

    def pack(self, documents: Sequence[OvisU1Document], length: int) -> OvisU1Pack:
        """As the contract; the language model's sequence is as long as it needs to be."""
        return pack(documents, length, self.config)

    def picture_tokens(self, width: int, height: int, chat: bool) -> int:
        """As the contract: of one that is drawn, or drawn from, those that are read and those of its latents."""
        if not chat:
            return super().picture_tokens(width, height, chat) + tokens_to_draw(height, width, self.config)
        factor, ends = self.config.image_factor, (self.config.min_pixels, self.config.max_pixels)
        height, width = smart_resize(height, width, factor, *ends)
        return height * width // factor**2

    def _asked(self, pictures: Pictures, request: Request, drop: bool, size: tuple[int, int] | None) -> Row:
        """The turn of a request; `size` [pixels] as in `requests`."""
        side = int(self.config.min_pixels**0.5)
        height, width = size or (request.images[0].shape[:2] if request.images else (side, side))
        if drop:
            return self._blank(pictures, UNCONDITIONAL, height, width)
        if request.images:
            return self._edit(pictures, request.instruction, request.images)
        return self._blank(pictures, DESCRIBE + request.instruction, height, width)

    def _chat(self, pictures: Pictures, chat: Chat, labels: bool, plain: bool) -> Row:
        if plain:
            words = self._plain(chat, labels)
        else:
            words = self.chat.learn(chat.messages) if labels else self.chat.ask(chat.messages)
        row = pictures.row(words, self._read(pictures, chat, self.config.max_pixels))
        if len(row.ids) > self.config.max_tokens and len(chat.images) > 1:
            row = pictures.row(words, self._read(pictures, chat, self.config.max_pixels // len(chat.images)))
        if len(row.ids) > self.config.max_tokens and not labels:
            raise X2IError(
                f"a conversation of {len(row.ids)} tokens, but the model takes {self.config.max_tokens}: shorten it, or "
                f"show fewer or smaller images"
            )
        return row

    def _read(self, pictures: Pictures, chat: Chat, most: int) -> list[int]:
        most = max(most, 4 * self.config.image_factor**2)
        return [
            pictures.add((id(image), most), partial(resized, Image.fromarray(image), self.config, most))
            for image in chat.images
        ]

    def _plain(self, chat: Chat, labels: bool) -> Formatted:
        said = "".join(m.text for m in chat.messages if m.role == "assistant").replace(MARK, "")
        said = self.chat.control.broken(said)
        ids = self.tokenizer.encode(said + END if labels else "", add_special_tokens=False).ids
        places = len(chat.images)
        return Formatted((*[IMAGE] * places, *ids), (*[IGNORE] * places, *ids))

    def _blank(self, pictures: Pictures, text: str, height: int, width: int) -> Row:
        """A turn that shows a white image, as tall and wide as the picture before it is scaled."""
        shown = pictures.add(("white", height, width), partial(self._white, *drawing_size(height, width, self.config)))
        return self._turn(pictures, f"{MARK}\n{text}", [shown])

    @cached_property
    def _white(self) -> Callable[[int, int], Tensor]:
        """`prompt.white`, made once a size."""
        return lru_cache(maxsize=64)(partial(white, self.config))

    def _edit(self, pictures: Pictures, instruction: str, images: Sequence[np.ndarray]) -> Row:
        """A turn that shows source images in front of the instruction."""
        shown = [
            pictures.add((id(image), "draw"), partial(resized_to_draw, Image.fromarray(image), self.config))
            for image in images
        ]
        names = [f"Image {k}: " if len(images) > 1 else "" for k in range(1, len(images) + 1)]
        head = "".join(f"{name}{MARK}\n" for name in names)
        return self._turn(pictures, head + named(instruction, len(images)), shown)

    def _turn(self, pictures: Pictures, text: str, shown: Sequence[int]) -> Row:
        words = self.chat.ask([Message("user", text)], reply=False)
        visual = sum(pictures.tokens(number) + 2 for number in shown)
        return pictures.row(self._cut(words, self.config.max_tokens - visual), shown)

    def _latents(
        self, images: Sequence[Sequence[np.ndarray]], generators: Sequence[torch.Generator] | None
    ) -> list[tuple[Tensor, ...]]:
        """Latents of each row's images; those of one size are encoded in one call, and each once."""
        sizes: dict[tuple[int, ...], dict[int, tuple[np.ndarray, int]]] = {}
        for row, image in ((row, image) for row, some in enumerate(images) for image in some):
            self.check_size(*image.shape[:2])
            sizes.setdefault(image.shape, {}).setdefault(id(image), (image, row))
        found: dict[int, Tensor] = {}
        for same in sizes.values():
            drawn = None if generators is None else [generators[row] for _, row in same.values()]
            pixels = to_tensor([image for image, _ in same.values()])
            found |= zip(same, self._vae().encode(pixels, drawn), strict=True)
        return [tuple(found[id(image)] for image in row) for row in images]

    def _vae(self) -> VAE:
        if self.vae is None:
            raise X2IError("this processor has no autoencoder: it can prepare no pictures")
        return self.vae

    def _cut(self, words: Formatted, room: int) -> Formatted:
        """Drop tokens from the end of the instruction, in front of the mark that ends the turn."""
        places = words.ids.count(IMAGE)
        limit = room if self.max_text_tokens is None else min(room, self.max_text_tokens)
        tail = len(self.tokenizer.encode(END + "\n", add_special_tokens=False).ids)
        first = max((i + 1 for i, token in enumerate(words.ids) if token == IMAGE), default=0)
        end = len(words.ids) - tail
        over = min(max(len(words.ids) - places - limit, 0), end - first)
        ids = words.ids[: end - over] + words.ids[end:]
        if len(ids) - places > room:
            raise X2IError(f"{places} images do not fit into a sequence of {self.config.max_tokens} tokens: give fewer")
        return Formatted(ids, (IGNORE,) * len(ids))


def _fitted(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return image if image.shape[:2] == (height, width) else centre_crop(Image.fromarray(image), height, width)


PROCESSOR = OvisU1Processor
