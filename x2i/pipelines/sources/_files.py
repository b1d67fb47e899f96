"""Files below a root, local or behind any fsspec URL: list, look at, read. Local ones without detours.

A listed file has a `version`: what changes when its content does. That is the modification time in
nanoseconds for a local file, and elsewhere an ETag, a checksum or a date, whichever the store tells.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, NamedTuple
from urllib.parse import quote, unquote

import fsspec
from fsspec.implementations.local import LocalFileSystem

from x2i.base.errors import RecipeError

log = logging.getLogger(__name__)

#: Requests in flight, and attempts for each, where files come over a network.
PARALLEL, ATTEMPTS = 16, 3

#: What a listing may call the thing that changes with the content, the most telling first.
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "Content-MD5", "CRC", "mtime", "LastModified", "Last-Modified", "created")


class File(NamedTuple):
    """A file below a root: its relative path (with `/`), bytes, version. Unknown is None."""

    path: str
    size: int | None
    version: int | str | None


class Root:
    """A folder, or a single place that relative paths start from. `url` may be `~/x`, `s3://…`, `zip://::x.zip`.

    Every method that reads raises OSError, whatever the store itself raises.
    """

    def __init__(self, url: str) -> None:
        self.url = os.path.expanduser(url) if "://" not in url else url
        try:
            # A cached instance would keep the directory of an archive that has changed since.
            options: dict[str, Any] = {"skip_instance_cache": True} if "::" in self.url else {}
            if self.url.startswith(("http://", "https://")):
                options["client_kwargs"] = {"timeout": _timeout()}
            self.fs, path = fsspec.core.url_to_fs(self.url, **options)
        except (ValueError, ImportError) as error:  # an unknown protocol, or its package is missing
            raise RecipeError(f"{url}: fsspec cannot open this: {error}") from None
        except OSError as error:  # the archive of a chained URL
            raise RecipeError(f"{url}: cannot be opened: {error}") from None
        self.local = isinstance(self.fs, LocalFileSystem)
        self._http = "http" in self._protocols
        self.path = path.rstrip("/") or ("/" if self.local else "")

    @property
    def _protocols(self) -> tuple[str, ...]:
        return (self.fs.protocol,) if isinstance(self.fs.protocol, str) else tuple(self.fs.protocol)

    def below(self, folder: str) -> Root:
        """The root that a folder below this one is."""
        inside = copy.copy(self)
        inside.path = self.at(folder)
        return inside

    def at(self, path: str) -> str:
        """The file system's own name of a relative path; of the root itself if it is empty."""
        if not path:
            return self.path
        if self.local:
            return os.path.join(self.path, path)
        if self._http and "?" not in path and "%3F" not in path:
            path = quote(path)
        return f"{self.path}/{path}" if self.path else path

    def relative(self, name: str) -> str:
        """The inverse of `at`."""
        rest = name.removeprefix(self.path).lstrip("/")
        return unquote(rest) if self._http and "?" not in unquote(rest) else rest

    def walk(self) -> tuple[list[File], dict[str, str]]:
        """All files below, hidden ones left out, sorted by path; and what could not be listed, with why.

        Links are followed; a folder that can be reached in several ways is listed once, so that
        links in a circle end.

        Raises:
            OSError: the root itself cannot be listed.
        """
        files, faults = self._walk_local() if self.local else (self._walk_remote(), {})
        return sorted(files), faults

    def glob(self, pattern: str) -> list[File]:
        """The files that a pattern (relative, with `*`, `?`, `[…]`, `**`) matches, sorted. Raises OSError."""
        self.fs.invalidate_cache()
        found = _patiently(self.fs.glob, f"{self.path}/{pattern}".lstrip("" if self.path else "/"), detail=True)
        files = [(self.relative(n), i) for n, i in found.items() if i.get("type") != "directory"]
        return sorted(self.stat(p) if self.local else self._complete(p, i) for p, i in files)

    def is_folder(self, path: str) -> bool:
        """Whether there is a folder of this name."""
        if self.local:
            return os.path.isdir(self.at(path))
        return bool(_patiently(self.fs.isdir, self.at(path)))

    def stat(self, path: str) -> File:
        """Size and version of one file. Raises OSError."""
        if self.local:
            status = os.stat(self.at(path))
            return File(path, status.st_size, status.st_mtime_ns)
        return self._file(path, _patiently(self.fs.info, self.at(path)))

    def stat_many(self, paths: list[str]) -> list[File | None]:
        """`stat` of each path, None for one that is not there; over a network, several at a time."""

        def attempt(path: str) -> File | None:
            try:
                return self.stat(path)
            except OSError:
                return None

        if self.local:
            return [attempt(p) for p in paths]
        with ThreadPoolExecutor(PARALLEL) as pool:
            return list(pool.map(attempt, paths))

    def read(self, path: str) -> bytes:
        """A whole file. Raises OSError."""
        if self.local:
            with open(self.at(path), "rb", buffering=0) as file:
                return file.readall()
        return bytes(_patiently(self.fs.cat_file, self.at(path)))

    def read_many(self, paths: Iterable[str]) -> Iterator[bytes | OSError]:
        """Whole files in order, or the error of each that cannot be had; over a network, several at a time.

        Absolute paths and URLs are taken as they are, wherever they lead.
        """
        if self.local:
            yield from map(self._attempt, paths)
            return
        with ThreadPoolExecutor(PARALLEL) as pool:
            waiting: deque[Any] = deque()
            for path in paths:
                waiting.append(pool.submit(self._attempt, path))
                if len(waiting) >= PARALLEL:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file. Raises OSError."""
        with self.open_parts(path) as file:
            file.seek(start)
            return file.read(end - start)

    def open(self, path: str) -> IO[bytes]:
        """A seekable file, to be read from beginning to end: a remote one is copied to a temporary file. Raises OSError."""
        if self.local:
            return open(self.at(path), "rb")
        copied = tempfile.NamedTemporaryFile(prefix="x2i-")  # noqa: SIM115 - the caller closes it, and so removes it
        try:
            _patiently(self.fs.get_file, self.at(path), copied.name)
        except OSError:
            copied.close()
            raise
        return copied

    def open_parts(self, path: str) -> IO[bytes]:
        """A seekable file of which parts will be read; a remote one is asked for these ranges. Raises OSError."""
        if self.local:
            return open(self.at(path), "rb")
        if self._http and not _patiently(self.fs.info, self.at(path)).get("partial"):
            return self.open(path)  # a web server that does not give ranges
        return _patiently(self.fs.open, self.at(path), "rb")

    def _attempt(self, path: str) -> bytes | OSError:
        try:
            if "://" not in path and not path.startswith("/"):
                return self.read(path)
            return Root(path).read("")
        except RecipeError as error:
            return OSError(str(error))
        except OSError as error:
            return error

    def _walk_local(self) -> tuple[list[File], dict[str, str]]:
        files: list[File] = []
        faults: dict[str, str] = {}
        seen: set[tuple[int, int]] = set()
        links: list[str] = []  # to folders: visited last, so that a folder's own path wins over a link to it

        def visit(folder: str) -> None:
            for entry in os.scandir(self.at(folder)):
                if entry.name.startswith("."):
                    continue
                path = f"{folder}/{entry.name}" if folder else entry.name
                try:
                    if entry.is_dir():
                        (links if entry.is_symlink() else folders).append(path)
                    elif entry.is_file() or entry.is_symlink():
                        status = entry.stat()
                        files.append(File(path, status.st_size, status.st_mtime_ns))
                except OSError as error:  # a link to nowhere, or one that closes a circle of links
                    files.append(File(path, None, None))
                    log.debug("%s: %s", path, error)

        folders = [""]
        while folders or links:
            if not folders:
                links.sort(reverse=True)
            path = folders.pop() if folders else links.pop()
            try:
                status = os.stat(self.at(path))
                if (status.st_dev, status.st_ino) not in seen:
                    seen.add((status.st_dev, status.st_ino))
                    visit(path)
            except OSError as error:
                if not path:
                    raise
                faults[path] = why(error)
        return files, faults

    def _walk_remote(self) -> list[File]:
        self.fs.invalidate_cache()
        strict = {"on_error": "raise"} if self._http else {}  # else a folder that fails would just be left out
        found = _patiently(self.fs.find, self.path, detail=True, **strict)
        if not found and self.path and not _patiently(self.fs.exists, self.path):
            raise FileNotFoundError(self.path)
        names = {self.relative(name): info for name, info in found.items() if not (self._http and "?" in name)}
        names = {
            path: info for path, info in names.items() if path and not any(p.startswith(".") for p in path.split("/"))
        }
        with ThreadPoolExecutor(PARALLEL) as pool:  # a web server's index does not tell sizes
            return list(pool.map(lambda item: self._complete(*item), names.items()))

    def _complete(self, path: str, info: dict[str, Any]) -> File:
        if info.get("size") is None:
            try:
                return self.stat(path)
            except OSError:
                return File(path, None, None)
        return self._file(path, info)

    def _file(self, path: str, info: dict[str, Any]) -> File:
        version = next((info[k] for k in _VERSION_KEYS if info.get(k) is not None), None)
        return File(path, info.get("size"), version if version is None or isinstance(version, int) else str(version))


def _timeout() -> Any:
    """How long the web may be silent. (Its client's own limit is 5 minutes for a whole file: too short for a tar.)"""
    import aiohttp

    return aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=120)


