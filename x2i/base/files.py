"""Atomic files: written aside, flushed to disk, then renamed. A killed writer leaves no half file."""

import contextlib
import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from x2i.base.errors import X2IError


def aside(path: Path) -> Path:
    """A fresh name beside `path`, hidden, on the same file system, so that a rename is atomic."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to; it becomes `path` if the block ends well, and vanishes if not.

    Works for a file and for a folder (made by the block). An existing *file* is replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = aside(path)
    try:
        yield temporary
        if temporary.is_file():
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        remove(temporary)
        _name(error, path)
        raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Where `path` is written bit by bit: errors of the disk name it."""
    try:
        yield
    except OSError as error:
        _name(error, path)
        raise


def _name(error: BaseException, path: Path) -> None:
    if isinstance(error, OSError) and error.filename is None:  # a full disk does not say where it was met
        if error.errno is None:  # numpy counts bytes only
            error.errno, error.strerror = errno.EIO, str(error)
        error.filename = str(path)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path, older: float = 0.0) -> None:
    """Remove what killed writers left below `folder`: call it only under its lock, or for files `older` than a write takes.

    Args:
        older: seconds since a file was last written to.
    """
    for path in folder.rglob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # it became what it was to be
            if time.time() - path.stat().st_mtime >= older:
                remove(path)


@contextlib.contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Wait for the lock of `folder` (a file in it) and hold it for the length of the block, to read, change and write."""
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock", poll_interval=0.01):
        yield


@contextlib.contextmanager
def exclusive(target: str | Path, what: str) -> Iterator[None]:
    """Hold the lock of `target` (a file beside it) for the length of the block.

    Raises:
        X2IError: another process holds it; `what` says in the message what that one is doing.
        OSError: no file can be made beside it.
    """
    from filelock import FileLock, Timeout

    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        Path(lock.lock_file).touch()  # FileLock waits as well where no file can be made
        raise X2IError(f"{target}: another process is {what} here. Wait for it, or stop it first.") from None
    try:
        yield
    finally:
        lock.release()
