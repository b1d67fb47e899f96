"""Signals by which a run is asked to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from x2i.trainer.progress import Progress


class Signals:
    """What this process was asked."""

    def __init__(self, progress: Progress, ask: Callable[[], int]) -> None:
        """`ask` is asked, too: for the signal by which the run is to stop where none comes, or 0."""
        self._signalled = 0
        self._progress = progress
        self._ask = ask

    def asked(self) -> int:
        """The signal by which the run is to stop, or 0."""
        return self._signalled or self._ask()

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Within the block the first SIGINT or SIGTERM asks for a checkpoint; the second one ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, frame: FrameType | None) -> None:
            self._signalled = number
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._progress.note("stopping after this step; once more to stop at once")

        for each in before:
            signal.signal(each, ask)
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