def _patiently(call: Any, *arguments: Any, **options: Any) -> Any:
    """Call a remote store; try again after a failure that may pass. Raises OSError, with the store's own words."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call(*arguments, **options)
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
            raise
        except Exception as error:  # stores raise errors of their own kinds (aiohttp, botocore, zipfile …)
            if attempt == ATTEMPTS:
                raise OSError(f"{type(error).__name__}: {error}") from error
            log.info("%s: %s: trying again", arguments[0] if arguments else call, error)
            time.sleep(0.2 * 4 ** (attempt - 1))
    raise AssertionError("unreachable")


def why(error: OSError) -> str:
    """An error in words, without the machine's paths."""
    return error.strerror or str(error)


def extension(path: str) -> str:
    """The extension of a file's name in lower case, without the dot; empty if there is none."""
    name = path.rpartition("/")[2]
    return name.rpartition(".")[2].lower() if "." in name else ""


def default_name(path: str | list[str], otherwise: str) -> str:
    """A source's name from its (first) path: the last part that is no pattern, without extensions and odd characters."""
    first = path if isinstance(path, str) else next(iter(path), "")
    parts = [p for p in re.split(r"/+|::|:", first) if p and not re.search(r"[*?\[\]{}]", p)]
    last = parts[-1] if parts else ""
    stem = re.sub(r"(\.(tar|gz|tgz|bz2|xz|zip|parquet|jsonl|json|csv))+$", "", last, flags=re.IGNORECASE)
    return re.sub(r"[^A-Za-z0-9._-]+", "_", stem).strip("._-") or otherwise
