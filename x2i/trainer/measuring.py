"""How long the samples of a corpus are for a model: measured on some of them, for the plan of packs.

The texts of a few hundred samples are read, and made into documents with tiny black pictures; what the manifest's
estimate makes of them is fitted to that.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from x2i.base.errors import X2IError
from x2i.model.base import Chat, Message, Processor, Request
from x2i.model.placeholders import MARK, image_only
from x2i.trainer.config import Stage
from x2i.trainer.data import DamagedSample, SampleReader
from x2i.trainer.lengths import Lengths
from x2i.trainer.mixture import calibrated, training_of


def lengths_of(processor: Processor[Any], reader: SampleReader, stage: Stage) -> Lengths:
    """What a model makes of the samples that a stage draws. Raises X2IError if it takes no packs."""
    made = _Made(processor, stage)
    tasks = training_of(reader.table, stage)
    request = made.request("", 0) if tasks.keys() - reader.table.chats else 0
    chat = made.chat((Message("user", ""), Message("assistant", "")), 0) if tasks.keys() & reader.table.chats else 0
    per_image = (made.request("", 1) - request) if request else (made.chat(_ASKING, 1) - made.chat(_ASKED, 0))
    least = min(filter(None, (request, chat)))

    def text(sample: int, chats: bool) -> int | None:
        """Tokens of a sample's text, of this kind alone."""
        task = reader.table.task(sample)
        if task not in tasks or (task in reader.table.chats) != chats:
            return None
        try:
            example = reader.words(sample, made.side)
            count = len(example.inputs)
            whole = made.chat(example.messages, count) if chats else made.request(example.instruction, count)
        except (DamagedSample, X2IError):  # told of when the trainer meets it
            return None
        return whole - count * per_image - (chat if chats else request)

    return Lengths(
        text=calibrated(reader.table, lambda sample: text(sample, False)),
        said=calibrated(reader.table, lambda sample: text(sample, True)),
        picture=processor.picture_tokens,
        per_image=per_image,
        per_output=request - least if request else 0,
        per_document=least,
        dropped=made.dropped() - request if request else 0,
    )


_ASKED = (Message("user", ""), Message("assistant", "x"))
_ASKING = (Message("user", MARK), Message("assistant", "x"))


class _Made:
    """Documents of text and tiny pictures: their tokens without those of the pictures."""

    def __init__(self, processor: Processor[Any], stage: Stage) -> None:
        self._processor, self._plain = processor, stage.plain_captions
        self.side = processor.token_side
        self._black = np.zeros((self.side, self.side, 3), np.uint8)

    def request(self, instruction: str, images: int) -> int:
        """Tokens of a request with so many images; without an instruction, of one that names them only."""
        return self._request(Request(instruction or image_only(images), (self._black,) * images), False)

    def dropped(self) -> int:
        """Tokens of a request without its condition."""
        return self._request(Request("", ()), True)

    def chat(self, messages: tuple[Message, ...], images: int) -> int:
        """Tokens of a conversation with so many images."""
        given = Chat(messages, (self._black,) * images)
        found = self._processor.documents([], [], [], [given], self._plain)[0].length
        return int(found) - images * self._processor.picture_tokens(self.side, self.side, True)

    def _request(self, request: Request, dropped: bool) -> int:
        found = self._processor.documents([request], [dropped], [(self.side, self.side)], [])[0].length
        shown = 0 if dropped else len(request.images)
        return int(found) - (shown + 1) * self._processor.picture_tokens(self.side, self.side, False)
