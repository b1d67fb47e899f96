"""What was made and may be wanted again, up to a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


_T = TypeVar("_T", bound=_Sized)


class Kept(Generic[_T]):
    """What was made, by name, up to a number of bytes: the least recently used goes first. Each is made by one thread."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._items: OrderedDict[Hashable, _T] = OrderedDict()
        self._lock = threading.Lock()
        self._making: dict[Hashable, threading.Lock] = {}

    def get(self, name: Hashable, make: Callable[[], _T]) -> _T:
        """What has this name; made now if it is not there."""
        with self._lock:
            if name in self._items:
                self._items.move_to_end(name)
                return self._items[name]
            gate = self._making.setdefault(name, threading.Lock())
        with gate:
            with self._lock:
                if name in self._items:
                    return self._items[name]
            made = make()
            with self._lock:
                self._making.pop(name, None)
                self._items[name] = made
                self._held += made.nbytes
                while self._held > self._limit and len(self._items) > 1:
                    self._held -= self._items.popitem(last=False)[1].nbytes
        return made
