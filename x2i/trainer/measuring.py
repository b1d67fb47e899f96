"""How long the samples of a corpus are for a model: measured on some of them, for the plan of packs.

The texts of a few hundred samples are read, and made into documents with tiny black pictures; what the manifest's
estimate makes of them is fitted to that. Of a stage that draws from few samples all texts are counted so
(`x2i.trainer.counted`). A preference is measured with both its answers. Texts that the model is shown in part alone are
fitted whole, and how much of them is kept is found by one that is longer than any pack.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from x2i.base.errors import X2IError
from x2i.base.files import write_text
from x2i.base.seeds import digest
from x2i.model.base import Chat, Message, Processor, Request
from x2i.model.placeholders import MARK, image_only
from x2i.trainer.counted import counted
from x2i.trainer.data import DamagedSample, SampleReader, no_preference
from x2i.trainer.lengths import Fit, Lengths
from x2i.trainer.mixture import calibrated, checked, training_of
from x2i.trainer.stage import Stage

#: In the run's folder: what was measured; and what was counted, by model and corpora.
FILE, COUNTS = "lengths.json", "lengths"

log = logging.getLogger(__name__)


def lengths_of(
    processor: Processor[Any],
    reader: SampleReader,
    stage: Stage,
    keep: Path | None = None,
    note: Callable[[str], None] = log.info,
) -> Lengths:
    """What a model makes of the samples that a stage draws.

    Args:
        keep: where to note what was measured of texts, and to find it again: a text that cannot be read any more must not
            change the plan of a run.
        note: is told how far counting has come.

    Raises:
        X2IError: the model takes no packs.
        RecipeError: the corpora have none of what the stage's mixture names.
    """
    checked(reader.table, stage)
    made = _Made(processor, stage)
    whole = _Made(type(processor)(processor.config, processor.tokenizer, processor.vae, None), stage)
    tasks = training_of(reader.table, stage)
    request = whole.request("", 0) if tasks.keys() - reader.table.chats else 0
    chat = whole.chat(_ASKED, 0) - _WORD if tasks.keys() & reader.table.chats else 0
    one, two = (whole.request("", count) if request else 0 for count in (1, 2))
    per_image = two - one if request else whole.chat(_ASKING, 1) - whole.chat(_ASKED, 0)
    first_image = one - request - per_image if request else 0
    several = (whole.chat(_ASKING_TWICE, 2) - whole.chat(_ASKED, 0)) / 2 - per_image if chat else 0.0
    least = min(filter(None, (request, chat)))
    long = " q 7" * stage.pack.tokens if stage.pack else ""  # longer than a pack in any vocabulary
    answer = (Message("user", ""), Message("assistant", long))
    longest = whole.chat(answer, 0) if chat else 0
    picture = processor.picture_tokens(whole.side, whole.side, True)
    preferred = stage.preference is not None

    def text(sample: int, whole_only: bool = False) -> int | None:
        """Tokens of a sample's text; of a preference those of both its conversations.

        Args:
            whole_only: None where the model itself cuts it.
        """
        try:
            example = reader.words(sample, whole.side)
            if preferred and no_preference(example):
                return None
            count, chats = len(example.inputs), bool(example.messages)
            asked = [example.chat, example.rejected_chat] if preferred else [example.chat]
            found = (
                [whole.chat(a.messages, count) for a in asked] if chats else [whole.request(example.instruction, count)]
            )
        except (DamagedSample, X2IError):  # told of when the trainer meets it
            return None
        if whole_only and chats and max(found) + count * picture >= longest:
            return None
        marks = count * (per_image + (several if chats and count > 1 else 0))
        return round(sum(found) - len(found) * (marks + (chat if chats else request + first_image * (count > 0))))

    def asked(sample: int, chats: bool) -> int | None:
        """As `text`, of this kind alone."""
        task = reader.table.task(sample)
        return text(sample, True) if task in tasks and (task in reader.table.chats) == chats else None

    corpora, words = [c.digest for c in reader.table.corpora], processor.tokenizer.to_str()
    how = processor.max_text_tokens, stage.plain_captions, processor.config.model_dump(mode="json")
    kind = "lengths/2/preferred" if preferred else "lengths/2"
    name = f"{stage.name} {digest(kind, corpora, words, *how)[:16]}"
    noted = _noted(keep)
    if name not in noted:
        noted[name] = [calibrated(reader.table, partial(asked, chats=c), preferred=preferred) for c in (False, True)]
        if keep is not None:
            written = {stage: [asdict(fit) for fit in fits] for stage, fits in noted.items()}
            write_text(keep, json.dumps(written, indent=1) + "\n")
    drawn, said = noted[name]
    counts = None
    if stage.pack is not None and sum(len(samples) for samples in tasks.values()) <= stage.pack.count:
        place = digest("texts/1", corpora, words, *how[1:], preferred, sorted(tasks))[:16]
        counts = counted(reader.table, tasks, text, None if keep is None else keep.with_name(COUNTS) / place, note)
    return Lengths(
        text=drawn,
        said=said,
        picture=processor.picture_tokens,
        per_image=per_image,
        several=several,
        per_output=request - least if request else 0,
        per_document=least,
        dropped=whole.dropped() - request if request else 0,
        text_most=made.request(long, 0) - request if request else None,
        said_most=made.chat(answer, 0) - chat if chat else None,
        chat_most=longest or None,
        answers=2 if preferred else 1,
        first_image=first_image,
        counted=counts,
    )


def _noted(keep: Path | None) -> dict[str, list[Fit]]:
    """What was measured before, by stage and corpora: of what is drawn, of what is said. Raises X2IError."""
    if keep is None or not keep.is_file():
        return {}
    try:
        found = json.loads(keep.read_text(encoding="utf-8"))
        return {name: [Fit(**drawn), Fit(**said)] for name, (drawn, said) in found.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise X2IError(f"{keep}: cannot be read ({error}). Remove it to measure the texts anew") from None


_ASKED = (Message("user", ""), Message("assistant", "x"))
_ASKING = (Message("user", MARK), Message("assistant", "x"))
_ASKING_TWICE = (Message("user", MARK + MARK), Message("assistant", "x"))

#: Tokens of the word that is said in these: without words there is nothing to learn.
_WORD = 1


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
