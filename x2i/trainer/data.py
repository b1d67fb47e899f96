"""Samples by the plan: byte ranges out of the shards, checked, decoded and cut."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from x2i.base.errors import X2IError
from x2i.base.seeds import generator
from x2i.model.chat import Chat, Message
from x2i.model.pixels import crop
from x2i.model.placeholders import numbers_of
from x2i.trainer import turns
from x2i.trainer.config import Decode
from x2i.trainer.decode import Data, pictures
from x2i.trainer.plan import Draw, Plan
from x2i.trainer.ranges import Block, Shards
from x2i.trainer.stage import Stage
from x2i.trainer.table import SampleRef, SampleTable
from x2i.trainer.turns import DamagedSample

log = logging.getLogger(__name__)

#: Samples that are tried for one draw; and places of the stream that are searched for them, as a stratum may mix kinds.
_TRIES, _SPARES = 33, 4096


#: Damaged samples that the console names.
_TOLD = 20


@dataclass(frozen=True)
class Example:
    """A decoded sample. `draw` is its number in the stage's stream, `sample` its row in the table, `replaced` why the
    sample that was planned gave way to it, if it did.

    To be drawn: images are uint8 [H, W, 3] of one size. To be answered (`output` is None): `messages` speak of the inputs,
    which are whole, [H, W, 3] each; `rejected` is an answer that is worse than the last one.
    """

    draw: int
    key: str
    task: str
    instruction: str
    inputs: tuple[np.ndarray, ...]
    output: np.ndarray | None
    messages: tuple[Message, ...] = ()
    rejected: str | None = None
    sample: int = -1
    replaced: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels."""
        return sum(i.nbytes for i in (*self.inputs, self.output) if i is not None)

    @property
    def chat(self) -> Chat:
        """The conversation."""
        return Chat(self.messages, self.inputs)

    @property
    def rejected_chat(self) -> Chat:
        """The conversation with the worse answer at its end. Raises ValueError if there is none."""
        if self.rejected is None:
            raise ValueError(f"sample {self.key} has no rejected_response")
        return Chat((*self.messages[:-1], Message("assistant", self.rejected)), self.inputs)


@dataclass(frozen=True)
class Damage:
    """A sample that could not be used, and why."""

    corpus: str
    shard: str
    key: str
    reason: str


class Due(NamedTuple):
    """Where a sample lies, and the block that it is read with."""

    ref: SampleRef
    block: Block


class _Form(NamedTuple):
    """A sample as it is kept: cut to a side, or a height and width; or `whole`, with this shorter side."""

    sample: int
    side: int | tuple[int, int]
    whole: bool


