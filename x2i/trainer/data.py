"""Samples by the plan: byte ranges out of the shards, checked, decoded and cropped in threads, ahead of time."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import logging
import math
import os
import posixpath
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from PIL import Image

from x2i.base.errors import X2IError
from x2i.base.seeds import generator
from x2i.corpus.corpus import Corpus
from x2i.model.base import Chat, Message
from x2i.model.pixels import centre_crop, crop, shrink
from x2i.model.placeholders import MARK, numbers_of
from x2i.trainer.config import Reading, Stage
from x2i.trainer.plan import BucketPlan, Draw, StagePlan
from x2i.trainer.table import SampleRef, SampleTable

log = logging.getLogger(__name__)

_ROLES = ("system", "user", "assistant")

#: Samples that are tried for one draw; and places of the stream that are searched for them, as a stratum may mix kinds.
_TRIES, _SPARES = 33, 4096


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


class DamagedSample(Exception):
    """One sample's bytes are not what the manifest says, do not decode, or contradict each other. Becomes a `Damage`."""


class SampleReader:
    """Reads and decodes single samples, by threads at will; keeps decoded crops up to a number of bytes."""

    def __init__(self, table: SampleTable, cache_bytes: int = 0) -> None:
        self.table = table
        self.damaged: dict[int, Damage] = {}
        self._cache: OrderedDict[tuple[int, int | tuple[int, int], bool], Example] = OrderedDict()
        self._limit, self._held = cache_bytes, 0
        self._lock = threading.Lock()
        self._files: dict[str, int] = {}

    def read(self, index: int, side: int | tuple[int, int]) -> Example:
        """One sample of the table, cut around the centre to a square of `side` pixels, or to a height and width.

        Conversations show their pictures whole, with `side` as the shorter one.

        Raises:
            DamagedSample: the sample cannot be used.
        """
        return self._read(index, side, whole=False)

    def _read(self, index: int, side: int | tuple[int, int], whole: bool) -> Example:
        """A sample cut to size, or `whole` with this shorter side; from memory if it is there."""
        name = (index, side, whole)
        with self._lock:
            if name in self._cache:
                self._cache.move_to_end(name)
                return self._cache[name]
            if index in self.damaged:
                raise DamagedSample(self.damaged[index].reason)
        example = replace(self._decode(self.table[index], side, whole), sample=index)
        with self._lock:
            if name not in self._cache and example.nbytes <= self._limit:
                self._cache[name] = example
                self._held += example.nbytes
            while self._held > self._limit:
                self._held -= self._cache.popitem(last=False)[1].nbytes
        return example

    def text(self, index: int) -> str:
        """One sample's instruction, or its conversation, without decoding its images. Raises DamagedSample."""
        record = self._record(self._blob(self.table[index]))
        return str(record.get("instruction") or "") or "\n".join(m.text for m in _messages(record))

    def planned(self, plan: StagePlan | BucketPlan, draw: Draw, stage: Stage) -> Example:
        """The sample of a draw, or of its next spare that is whole, cut as the stage says.

        A conversation gives way to a conversation, a picture to a picture: what a step is made of is known from the plan.
        In a stage that learns preferences, samples whose last answer was not preferred to another give way too.

        Raises:
            X2IError: so many in a row are damaged that the corpus must be.
        """
        reason, last, chat, min_crop = None, "", draw.task in self.table.chats, stage.min_crop
        for candidate in itertools.islice(self._candidates(plan, draw, chat), _TRIES):
            width, height = candidate.size or (stage.resolution, stage.resolution)
            try:
                if min_crop == 1 or chat:
                    found = self.read(candidate.sample, stage.side(chat) if chat else (height, width))
                    example = replace(found, draw=draw.index, replaced=reason)
                    last = _no_preference(example) if stage.preference is not None else ""
                    if not last:
                        return example
                else:
                    whole = self._read(candidate.sample, math.ceil(max(width, height) / min_crop), whole=True)
                    return _cut(replace(whole, draw=draw.index, replaced=reason), height, width, min_crop, plan.key)
            except DamagedSample as damage:
                last = str(damage)
                self._record_damage(candidate.sample, last)
            reason = reason or f"{self.table[draw.sample].key}: {last}"
        raise X2IError(
            f"{_TRIES} samples of {draw.stratum} in a row cannot be used, the last for this reason: {last}. "
            "`x2i verify CORPUS` says whether the corpus is damaged."
        )

    def _candidates(self, plan: StagePlan | BucketPlan, draw: Draw, chat: bool) -> Iterator[Draw]:
        """The draw, and its spares of the same kind: conversations or pictures."""
        yield draw
        for attempt in range(1, _SPARES):
            spare = plan.spare(draw, attempt)
            if (spare.task in self.table.chats) == chat:
                yield spare

    def close(self) -> None:
        """Close the shards."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _record_damage(self, index: int, reason: str) -> None:
        with self._lock:
            if index in self.damaged:
                return
            ref = self.table[index]
            damage = self.damaged[index] = Damage(str(ref.corpus.path), ref.shard, ref.key, reason)
        log.warning("damaged sample replaced by its spare: %s", " ".join(map(str, vars(damage).values())))

    def _decode(self, ref: SampleRef, side: int | tuple[int, int], whole: bool) -> Example:
        members = self._blob(ref)
        record = self._record(members)
        try:
            inputs = [str(n).removeprefix(f"{ref.key}.") for n in record["input_images"]]
            if "output_image" not in record:
                shown = tuple(_picture(members[name], side, whole=True) for name in inputs)
                rejected = record.get("rejected_response")
                messages = _messages(record)
                _check_turns(messages, len(shown), rejected)
                return Example(-1, ref.key, ref.task, "", shown, None, messages, rejected)
            names = [*inputs, str(record["output_image"]).removeprefix(f"{ref.key}.")]
            pictures = [_picture(members[name], side, whole) for name in names]
            numbers_of(str(record["instruction"]), len(inputs))
            return Example(-1, ref.key, ref.task, str(record["instruction"]), tuple(pictures[:-1]), pictures[-1])
        except X2IError as error:
            raise DamagedSample(str(error)) from None
        except KeyError as error:
            raise DamagedSample(f"{error} is missing from the sample") from None
        # what Pillow raises for damaged files, depending on the format
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise DamagedSample(f"an image does not decode ({error})") from None

    def _record(self, members: dict[str, bytes]) -> dict[str, Any]:
        try:
            record = json.loads(members["json"])
        except (KeyError, ValueError) as error:
            raise DamagedSample(f"its JSON cannot be read ({error})") from None
        if not isinstance(record, dict):
            raise DamagedSample("its JSON is no object")
        return record

    def _blob(self, ref: SampleRef) -> dict[str, bytes]:
        """The sample's members by suffix, checked against the manifest's hash."""
        try:
            blob = self._range(ref.corpus, ref.shard, ref.offset, ref.size)
        except OSError as error:
            raise DamagedSample(f"the shard cannot be read ({error})") from None
        if len(blob) != ref.size:
            raise DamagedSample(f"the shard ends {ref.size - len(blob)} bytes too early")
        if hashlib.sha256(blob).hexdigest() != ref.sha256:
            raise DamagedSample("its bytes do not have the manifest's SHA-256")
        return {s: blob[o - ref.offset : o - ref.offset + n] for s, o, n in ref.members}

    def _range(self, corpus: Corpus, shard: str, offset: int, size: int) -> bytes:
        if isinstance(corpus.path, Path):
            name = str(corpus.path / shard)
            with self._lock:
                if name not in self._files:
                    self._files[name] = os.open(name, os.O_RDONLY)
            return os.pread(self._files[name], size, offset)
        fs, root = fsspec.core.url_to_fs(corpus.path)
        data: bytes = fs.cat_file(posixpath.join(root, shard), offset, offset + size)
        return data


def _messages(record: dict[str, Any]) -> tuple[Message, ...]:
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
    except (KeyError, TypeError, ValueError, StopIteration, RuntimeError) as error:
        raise DamagedSample(f"its messages cannot be read ({type(error).__name__}: {error})") from None


def _check_turns(messages: Sequence[Message], images: int, rejected: Any) -> None:
    """Raise DamagedSample if nothing could be learned from a conversation, or not as it is written."""
    marks = sum(m.text.count(MARK) for m in messages)
    if marks != images:
        raise DamagedSample(f"its messages have {marks} marks {MARK}, and it has {images} images")
    if strange := sorted({m.role for m in messages} - set(_ROLES)):
        raise DamagedSample(f"its messages have the role {strange[0]!r}; known: {', '.join(_ROLES)}")
    if all(m.role != "assistant" for m in messages):
        raise DamagedSample("no message of it is the assistant's: there is nothing to be learned")
    if rejected is not None and (not isinstance(rejected, str) or MARK in rejected):
        raise DamagedSample("its rejected_response is not a text")


def _no_preference(example: Example) -> str:
    """Why a sample teaches no preference; empty if it does."""
    if example.rejected is None:
        return "it has no rejected_response, which a stage with `preference` learns from"
    return "" if example.messages[-1].role == "assistant" else "its last message is not the assistant's"


def _box(sides: Sequence[float]) -> str:
    return "[" + ", ".join(str(round(1000 * float(v))) for v in sides) + "]"


def _picture(data: bytes, side: int | tuple[int, int], whole: bool) -> np.ndarray:
    height, width = (side, side) if isinstance(side, int) else side
    with Image.open(io.BytesIO(data)) as image:
        return shrink(image, min(height, width)) if whole else centre_crop(image, height, width)


def _cut(whole: Example, height: int, width: int, min_crop: float, key: tuple[int, str]) -> Example:
    """The crop of one draw: random where there are input images, all of them at the same place."""
    if whole.output is None:
        return whole
    share, x, y = 1.0, 0.5, 0.5
    if whole.inputs:
        share, x, y = generator("crop/1", *key, whole.draw, whole.key).uniform((min_crop, 0, 0), 1)
    inputs = tuple(crop(image, height, width, share, x, y) for image in whole.inputs)
    return replace(whole, inputs=inputs, output=crop(whole.output, height, width, share, x, y))


class Loader:
    """The batches of a stage from step `start` to its end, read ahead in threads. Iterate it once.

    Args:
        share: which of a step's draws are read here, as a rank takes its part of the batch; default: all.
    """

    def __init__(
        self,
        reader: SampleReader,
        plan: StagePlan | BucketPlan,
        stage: Stage,
        start: int,
        reading: Reading,
        share: Callable[[list[Draw]], list[Draw]] | None = None,
    ) -> None:
        self._reader = reader
        self._plan = plan
        self._stage = stage
        self._steps = range(start, stage.steps)
        self._reading = reading
        self._share = share
        self._waited = 0.0

    def waited(self) -> float:
        """Seconds that the iteration waited for samples since this was asked last."""
        seconds, self._waited = self._waited, 0.0
        return seconds

    def __iter__(self) -> Iterator[list[Example]]:
        with ThreadPoolExecutor(self._reading.threads, thread_name_prefix="x2i-read") as pool:
            ahead: deque[list[Future[Example]]] = deque()
            with contextlib.ExitStack() as stack:
                stack.callback(lambda: [f.cancel() for futures in ahead for f in futures])
                for step in self._steps:
                    ahead.append([pool.submit(self._example, draw) for draw in self._draws(step)])
                    if len(ahead) > self._reading.prefetch:
                        yield self._wait(ahead.popleft())
                while ahead:
                    yield self._wait(ahead.popleft())

    def _draws(self, step: int) -> list[Draw]:
        draws = self._plan.step(step)
        return draws if self._share is None else self._share(draws)

    def _wait(self, futures: list[Future[Example]]) -> list[Example]:
        began = time.monotonic()
        try:
            return [f.result() for f in futures]
        finally:
            self._waited += time.monotonic() - began

    def _example(self, draw: Draw) -> Example:
        return self._reader.planned(self._plan, draw, self._stage)
