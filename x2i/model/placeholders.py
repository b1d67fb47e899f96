"""How words name pictures: `<img><|image_1|></img>` in an instruction, `<image>` in a conversation."""

from __future__ import annotations

import re

from x2i.base.errors import X2IError

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
