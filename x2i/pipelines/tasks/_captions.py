"""Texts from sources and models, as instructions hold them."""

from __future__ import annotations

#: What a sentence may end with, quotation marks included.
_ENDS = frozenset(".!?…。！？\"”'’)")


def sentence(text: str) -> str:
    """A caption with a full stop, where it has no end of its own, so that another sentence may follow."""
    return text if not text or text[-1] in _ENDS else f"{text}."


def quoted(text: str) -> str:
    """A text in straight quotation marks, or in round ones where it has straight ones itself."""
    return f"“{text}”" if '"' in text else f'"{text}"'
