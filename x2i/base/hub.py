"""The model hub: which files of a repository a model is loaded from, and where they lie on this machine.

The hub's own cache is used (`HF_HOME`), so that what other tools fetched is found, and a cache copied
from another machine works as it is.
"""

from __future__ import annotations

import glob
import json
import logging
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from x2i.base.digests import files_in
from x2i.base.errors import X2IError
from x2i.base.files import write_text

log = logging.getLogger(__name__)

#: Seconds that the hub may take to answer a question (not to send a file).
TIMEOUT = 5
#: After the hub was silent, it is not asked again for so many seconds.
PAUSE = 60

_silent: tuple[float, str] | None = None

#: Beside weights, what transformers, diffusers, timm and open_clip read: never code.
_READ = {".json", ".txt", ".model", ".jinja", ".spm", ".tiktoken", ".bpe", ".vocab", ".yaml", ".yml"}
#: Copies of the weights for other libraries lie in folders of these names.
_OTHERS = {"onnx", "openvino", "coreml", "tflite", "gguf", "flax", "original", "runs", "logs"}
#: Never data: code, words and pictures about the model, wheels.
_ABOUT = {".py", ".ipynb", ".sh", ".md", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".pdf", ".mp4", ".whl"}
_VARIANT = re.compile(r"\.(fp16|bf16|fp32|non_ema)(?=[.-])")


@dataclass(frozen=True)
class Address:
    """A repository of the hub, at a revision (branch, tag or commit), whole or one file of it."""

    repo: str
    revision: str = "main"
    file: str | None = None

    @classmethod
    def parse(cls, spec: str) -> Address | None:
        """From `org/model[@revision][:file]`; None if it cannot be one."""
        repo, _, file = spec.partition(":")
        repo, _, revision = repo.partition("@")
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", repo, re.ASCII):
            return None
        return cls(repo, revision or "main", file or None)

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return re.fullmatch(r"[0-9a-f]{40}", self.revision) is not None

    @property
    def cache(self) -> Path:
        """Where the hub's cache keeps the repository."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"models--{self.repo.replace('/', '--')}"

    @property
    def _ref(self) -> Path:
        return self.cache / "refs" / self.revision

    def local(self) -> Path | None:
        """The file, or the snapshot's folder if it is whole, in the hub's cache; asks no network."""
        try:
            commit = self.revision if self.pinned else self._ref.read_text(encoding="utf-8").strip()
        except OSError:
            return None
        snapshot = self.cache / "snapshots" / commit
        if not commit or not snapshot.is_dir():
            return None
        if self.file is not None:
            return snapshot / self.file if (snapshot / self.file).is_file() else None
        try:  # the hub's library keeps the list of a commit's files
            listed = list(json.loads((self.cache / "trees" / f"{commit}.json").read_text(encoding="utf-8"))["files"])
        except (OSError, ValueError, LookupError, TypeError):
            return snapshot if _whole(snapshot) else None
        return snapshot if all((snapshot / name).is_file() for name in chosen(listed)) else None

    def fetch(self) -> Path:
        """Bring the files into the hub's cache; return the file or the snapshot's folder.

        Raises:
            X2IError: why it cannot be had: no network, no such repository or file, no permission.
        """
        global _silent
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        if _silent is not None and time.monotonic() - _silent[0] < PAUSE:
            raise X2IError(f"the model hub cannot be reached ({_silent[1]})")
        try:
            info = HfApi().model_info(self.repo, revision=self.revision, timeout=TIMEOUT, files_metadata=True)
            sizes = {s.rfilename: s.size or 0 for s in info.siblings or []}
            names = chosen(sizes) if self.file is None else [self.file]
            if info.sha is None or not set(names) <= sizes.keys() or not names:
                raise X2IError(f"{self.repo} has no {self.file or 'weights'}; it has {', '.join([*sizes][:12])}")
            log.info("fetching %d files, %.1f MB, of %s", len(names), sum(sizes[n] for n in names) / 1e6, self.repo)
            patterns = [glob.escape(name) for name in names]
            folder = snapshot_download(self.repo, revision=info.sha, allow_patterns=patterns, etag_timeout=TIMEOUT)
        except X2IError:
            raise
        except Exception as error:  # noqa: BLE001 - which HTTP library raises is the hub library's secret
            if not isinstance(error, HfHubHTTPError) and not getattr(error, "errno", None):
                _silent = time.monotonic(), _short(error)
            raise X2IError(_explain(error, self)) from None
        if not self.pinned:  # last, so that a download cut short is never taken for whole
            write_text(self._ref, info.sha)
        return Path(folder) / self.file if self.file else Path(folder)


def chosen(names: Iterable[str]) -> list[str]:
    """Of a repository's files those that a model is loaded from, sorted; no code, and no weights twice.

    Folder by folder, safetensors if there are any, else `.bin`; copies for other libraries and in another
    precision are left out. Of a repository that has neither (spaCy's, say), all data.
    """
    paths = sorted(p for p in map(PurePosixPath, names) if not any(part.startswith(".") for part in p.parts))
    data = [p for p in paths if p.suffix.lower() not in _ABOUT]
    ours = [p for p in data if not _OTHERS & {part.lower() for part in p.parts[:-1]}]
    weights = [p for p in ours if p.suffix in (".safetensors", ".bin")]
    if not any(p.suffix == ".safetensors" or p.parent / "config.json" in ours for p in weights):
        return [str(p) for p in data]
    plain = {_family(p) for p in weights if not _variant(p)}
    safe = {_family(p) for p in weights if p.suffix == ".safetensors" and not (_variant(p) and _family(p) in plain)}

    def wanted(path: PurePosixPath) -> bool:
        if _variant(path) and _family(path) in plain:
            return False
        if path.name.endswith((".bin", ".bin.index.json")):
            return _family(path) not in safe
        return path.suffix in (".safetensors", *_READ) or path.name.startswith("tokenizer")

    return [str(p) for p in ours if wanted(p)]


def _family(path: PurePosixPath) -> tuple[PurePosixPath, bool]:
    """Weights of one family are the same weights; open_clip's lie beside those of transformers or timm."""
    return path.parent, path.name.startswith("open_clip")


def _variant(path: PurePosixPath) -> bool:
    return _VARIANT.search(path.name) is not None


def _whole(snapshot: Path) -> bool:
    """Whether a snapshot whose list of files is not known has weights, and every shard that its indices name."""
    names = [p.relative_to(snapshot).as_posix() for p in files_in(snapshot)]
    kept = chosen(names)
    for name in kept:
        if name.endswith(".index.json"):
            try:
                index = json.loads((snapshot / name).read_text(encoding="utf-8"))
                shards = set(index.get("weight_map", {}).values())
            except (OSError, ValueError, AttributeError, TypeError):
                return False
            if any(not (snapshot / name).parent.joinpath(shard).is_file() for shard in shards):
                return False
    return any(PurePosixPath(name).suffix not in (*_READ, "") for name in kept)


def _explain(error: Exception, address: Address) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return (
            f"{address.repo} is gated: accept its terms at https://huggingface.co/{address.repo}, "
            "then `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{address.repo} has no revision {address.revision!r} on the model hub"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the model hub has no {address.repo}, or it is private (`hf auth login`, or set HF_TOKEN)"
    if isinstance(error, OSError) and error.errno:
        return f"what the model hub gave could not be kept ({error})"
    if isinstance(error, errors.HfHubHTTPError):
        return f"the model hub did not give it ({_short(error)})"
    return f"the model hub cannot be reached ({_short(error)})"


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