class SampleReader:
    """Reads and decodes single samples, by threads at will; keeps decoded crops up to a number of bytes.

    Attributes:
        table: the samples; `shards`: where they lie.
        damaged: samples that could not be used, by number.

    Args:
        cache_bytes: of decoded crops, least recently used out first.
        decode: how JPEGs are decoded (`x2i.trainer.decode`).
        verify: whether each sample's bytes are held against the manifest's SHA-256.
        open_files: shards that are kept open.
    """

    def __init__(
        self,
        table: SampleTable,
        cache_bytes: int = 0,
        decode: Decode = "reduced",
        verify: bool = True,
        open_files: int = 128,
    ) -> None:
        self.table = table
        self.shards = Shards(open_files)
        self.damaged: dict[int, Damage] = {}
        self._cache: OrderedDict[_Form, Example] = OrderedDict()
        self._limit, self._held = cache_bytes, 0
        self._how: Decode = decode
        self._verify = verify
        self._lock = threading.Lock()

    def read(self, index: int, side: int | tuple[int, int]) -> Example:
        """One sample of the table, cut around the centre to a square of `side` pixels, or to a height and width.

        Conversations show their pictures whole, with `side` as the shorter one.

        Raises:
            DamagedSample: the sample cannot be used.
        """
        return self._read(_Form(index, side, whole=False))

    def text(self, index: int) -> str:
        """One sample's instruction, or its conversation, without decoding its images. Raises DamagedSample."""
        record = self._record(self._members(self.table[index]))
        return str(record.get("instruction") or "") or "\n".join(m.text for m in turns.messages(record))

    def words(self, index: int, side: int) -> Example:
        """One sample's words, with black squares of `side` pixels for its input images. Raises DamagedSample.

        Only its JSON is read, and not held against the manifest's hash, which is that of the whole sample.
        """
        ref = self.table[index]
        record = self._record(self._json(ref))
        inputs = (np.zeros((side, side, 3), np.uint8),) * len(record.get("input_images") or ())
        if "output_image" not in record:
            said, rejected = turns.messages(record), record.get("rejected_response")
            turns.check_turns(said, len(inputs), rejected)
            return Example(-1, ref.key, ref.task, "", inputs, None, said, rejected, index)
        return Example(-1, ref.key, ref.task, str(record.get("instruction") or ""), inputs, None, sample=index)

    def planned(self, plan: Plan, draw: Draw, stage: Stage, due: Due | None = None) -> Example:
        """The sample of a draw, or of its next spare that is whole, cut as the stage says.

        A conversation gives way to a conversation, a picture to a picture: what a step is made of is known from the plan.
        In a stage that learns preferences, samples whose last answer was not preferred to another give way too.

        Args:
            due: where the draw's bytes are, if they are read with others'.

        Raises:
            X2IError: so many in a row are damaged that the corpus must be.
        """
        reason, last, chat = None, "", draw.task in self.table.chats
        for candidate in itertools.islice(self._candidates(plan, draw, chat), _TRIES):
            try:
                found = self._read(self._form(candidate, stage), due if candidate is draw else None)
                example = replace(found, draw=draw.index, replaced=reason)
                if stage.min_crop < 1 and not chat:
                    width, height = candidate.size or (stage.resolution, stage.resolution)
                    return _cut(example, height, width, stage.min_crop, plan.key)
                last = no_preference(example) if stage.preference is not None else ""
                if not last:
                    return example
            except DamagedSample as damage:
                last = str(damage)
                self._record_damage(candidate.sample, last)
            reason = reason or f"{self.table[draw.sample].key}: {last}"
        remedy = "`x2i verify CORPUS` says whether the corpus is damaged."
        if stage.preference is not None:
            remedy = f"Of the tasks in stages.{stage.name}.mixture all samples should have a rejected_response."
        raise X2IError(
            f"{_TRIES} samples of {draw.stratum} in a row cannot be used, the last for this reason: {last}. {remedy}"
        )

    def holds(self, draw: Draw, stage: Stage) -> bool:
        """Whether a draw's pictures are in memory, and its bytes need not be read."""
        with self._lock:
            return self._form(draw, stage) in self._cache

    def _form(self, draw: Draw, stage: Stage) -> _Form:
        """What of a sample a stage needs before it is cut."""
        width, height = draw.size or (stage.resolution, stage.resolution)
        if draw.task in self.table.chats:
            return _Form(draw.sample, stage.side(chat=True), whole=False)
        if stage.min_crop == 1:
            return _Form(draw.sample, (height, width), whole=False)
        return _Form(draw.sample, math.ceil(max(width, height) / stage.min_crop), whole=True)

    def _candidates(self, plan: Plan, draw: Draw, chat: bool) -> Iterator[Draw]:
        """The draw, and its spares of the same kind: conversations or pictures."""
        yield draw
        for attempt in range(1, _SPARES):
            spare = plan.spare(draw, attempt)
            if (spare.task in self.table.chats) == chat:
                yield spare

    def _read(self, form: _Form, due: Due | None = None) -> Example:
        """A sample in this form; from memory if it is there."""
        with self._lock:
            if form in self._cache:
                self._cache.move_to_end(form)
                return self._cache[form]
            if form.sample in self.damaged:
                raise DamagedSample(self.damaged[form.sample].reason)
        ref = self.table[form.sample] if due is None else due.ref
        example = self._decode(ref, form, self._members(ref, due))
        with self._lock:
            if form not in self._cache and 0 < example.nbytes <= self._limit:  # texts alone are quickly read again
                self._cache[form] = example
                self._held += example.nbytes
            while self._held > self._limit:
                self._held -= self._cache.popitem(last=False)[1].nbytes
        return example

    def close(self) -> None:
        """Close the shards."""
        self.shards.close()

    def _record_damage(self, index: int, reason: str) -> None:
        with self._lock:
            if index in self.damaged:
                return
            ref = self.table[index]
            damage = self.damaged[index] = Damage(str(ref.corpus.path), ref.shard, ref.key, reason)
            told = len(self.damaged)
        level = logging.WARNING if told <= _TOLD else logging.INFO
        log.log(level, "damaged sample replaced by its spare: %s", " ".join(map(str, vars(damage).values())))
        if told == _TOLD:
            log.warning("of more damaged samples the ledger tells (column `replaced`), and trainer.json")

    def _decode(self, ref: SampleRef, form: _Form, members: dict[str, Data]) -> Example:
        record = self._record(members)
        try:
            names = [str(n).removeprefix(f"{ref.key}.") for n in record["input_images"]]
            if "output_image" not in record:
                shown = self._pictures([members[n] for n in names], form, whole=True)
                rejected, said = record.get("rejected_response"), turns.messages(record)
                turns.check_turns(said, len(shown), rejected)
                return Example(-1, ref.key, ref.task, "", shown, None, said, rejected, form.sample)
            names.append(str(record["output_image"]).removeprefix(f"{ref.key}."))
            made = self._pictures([members[n] for n in names], form, form.whole)
            text = str(record["instruction"])
            numbers_of(text, len(names) - 1)
            return Example(-1, ref.key, ref.task, text, made[:-1], made[-1], sample=form.sample)
        except X2IError as error:
            raise DamagedSample(str(error)) from None
        except KeyError as error:
            raise DamagedSample(f"{error} is missing from the sample") from None
        except UnidentifiedImageError:  # its message names an address in memory, which is another one each time
            raise DamagedSample("an image does not decode (it is none that Pillow knows)") from None
        # what Pillow raises for damaged files, depending on the format
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise DamagedSample(f"an image does not decode ({error})") from None

    def _pictures(self, files: list[Data], form: _Form, whole: bool) -> tuple[np.ndarray, ...]:
        height, width = (form.side, form.side) if isinstance(form.side, int) else form.side
        return tuple(pictures(files, height, width, whole, self._how))

    def _record(self, members: dict[str, Data]) -> dict[str, Any]:
        try:
            record = json.loads(bytes(members["json"]))
        except (KeyError, ValueError) as error:
            raise DamagedSample(f"its JSON cannot be read ({error})") from None
        if not isinstance(record, dict):
            raise DamagedSample("its JSON is no object")
        return record

    def _json(self, ref: SampleRef) -> dict[str, Data]:
        """The sample's JSON alone."""
        try:
            names = [member for member in ref.members if member[0] == "json"]
            return {name: self.shards.read(ref.corpus, ref.shard, offset, size) for name, offset, size in names}
        except OSError as error:
            raise DamagedSample(f"the shard cannot be read ({error})") from None

    def _members(self, ref: SampleRef, due: Due | None = None) -> dict[str, Data]:
        """The sample's members by suffix, checked against the manifest's hash."""
        try:
            if due is None:
                blob = self.shards.read(ref.corpus, ref.shard, ref.offset, ref.size)
            else:
                blob = due.block.read(self.shards, ref)
        except OSError as error:
            raise DamagedSample(f"the shard cannot be read ({error})") from None
        if len(blob) != ref.size:
            raise DamagedSample(f"the shard ends {ref.size - len(blob)} bytes too early")
        if self._verify and hashlib.sha256(blob).hexdigest() != ref.sha256:
            raise DamagedSample("its bytes do not have the manifest's SHA-256")
        view = memoryview(blob)
        return {s: view[o - ref.offset : o - ref.offset + n] for s, o, n in ref.members}


def no_preference(example: Example) -> str:
    """Why a sample teaches no preference; empty if it does."""
    if example.rejected is None:
        return "it has no rejected_response, which a stage with `preference` learns from"
    return "" if example.messages[-1].role == "assistant" else "its last message is not the assistant's"


def _cut(whole: Example, height: int, width: int, min_crop: float, key: tuple[int, str]) -> Example:
    """The crop of one draw: random where there are input images, all of them at the same place."""
    if whole.output is None:
        return whole
    share, x, y = 1.0, 0.5, 0.5
    if whole.inputs:
        share, x, y = generator("crop/1", *key, whole.draw, whole.key).uniform((min_crop, 0, 0), 1)
    inputs = tuple(crop(image, height, width, share, x, y) for image in whole.inputs)
    return replace(whole, inputs=inputs, output=crop(whole.output, height, width, share, x, y))
