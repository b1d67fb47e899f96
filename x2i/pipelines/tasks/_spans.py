"""Places in a text: [start, end) in Unicode characters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

Span = tuple[int, int]

#: Thai, Lao, Burmese, Khmer, kana and Han: no spaces tell where a word ends, so that there any place counts.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORD = rf"[^\W{_UNSPACED}]|-"


def only(text: str, phrase: str) -> Span | None:
    """Where a text has a phrase as whole words, whatever their case; None where it has it nowhere, or twice."""
    if not phrase:
        return None
    found = list(re.finditer(rf"(?<!{_WORD}){re.escape(phrase)}(?!{_WORD})", text, re.IGNORECASE))
    return found[0].span() if len(found) == 1 else None


def disjoint(spans: Sequence[Span]) -> bool:
    """Whether no two spans have a character in common."""
    ordered = sorted(spans)
    return all(first[1] <= second[0] for first, second in pairwise(ordered))


def replaced(text: str, spans: Sequence[Span], by: Sequence[str]) -> str:
    """A text with other words in place of each span; the spans have nothing in common."""
    for (start, end), words in sorted(zip(spans, by, strict=True), reverse=True):
        text = text[:start] + words + text[end:]
    return text
