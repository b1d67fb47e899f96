"""Conversations about images into Mini-Gemini's inputs.

- text between images is tokenised piece by piece; the beginning-of-text token stands in front of the first only
- an image takes up as many tokens as the model makes of it; their ids are 0 and never looked at
- batches are padded on the left

Tensor names carry their axes: B rows · L tokens · M images · V low views per image · C channels · H, W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from x2i.base.errors import X2IError
from x2i.model.base import Chat, Message, Processor, Request
from x2i.model.layers import chat_pack
from x2i.model.layers.chat_pack import ChatPack
from x2i.model.mini_gemini.batch import IGNORE, ChatBatch
from x2i.model.mini_gemini.config import MiniGeminiConfig
from x2i.model.mini_gemini.images import check, views
from x2i.model.mini_gemini.template import MARK, PLAIN, TEMPLATES, Written
from x2i.model.placeholders import ControlWords
from x2i.model.vae import VAE

#: Where an image's tokens stand in a row of ids.
_IMAGE = -1
#: What begins a text: the first of these that the tokenizer knows.
_BEGIN = ("<bos>", "<s>", "<|begin_of_text|>")


@dataclass(frozen=True)
class Row:
    """One conversation: ids, `_IMAGE` on image tokens, and as many labels; its images, in the order of their tokens."""

    ids: list[int]
    labels: list[int]
    images: tuple[np.ndarray, ...]

    @property
    def length(self) -> int:
        """Tokens that it takes in a pack."""
        return len(self.ids)


class MiniGeminiProcessor(Processor[ChatBatch]):
    """Words and images into `ChatBatch`es, as `config.template` and `config.aspect` say.

    Args:
        max_text_tokens: conversations to be learned lose what is longer at their end; image tokens are not counted.

    Raises:
        X2IError: the tokenizer lacks a token of the template.
    """

    special_tokens: ClassVar[tuple[str, ...]] = (
        *("<pad>", "<eos>", "<bos>", "<unk>"),
        *("<start_of_turn>", "<end_of_turn>"),
    )
    begin: ClassVar[str | None] = "<bos>"

    def __init__(
        self, config: MiniGeminiConfig, tokenizer: Tokenizer, vae: VAE | None, max_text_tokens: int | None = None
    ) -> None:
        super().__init__(config, tokenizer, vae, max_text_tokens)
        self.template = TEMPLATES[config.template]
        self._control = ControlWords(tokenizer)
        missing = [t for t in self.template.special if tokenizer.token_to_id(t) is None]
        if missing:
            raise X2IError(
                f"the tokenizer lacks {', '.join(missing)}, which the template {config.template!r} writes: take the "
                f"tokenizer of the language model, or another template"
            )
        known = (tokenizer.token_to_id(t) for t in _BEGIN)
        self._begin = [next((i for i in known if i is not None), None)]

    @property
    def token_side(self) -> int:
        return 1  # it draws no pictures itself

    def picture_tokens(self, width: int, height: int, chat: bool) -> int:
        """As the contract; whatever the picture's size."""
        return int(self.config.image_tokens)

    @classmethod
    def learned_text(cls, instruction: str) -> str:
        return TEMPLATES["gemma"].write([Message("user", instruction)], reply=True).text.replace(MARK, "")

    def chats(self, chats: Sequence[Chat], labels: bool, plain: bool = False) -> ChatBatch:
        """One row per conversation.

        Args:
            chats: with as many `<image>` marks in users' messages as images.
            labels: to be learned, ending with an answer; else ending with a user's message, to be answered.
            plain: without the chat's template: the images, then the assistant's words and a newline.

        Raises:
            X2IError: images and marks differ in number, or turns are not in order.
        """
        rows = [self._row(chat, labels, plain) for chat in chats]
        length = max(row.length for row in rows)
        ids_BL = torch.zeros(len(rows), length, dtype=torch.long)
        labels_BL = torch.full_like(ids_BL, IGNORE)
        valid_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
        for place, row in enumerate(rows):
            ids_BL[place, length - row.length :] = torch.tensor(row.ids)
            labels_BL[place, length - row.length :] = torch.tensor(row.labels)
            valid_BL[place, length - row.length :] = True
        return self._batch(rows, ids_BL, valid_BL, labels_BL if labels else None)

    def documents(
        self,
        requests: Sequence[Request],
        dropped: Sequence[bool] | None,
        sizes: Sequence[tuple[int, int]],
        chats: Sequence[Chat],
        plain: bool = False,
        generators: Sequence[torch.Generator] | None = None,
    ) -> list[Row]:
        """As the contract. Raises X2IError besides if there are requests: Mini-Gemini draws no pictures itself."""
        chat_pack.no_pictures("Mini-Gemini", requests)
        for image in (image for chat in chats for image in chat.images):
            check(image)
        return [self._row(chat, labels=True, plain=plain) for chat in chats]

    def pack(self, documents: Sequence[Row], length: int) -> ChatPack[ChatBatch]:
        """As the contract."""
        rest = chat_pack.room([row.length for row in documents], length)
        ids_BL = torch.tensor([[*(i for row in documents for i in row.ids), *[0] * rest]], dtype=torch.long)
        valid_BL = (torch.arange(length) < length - rest)[None]
        return ChatPack.of(self._batch(documents, ids_BL, valid_BL, None), [row.labels for row in documents], length)

    def _batch(self, rows: Sequence[Row], ids_BL: Tensor, valid_BL: Tensor, labels_BL: Tensor | None) -> ChatBatch:
        """A batch of these ids, `_IMAGE` on image tokens, with the images of the rows in it."""
        image_BL = ids_BL == _IMAGE
        made = [views(image, self.config) for row in rows for image in row.images]
        return ChatBatch(
            ids_BL=ids_BL.masked_fill(image_BL, 0),
            valid_BL=valid_BL,
            image_BL=image_BL,
            labels_BL=labels_BL,
            low_MVCHW=torch.stack([low for low, _ in made]) if made else None,
            high_MCHW=torch.stack([high for _, high in made]) if made else None,
        )

    @property
    def stop(self) -> tuple[int, ...]:
        found = [self.tokenizer.encode(s, add_special_tokens=False).ids for s in self.template.stop]
        return tuple(dict.fromkeys(ids[0] for ids in found if len(ids) == 1))

    def _row(self, chat: Chat, labels: bool, plain: bool) -> Row:
        written = (PLAIN if plain else self.template).write(self._control.in_messages(chat.messages), reply=not labels)
        marks = written.text.count(MARK)
        if marks != len(chat.images):
            raise X2IError(
                f"a conversation has {len(chat.images)} images, but {marks} {MARK} marks in its users' messages: put "
                f"one mark for each image"
            )
        ids, learned = self._tokens(written)
        if labels and self.max_text_tokens is not None:
            ids, learned = ids[: self.max_text_tokens + marks], learned[: self.max_text_tokens + marks]
            if ids.count(_IMAGE) != marks:
                raise X2IError(
                    f"a conversation's images stand behind its first {self.max_text_tokens} text tokens: allow more, or "
                    f"leave it out"
                )
        repeat = [self.config.image_tokens if i == _IMAGE else 1 for i in ids]
        return Row(
            [i for i, n in zip(ids, repeat, strict=True) for _ in range(n)],
            [i for i, n in zip(learned, repeat, strict=True) for _ in range(n)],
            chat.images,
        )

    def _tokens(self, written: Written) -> tuple[list[int], list[int]]:
        """Ids and labels, one `_IMAGE` per image. Learned are the tokens that have a learned character."""
        ids = [i for i in self._begin if i is not None]
        labels = [IGNORE] * len(ids)
        start = 0
        for place, piece in enumerate(written.text.split(MARK)):
            if place:
                ids.append(_IMAGE)
                labels.append(IGNORE)
                start += len(MARK)
            found = self.tokenizer.encode(piece, add_special_tokens=False)
            for token, (first, last) in zip(found.ids, found.offsets, strict=True):
                within = any(start + last > a and start + first < b for a, b in written.learned)
                ids.append(token)
                labels.append(token if within else IGNORE)
            start += len(piece)
        return ids, labels


PROCESSOR = MiniGeminiProcessor
