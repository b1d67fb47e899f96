"""Byte ranges of shards, local or by fsspec: few files open, neighbours read at once, and what was read counted.

Behind a URL neighbours are read into memory, and held until they are wanted. Of local shards the system is told to read
them into its own cache (posix_fadvise), where they cost this process nothing.

What a sample's bytes are does not hang on how they were read: where a joined read fails, each of its samples is read by
itself, and it is that one which succeeds or fails.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import threading
import time
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from x2i.base.errors import X2IError
from x2i.corpus.corpus import Corpus
from x2i.trainer.table import SampleRef

#: Calls for many ranges at a time: while the last reads of one are under way, the other has begun.
_CALLS = 2

#: Bytes that the system is told of at a time: of more it may read the beginning alone.
_ADVICE = 256 << 10

#: How often a URL is asked, and seconds before the second time; they double.
_TRIES, _PAUSE = 3, 0.5


class Shards:
    """Reads ranges of the shards of corpora, from any thread.

    Attributes:
        reads, bytes_read: how often something was read, and how much.

    Args:
        open_files: local shards that are kept open; the least recently used is closed first.
    """

    def __init__(self, open_files: int = 128) -> None:
        self.reads, self.bytes_read = 0, 0
        self._most = open_files
        self._files: OrderedDict[str, list[int]] = OrderedDict()  # descriptor, and how many read from it now
        self._calls = threading.Semaphore(_CALLS)
        self._remote: dict[str, tuple[Any, str]] = {}
        self._lock = threading.RLock()

    def read(self, corpus: Corpus, shard: str, offset: int, size: int, advised: bool = False) -> bytes:
        """A range of a shard; less of it where the shard ends. `advised`: it is counted already. Raises OSError."""
        if isinstance(corpus.path, Path):
            with self._file(str(corpus.path / shard)) as descriptor:
                data = os.pread(descriptor, size, offset)
        else:
            fs, root = self._filesystem(corpus)
            data = _patiently(lambda: fs.cat_file(posixpath.join(root, shard), offset, offset + size), size)
        if not advised:
            self._count(1, len(data))
        return data

    def advise(self, block: Block) -> None:
        """Let the system read a block of a local shard into its cache: in large pieces, and while others are decoded."""
        with contextlib.suppress(OSError), self._file(f"{block.corpus.path}/{block.shard}") as descriptor:
            for begin in range(0, block.size, _ADVICE):
                size = min(_ADVICE, block.size - begin)
                os.posix_fadvise(descriptor, block.offset + begin, size, os.POSIX_FADV_WILLNEED)
        self._count(1, block.size)

    def fill(self, corpus: Corpus, blocks: Sequence[Block], in_flight: int) -> None:
        """Read blocks of a corpus that lies behind a URL, at most so many at a time. Those that fail stay empty."""
        fs, root = self._filesystem(corpus)
        paths = [posixpath.join(root, block.shard) for block in blocks]
        ends = [block.offset + block.size for block in blocks]
        starts, most = [block.offset for block in blocks], -(-in_flight // _CALLS)
        with self._calls:
            found = fs.cat_ranges(paths, starts, ends, on_error="return", batch_size=most)
        for block, data in zip(blocks, found, strict=True):
            block.data = data if isinstance(data, bytes) and len(data) <= block.size else b""
            self._count(1, len(block.data))

    def at_once(self, corpus: Corpus) -> bool:
        """Whether a corpus's filesystem reads many ranges at a time by itself."""
        return bool(getattr(self._filesystem(corpus)[0], "async_impl", False))

    @property
    def open(self) -> int:
        """Local shards that are open."""
        return len(self._files)

    def close(self) -> None:
        """Close the shards. What is read later opens them again."""
        with self._lock:
            for name in [n for n, (_, users) in self._files.items() if not users]:
                os.close(self._files.pop(name)[0])

    def _count(self, reads: int, size: int) -> None:
        with self._lock:
            self.reads += reads
            self.bytes_read += size

    def _filesystem(self, corpus: Corpus) -> tuple[Any, str]:
        path = str(corpus.path)
        if path not in self._remote:
            self._remote[path] = fsspec.core.url_to_fs(path)
        return self._remote[path]

    @contextmanager
    def _file(self, name: str) -> Iterator[int]:
        """A descriptor that stays open within the block."""
        with self._lock:
            there = self._files.get(name)
        opened = self._opened(name) if there is None else -1  # outside the lock: it may take long
        with self._lock:
            there = self._files.get(name)
            if there is None:
                if opened < 0:  # closed in between
                    opened = self._opened(name)
                there, opened = [opened, 0], -1
                self._files[name] = there
            there[1] += 1
            self._files.move_to_end(name)
            closing = [opened] if opened >= 0 else []
            if (over := len(self._files) - self._most) > 0:
                idle = [n for n, (_, users) in self._files.items() if not users]
                closing += [self._files.pop(n)[0] for n in idle[:over]]
        try:
            for descriptor in closing:
                os.close(descriptor)
            yield there[0]
        finally:
            with self._lock:
                there[1] -= 1

    def _opened(self, name: str) -> int:
        """A new descriptor; shards that nobody reads from are closed where the system allows no more."""
        while True:
            try:
                return os.open(name, os.O_RDONLY)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
            with self._lock:
                idle = [n for n, (_, users) in self._files.items() if not users]
                if not idle:  # not the shard's fault: no sample is to give way for it
                    raise X2IError(
                        f"{name}: the system allows no more open files: allow more (ulimit -n), or let fewer threads read "
                        "(reading.threads, reading.in_flight)"
                    )
                os.close(self._files.pop(idle[0])[0])


