"""What a model is asked: to draw a picture, or to answer in a conversation about pictures. Light to import: no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Request:
    """What to draw: an instruction, and its input images as uint8 [H, W, 3], in the order of the placeholders."""

    instruction: str
    images: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class Message:
    """One turn. `role` is system, user or assistant; `<image>` in `text` stands for the next image of the chat."""

    role: str
    text: str


@dataclass(frozen=True)
class Chat:
    """A conversation about images (uint8 [H, W, 3], in the order of the `<image>` marks). To be answered, or learned."""

    messages: tuple[Message, ...]
    images: tuple[np.ndarray, ...] = ()
