"""Archives from a registry of the test's own: a source distribution is not built, and its hash is checked."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from x2i.base.archives import download, installed


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002 - its name there


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is served as pip's index."""
    folder = tmp_path / "index"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield folder
    server.shutdown()


def offer(index: Path, name: str, sha256: str | None = None) -> bytes:
    """An sdist whose setup.py fails."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for file, data in (("setup.py", b"raise SystemExit('built')"), ("model.bin", b"weights")):
            info = tarfile.TarInfo(f"{name}-1.0/{file}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    page = index / name.replace("_", "-")
    page.mkdir()
    (page / f"{name}-1.0.tar.gz").write_bytes(out.getvalue())
    sha256 = sha256 or hashlib.sha256(out.getvalue()).hexdigest()
    link = f'<a href="{name}-1.0.tar.gz#sha256={sha256}">{name}-1.0.tar.gz</a>'
    (page / "index.html").write_text(f"<!DOCTYPE html><html><body>{link}</body></html>")
    return out.getvalue()


def test_a_source_distribution_is_taken_unbuilt(index: Path, tmp_path: Path) -> None:
    data = offer(index, "old_pose")
    assert download("old-pose==1.0", tmp_path) == ""
    assert (tmp_path / "old_pose-1.0.tar.gz").read_bytes() == data


def test_a_wrong_hash_or_version_is_said(index: Path, tmp_path: Path) -> None:
    offer(index, "forged", "0" * 64)
    assert "has not the SHA-256" in download("forged==1.0", tmp_path)
    assert "forged==2.0" in download("forged==2.0", tmp_path)
    assert "absent==1.0" in download("absent==1.0", tmp_path)
    assert not list(tmp_path.glob("*.tar.gz"))


def test_an_installed_package_has_its_own_files() -> None:
    version = importlib.metadata.version("pytest")
    path = installed(f"pytest=={version}", "pytest/__init__.py")
    assert path is not None and path.is_file()
    assert installed("pytest==0.0.1", "pytest/__init__.py") is None
    assert installed(f"pytest=={version}", "pytest/weights.bin") is None
    assert installed("no-such-package-here==1.0", "a") is None
