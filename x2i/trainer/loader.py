"""The batches of a stage, read ahead: which samples are due, their bytes in few reads, decoded in threads.

One thread follows the plan. It looks `join_samples` samples ahead for those that lie beside one another in a shard, and
lets a step in when its turn comes within `prefetch` steps and there is room for it; then its ranges are read (behind a URL
many at a time, local ones when they are wanted) and its samples decoded by the other threads. What is read ahead is
bounded in bytes: those of the blocks that are not used up, and those of the pictures that are decoded or will be.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from x2i.trainer.config import Reading
from x2i.trainer.data import Due, Example, SampleReader
from x2i.trainer.plan import Draw, Plan
from x2i.trainer.ranges import Block, Window, fetch, local
from x2i.trainer.stage import Stage
from x2i.trainer.table import SampleRef

#: Steps more to look ahead, at each step.
_WIDER = 0.25


class Loader:
    """The batches of a stage from step `start` to its end. Iterate it once.

    Args:
        share: which of a step's draws are read here, as a rank takes its part of the batch; default: all.
    """

    def __init__(
        self,
        reader: SampleReader,
        plan: Plan,
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
        self._budget = _Budget(reading.prefetch_mib << 20, reading.prefetch + 1)

    def waited(self) -> float:
        """Seconds that the iteration waited for samples since this was asked last."""
        seconds, self._waited = self._waited, 0.0
        return seconds

    @property
    def most_held(self) -> int:
        """The most bytes that were read ahead, stored and decoded, so far."""
        return self._budget.most

    def __iter__(self) -> Iterator[list[Example]]:
        steps: queue.SimpleQueue[list[_Due] | BaseException] = queue.SimpleQueue()
        threads, in_flight = self._reading.threads, self._reading.in_flight
        with (
            ThreadPoolExecutor(in_flight, thread_name_prefix="x2i-fetch") as fetching,
            ThreadPoolExecutor(threads, thread_name_prefix="x2i-read") as decoding,
        ):
            feeder = threading.Thread(target=self._feed, args=(steps, fetching, decoding), name="x2i-plan", daemon=True)
            feeder.start()
            try:
                for _ in self._steps:
                    yield self._wait(steps)
            finally:
                self._budget.close()
                feeder.join()
                for pool in (fetching, decoding):
                    pool.shutdown(wait=False, cancel_futures=True)

    def _wait(self, steps: queue.SimpleQueue[list[_Due] | BaseException]) -> list[Example]:
        began = time.monotonic()
        try:
            due = steps.get()
            if isinstance(due, BaseException):
                raise due
            examples = [d.example.result() for d in due]
            self._budget.step_done(sum(d.size for d in due))
            return examples
        finally:
            self._waited += time.monotonic() - began

    def _feed(
        self,
        steps: queue.SimpleQueue[list[_Due] | BaseException],
        fetching: ThreadPoolExecutor,
        decoding: ThreadPoolExecutor,
    ) -> None:
        """Put the steps into the queue as there is room for them; or what went wrong."""
        most = self._reading.join_mib << 20
        window = Window(self._reading.join_gap_kib << 10, most)
        blocks: dict[int, Block] = {}  # of samples that are due, by number
        ahead: deque[list[_Due]] = deque()
        number, look, seen = 0, 1.0, 0
        try:
            left = iter(self._steps)
            while True:
                # a step more than before only now and then: the first is not to wait until many are looked up
                look += _WIDER
                while (not ahead or (len(ahead) < look and seen < self._reading.join_samples)) and (
                    step := next(left, None)
                ) is not None:
                    draws = self._plan.step(step)
                    ahead.append([])
                    for draw in draws if self._share is None else self._share(draws):
                        due = _Due(number, draw, self._reader.table[draw.sample])
                        ahead[-1].append(due)
                        window.add(number, due.ref)
                        number += 1
                    seen += len(ahead[-1])
                if not ahead:
                    return
                dues = ahead.popleft()
                seen -= len(dues)
                fresh, held = {}, {}  # blocks that begin with this step, and those that are in memory from now on
                free = self._budget.room // 2  # for all that this step reads for later ones
                for due in dues:
                    room = most if (near := local(due.ref.corpus)) else min(max(free, 0), most)
                    if due.number not in blocks:
                        block, numbers = window.take(due.number, due.ref, room)
                        blocks.update(dict.fromkeys(numbers, block))
                        fresh[due.number] = block
                        free -= 0 if near else block.size
                    due.block = blocks.pop(due.number)
                    if near:
                        due.block = due.block.alone(due.ref)
                    if near or due.number in fresh:
                        held[due.number] = due.block
                    due.size = self._guess(due)
                if not self._budget.step_begins(sum(b.size for b in held.values()) + sum(d.size for d in dues)):
                    return
                unread = {d.number for d in dues if not self._reader.holds(d.draw, self._stage)}
                begun = [block for number, block in fresh.items() if number in unread]
                fetch(fetching, self._reader.shards, begun, self._reading.in_flight)
                for due in dues:
                    due.example = decoding.submit(self._example, due)
                steps.put(dues)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the one who iterates is told
            steps.put(error)

    def _guess(self, due: _Due) -> int:
        """Bytes of a sample's pictures before they are decoded."""
        files = max(len(due.ref.members) - 1, 0)
        if due.draw.task in self._reader.table.chats:
            return files * 4 * self._stage.side(chat=True) ** 2  # of pictures in 4:3, three bytes a pixel
        width, height = due.draw.size or (self._stage.resolution, self._stage.resolution)
        return files * 3 * width * height

    def _example(self, due: _Due) -> Example:
        try:
            example = self._reader.planned(self._plan, due.draw, self._stage, Due(due.ref, due.block))
            self._budget.change(example.nbytes - due.size)
            due.size = example.nbytes
            return example
        finally:
            if due.block.done():
                self._budget.change(-due.block.size)


@dataclass
class _Due:
    """A sample on its way: `size` is that of its pictures in bytes, guessed until they are decoded."""

    number: int
    draw: Draw
    ref: SampleRef
    block: Block = None  # type: ignore[assignment]
    size: int = 0
    example: Future[Example] = None  # type: ignore[assignment]


class _Budget:
    """Bytes and steps that are read ahead, and their bounds. One step is let in in any case."""

    def __init__(self, limit: int, steps: int) -> None:
        self.most = 0
        self._limit, self._free = limit, steps
        self._steps = steps
        self._held = 0
        self._open = True
        self._changed = threading.Condition()

    @property
    def room(self) -> int:
        """Bytes that are free."""
        return max(self._limit - self._held, 0)

    def step_begins(self, size: int) -> bool:
        """Wait until there is room for a step; False if no more are wanted."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open or self._fits(size))
            self._free -= 1
            self._held += size
            self.most = max(self.most, self._held)
            return self._open

    def _fits(self, size: int) -> bool:
        return self._free == self._steps or (self._free > 0 and self._held + size <= self._limit)

    def step_done(self, size: int) -> None:
        """A step is handed over, and its pictures are no longer ours."""
        with self._changed:
            self._free += 1
            self._held -= size
            self._changed.notify()

    def change(self, size: int) -> None:
        """So many bytes more, or less."""
        with self._changed:
            self._held += size
            self.most = max(self.most, self._held)
            self._changed.notify()

    def close(self) -> None:
        """Let nothing more in."""
        with self._changed:
            self._open = False
            self._changed.notify()
