"""How many tokens a sample's text takes, without any model's tokenizer: what the manifest's `text_tokens` and
`rejected_tokens` hold.

The text is cut as byte-level BPEs cut it before they merge (words, digits, punctuation), and each piece is counted at
what vocabularies of 16,000 to 50,000 make of it on English text: a word one token up to nine letters and one more for
each three beyond, a digit one, marks one for two, an ideograph, kana or hangul one. A tokenizer's own counts are a
straight line of it, with a standard deviation of about 0.7 times its root.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

#: What stands for pictures, boxes and names: those have tokens of their own.
_MARKS = re.compile(r"<img><\|image_\d+\|></img>|<image>|<ref-object>|<bbox>")

#: Ideographs, kana, hangul; letters of other scripts; digits; whatever else can be seen.
_PIECES = re.compile(r"([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff])|([^\W\d_]+)|(\d+)|((?:[^\w\s]|_)+)")

#: A box as it is written out: four numbers of three digits, in brackets.
_BOX = 17


def text_tokens(text: str) -> int:
    """Tokens of a text, about."""
    total = 0
    for single, word, digits, marks in _PIECES.findall(_MARKS.sub(" ", text)):
        if word:
            total += 1 if len(word) <= 9 else 1 + -(-(len(word) - 9) // 3)
        else:
            total += 1 if single else len(digits) + -(-len(marks) // 2)
    return total


def sample_tokens(instruction: str, messages: Sequence[Mapping[str, Any]], objects: Mapping[str, Any]) -> int:
    """Tokens of a sample's text, about: of a conversation all turns, with boxes and names; else of the instruction."""
    if not messages:
        return text_tokens(instruction)
    turns = sum(text_tokens(str(turn.get("content", ""))) for turn in messages)
    names = sum(text_tokens(str(name)) for name in objects.get("ref") or ())
    return turns + names + _BOX * len(objects.get("bbox") or ())


def rejected_tokens(
    messages: Sequence[Mapping[str, Any]], rejected: str | None, objects: Mapping[str, Any]
) -> int | None:
    """Tokens of a conversation with the rejected answer in place of its last turn, about; None if there is none."""
    if rejected is None or not messages:
        return None
    return sample_tokens("", [*messages[:-1], {"content": rejected}], objects)
