"""A conversation's turns, out of a sample's JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from x2i.model.chat import Message
from x2i.model.placeholders import MARK

_ROLES = ("system", "user", "assistant")


class DamagedSample(Exception):
    """One sample's bytes are not what the manifest says, do not decode, or contradict each other. Becomes a `Damage`."""


def messages(record: dict[str, Any]) -> tuple[Message, ...]:
    """The turns, with what `<ref-object>` and `<bbox>` stand for written out, boxes in thousandths of the sides.

    Raises:
        DamagedSample: there are none, or they are not as ms-swift has them.
    """
    try:
        turns = [(str(m["role"]), str(m["content"])) for m in record["messages"]]
        objects = record.get("objects") or {}
        refs, boxes = iter(objects.get("ref", ())), iter(objects.get("bbox", ()))
        if objects.get("bbox_type", "norm1") != "norm1":
            raise DamagedSample(f"its boxes are {objects['bbox_type']!r}; norm1 is read")
        marks = {"<ref-object>": lambda: str(next(refs)), "<bbox>": lambda: _box(next(boxes))}
        return tuple(Message(r, re.sub("<ref-object>|<bbox>", lambda m: marks[m[0]](), t)) for r, t in turns)
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration, RuntimeError) as error:
        raise DamagedSample(f"its messages cannot be read ({type(error).__name__}: {error})") from None


def check_turns(turns: Sequence[Message], images: int, rejected: Any) -> None:
    """Raise DamagedSample if nothing could be learned from a conversation, or not as it is written."""
    marks = sum(m.text.count(MARK) for m in turns)
    if marks != images:
        raise DamagedSample(f"its messages have {marks} marks {MARK}, and it has {images} images")
    if strange := sorted({m.role for m in turns} - set(_ROLES)):
        raise DamagedSample(f"its messages have the role {strange[0]!r}; known: {', '.join(_ROLES)}")
    if all(m.role != "assistant" for m in turns):
        raise DamagedSample("no message of it is the assistant's: there is nothing to be learned")
    if rejected is not None and (not isinstance(rejected, str) or MARK in rejected):
        raise DamagedSample("its rejected_response is not a text")


def _box(sides: Sequence[float]) -> str:
    return "[" + ", ".join(str(round(1000 * float(v))) for v in sides) + "]"