def _patiently(read: Callable[[], bytes], size: int) -> bytes:
    """So many bytes from a URL, which may fail or send fewer now and not a moment later. Raises OSError."""
    data, failed = None, None
    for attempt in range(_TRIES):
        try:
            data = read()
        except FileNotFoundError:
            raise
        except Exception as error:  # noqa: BLE001 - each filesystem raises what its library does, as aiohttp's errors
            failed = error
        if data is not None and len(data) > size:
            raise OSError(
                f"of {size} bytes asked for {len(data)} came: the server must be one that serves ranges of files"
            )
        if data is not None and len(data) == size:
            return data
        if attempt + 1 < _TRIES:
            time.sleep(_PAUSE * 2**attempt)
    if data is not None:
        return data
    raise OSError(f"{type(failed).__name__}: {failed}") from failed


class Block:
    """One range of a shard for one sample or several neighbours, read when the first of them is wanted, or before.

    Attributes:
        size: bytes; `data`: they, once they are read; fewer if that failed.
        users: samples that have not been read out of it; with the last, the data goes.
        advised: whether it is a part of one that the system has been told to read.
    """

    def __init__(
        self, corpus: Corpus, shard: str, offset: int, size: int, users: int = 1, advised: bool = False
    ) -> None:
        self.corpus, self.shard, self.offset, self.size, self.users = corpus, shard, offset, size, users
        self.advised = advised
        self.data: bytes | None = None
        self.fetched: Future[None] | None = None
        self._lock = threading.Lock()

    def read(self, shards: Shards, ref: SampleRef) -> bytes:
        """The bytes of a sample. Raises OSError."""
        if self.fetched is not None:
            self.fetched.exception()  # wait for it; if it failed, `data` is not there
        with self._lock:
            if self.data is None and self.fetched is None and self.users > 1:
                try:
                    self.data = shards.read(self.corpus, self.shard, self.offset, self.size)
                except OSError:
                    self.data = b""
            data = self.data or b""
        start = ref.offset - self.offset
        if len(data) < start + ref.size:  # the only sample, or the joined read failed
            return shards.read(ref.corpus, ref.shard, ref.offset, ref.size, self.advised)
        return data if ref.size == len(data) else data[start : start + ref.size]

    def alone(self, ref: SampleRef) -> Block:
        """One sample of it, to be read by itself."""
        return Block(ref.corpus, ref.shard, ref.offset, ref.size, advised=self.users > 1)

    def done(self) -> bool:
        """One of the samples needs it no longer. Returns whether it was the last."""
        with self._lock:
            self.users -= 1
            if not self.users:
                self.data = None
            return not self.users


class Window:
    """Samples that are due soon, by where they lie, so that neighbours are read at once.

    Args:
        gap: bytes between two samples that may be read and thrown away.
        most: bytes of a joined read; 0: samples are not joined.
    """

    def __init__(self, gap: int, most: int) -> None:
        self._gap, self._most = gap, most
        self._waiting: dict[tuple[int, str], list[tuple[int, int, int]]] = {}  # offset, size, number
        self._of: dict[int, SampleRef] = {}

    def add(self, number: int, ref: SampleRef) -> None:
        """A sample will be due; `number` is one that no other has."""
        if self._most:
            self._of[number] = ref
            insort(self._waiting.setdefault((ref.place, ref.shard), []), (ref.offset, ref.size, number))

    def take(self, number: int, ref: SampleRef, room: int) -> tuple[Block, list[int]]:
        """The block for a sample that is due now, and the numbers of those for which it serves: at most `room` bytes.

        (The sample itself is served in any case.)
        """
        if number not in self._of:
            return Block(ref.corpus, ref.shard, ref.offset, ref.size), [number]
        waiting, most = self._waiting[ref.place, ref.shard], min(self._most, room)
        first = last = bisect_left(waiting, (ref.offset, ref.size, number))
        start, end = ref.offset, ref.offset + ref.size
        while last + 1 < len(waiting):
            offset, size, _ = waiting[last + 1]
            if offset - end > self._gap or max(end, offset + size) - start > most:
                break
            last, end = last + 1, max(end, offset + size)
        while first > 0:
            offset, size, _ = waiting[first - 1]
            if start - (offset + size) > self._gap or end - offset > most:
                break
            first, start = first - 1, offset
        numbers = [n for _, _, n in waiting[first : last + 1]]
        del waiting[first : last + 1]
        if not waiting:
            del self._waiting[ref.place, ref.shard]
        for n in numbers:
            del self._of[n]
        return Block(ref.corpus, ref.shard, start, end - start, len(numbers)), numbers


def local(corpus: Corpus) -> bool:
    """Whether the neighbours of a corpus's samples are read into the system's cache, not into memory of our own."""
    return isinstance(corpus.path, Path) and hasattr(os, "posix_fadvise")


def fetch(pool: Executor, shards: Shards, blocks: Iterable[Block], in_flight: int) -> None:
    """Begin to read the blocks that lie behind URLs, and those of several local samples; others are read when wanted."""
    by_corpus: dict[str, list[Block]] = {}
    for block in blocks:
        if not isinstance(block.corpus.path, Path):
            by_corpus.setdefault(str(block.corpus.path), []).append(block)
        elif block.users > 1 and local(block.corpus):
            pool.submit(shards.advise, block)
    for together in by_corpus.values():
        corpus = together[0].corpus
        for part in [together] if shards.at_once(corpus) else [[block] for block in together]:
            future = pool.submit(_filled, shards, corpus, part, in_flight)
            for block in part:
                block.fetched = future


def _filled(shards: Shards, corpus: Corpus, blocks: Sequence[Block], in_flight: int) -> None:
    if len(blocks) == 1:
        block = blocks[0]
        block.data = shards.read(corpus, block.shard, block.offset, block.size)
    else:
        shards.fill(corpus, blocks, in_flight)
