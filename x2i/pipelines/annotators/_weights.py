"""What is known of published weights before they are here, and those that lie on GitHub only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from x2i.base.errors import X2IError
from x2i.base.files import atomic
from x2i.base.weights import Weights, cache_folder


@dataclass(frozen=True)
class GitHub(Weights):
    """Weights that lie in a repository on GitHub only: `github:OWNER/REPOSITORY:FILE`.

    They are kept in the cache folder. Files that are attached to a release, not part of the repository, must be
    put there by hand.
    """

    def local(self) -> Path | None:
        """The file in the cache, or None."""
        path = self.place()
        return path if path.is_file() else None

    @property
    def remedy(self) -> str:
        """How to get the file."""
        repository, file = self._where()
        return (
            f"{self.spec}: get the file {file} of the GitHub repository {repository}, and name it "
            f"(`weights: /path/to/{Path(file).name}`), or put it at {self.place()}"
        )

    def _fetched(self) -> Path:
        import urllib.error
        import urllib.parse
        import urllib.request

        repository, file = self._where()
        url = f"https://raw.githubusercontent.com/{repository}/HEAD/{urllib.parse.quote(file)}"
        try:
            with urllib.request.urlopen(url, timeout=20) as answer, atomic(self.place()) as temporary:
                temporary.write_bytes(answer.read())
        except (OSError, urllib.error.URLError) as error:
            raise X2IError(
                f"weights {self.spec} (licence {self.licence or 'unknown'}): not here, and not to be had from GitHub "
                f"({error}). {self.remedy}"
            ) from None
        return self.place()

    def place(self) -> Path:
        """Where the file is looked for."""
        repository, file = self._where()
        return cache_folder() / "weights" / "github" / repository / file

    def _where(self) -> tuple[str, str]:
        repository, mark, file = self.spec.removeprefix("github:").partition(":")
        if not mark or repository.count("/") != 1 or not file or ".." in self.spec:
            raise X2IError(f"weights {self.spec}: expected github:OWNER/REPOSITORY:FILE")
        return repository, file


def weights_of(spec: str, sha256: str | None, known: Iterable[Weights]) -> Weights:
    """The weights that a configuration names.

    Args:
        sha256: the hash that it asks for. known: published ones, which bring their hash, size and licence.
    """
    for weights in known:
        if weights.spec == spec:
            return replace(weights, sha256=sha256 or weights.sha256)
    return GitHub(spec, sha256) if spec.startswith("github:") else Weights(spec, sha256)
