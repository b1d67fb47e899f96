"""How words name pictures: `<img><|image_1|></img>` in an instruction, `<image>` in a conversation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from x2i.base.errors import X2IError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from x2i.model.chat import Message

#: The place of an input image in an instruction; its number counts from 1.
PLACEHOLDER = re.compile(r"<\|image_(\d+)\|>")
#: The place of the next image in a conversation.
MARK = "<image>"


def image_only(count: int) -> str:
    """The placeholders of `count` images and nothing else: the instruction of guidance's image-only branch."""
    return " ".join(f"<img><|image_{i}|></img>" for i in range(1, count + 1))


def with_placeholders(instruction: str, count: int) -> str:
    """Put placeholders in front of an instruction that has none, so that `count` images have their place."""
    return f"{image_only(count)} {instruction}" if count and not PLACEHOLDER.search(instruction) else instruction


def numbers_of(instruction: str, count: int) -> list[int]:
    """Numbers of an instruction's placeholders in the order of the text, from 1.

    Raises:
        X2IError: they are not those of `count` images; one image may stand in several places.
    """
    numbers = [int(n) for n in PLACEHOLDER.findall(instruction)]
    if sorted(set(numbers)) != list(range(1, count + 1)):
        given = ", ".join(f"<|image_{n}|>" for n in numbers) or "no placeholder"
        raise X2IError(
            f"{count} input images, but the instruction has {given}. It must name every image: "
            f"<img><|image_1|></img> to <img><|image_N|></img>."
        )
    return numbers


class ControlWords:
    """Keeps the words of users and corpora from becoming control tokens, as `<|im_end|>` in a caption would.

    Tokenizers look for their special tokens in any text. One that a text spells gets a space behind its first
    character; texts that spell none, and so nearly all, stay as they are. Placeholders and `<image>` are kept.
    """

    _KEPT = re.compile(r"((?:<img>)?<\|image_\d+\|>(?:</img>)?)")

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = (t for t in tokenizer.get_added_tokens_decoder().values() if t.special)
        words = sorted((t.content for t in added if t.content != MARK and t.content), key=len, reverse=True)
        self._found = re.compile("|".join(map(re.escape, words))) if words else None

    def broken(self, text: str) -> str:
        """The text without control tokens."""
        if self._found is None:
            return text
        pieces = self._KEPT.split(text)
        pieces[::2] = [self._found.sub(lambda m: f"{m[0][:1]} {m[0][1:]}", piece) for piece in pieces[::2]]
        return "".join(pieces)

    def in_messages(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The same messages without control tokens in their texts."""
        return tuple(replace(m, text=self.broken(m.text)) for m in messages)
