"""SHA-256 of files and folders; those of weights are remembered, because gigabytes take long to hash."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from x2i.base.files import write_text

log = logging.getLogger(__name__)

#: A file changed this lately (ns) may change again within one tick of the file system's clock: not remembered.
SETTLED = 2 * 10**9


def sha256_of(path: Path) -> str:
    """SHA-256 of one file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(path: Path, names: Iterable[str] | None = None, sha256: Callable[[Path], str] = sha256_of) -> str:
    """SHA-256 of a file; of a folder: over the names and SHA-256 of all files in it, sorted.

    Args:
        path: the file or folder.
        names: of a folder, the files that count, relative to it with `/`; default: all.
        sha256: gives one file's SHA-256.
    """
    if path.is_file():
        return sha256(path)
    whole = hashlib.sha256()
    files = files_in(path) if names is None else [path / name for name in names]
    for file_path in sorted(files):
        whole.update(f"{file_path.relative_to(path).as_posix()}\0{sha256(file_path)}\n".encode())
    return whole.hexdigest()


def files_in(folder: Path) -> list[Path]:
    """All files below a folder, sorted; links to files count, dangling ones do not."""
    return sorted(p for p in folder.rglob("*") if p.is_file())


def remembered(path: Path, folder: Path, names: Iterable[str] | None = None) -> str:
    """`digest_of`, hashing only those files whose size or time has changed since it was last asked.

    What is known lies in `folder`, one JSON file per `path` (absolute, links resolved), replaced
    atomically: processes that ask at once may hash twice, and never read half a file.
    """
    real = path.resolve()
    store = folder / f"{hashlib.sha256(str(real).encode()).hexdigest()[:32]}.json"
    known = _read(store)
    kept: dict[str, list[int | str]] = {}
    now = time.time_ns()

    def sha256(file: Path) -> str:
        name = file.relative_to(path).as_posix()
        size, mtime = _stamp(file)
        entry = known.get(name, [])
        digest = str(entry[2]) if entry[:2] == [size, mtime] and len(entry) == 3 else sha256_of(file)
        if abs(now - mtime) > SETTLED and _stamp(file) == (size, mtime):
            kept[name] = [size, mtime, digest]
        return digest

    digest = digest_of(path, names, sha256)
    if kept != known:
        try:
            write_text(store, json.dumps({"path": str(real), "files": kept}, indent=1))
        except OSError as error:  # a cache that cannot be written costs time, nothing else
            log.info("digests are not remembered: %s", error)
    return digest


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _read(store: Path) -> dict[str, list[int | str]]:
    try:
        files = json.loads(store.read_text(encoding="utf-8"))["files"]
        return {name: list(entry) for name, entry in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
