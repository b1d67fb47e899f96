"""Weights from the model hub: only what a model is loaded from, at one commit, and no waiting without a network."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.base.hub import fake_hub, silent_hub
from x2i.base.digests import digest_of
from x2i.base.hub import Address, chosen
from x2i.base.weights import Weights

FILES = {
    "config.json": b'{"model_type": "tiny"}',
    "model-00001-of-00002.safetensors": b"first" * 100,
    "model-00002-of-00002.safetensors": b"second" * 100,
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "pytorch_model.bin": b"the same again",
    "tokenizer.json": b"{}",
    "modeling_tiny.py": b"raise SystemExit('remote code')",
    "README.md": b"# tiny",
}
LOADED = {n for n in FILES if n.endswith((".json", ".safetensors"))}


def python(code: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, with the hub's cache and ours in `tmp_path`."""
    import os

    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_HOME": str(tmp_path / "hf"), "X2I_CACHE": str(tmp_path / "x2i"), **environment}
    head = "import json, time; from x2i.base.weights import Weights; from x2i.base import hub\n"
    return subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, env=env, timeout=60)


def test_what_a_model_is_loaded_from() -> None:
    assert set(chosen(FILES)) == LOADED
    only_bin = ["config.json", "pytorch_model.bin", "tf_model.h5", "vocab.txt", "merges.txt", "openvino/model.bin"]
    assert chosen(only_bin) == ["config.json", "merges.txt", "pytorch_model.bin", "vocab.txt"]
    diffusers = ["model_index.json", "vae/config.json", "vae/m.safetensors", "vae/m.fp16.safetensors", "vae/m.bin"]
    assert chosen([*diffusers, "safety/config.json", "safety/pytorch_model.bin"]) == [
        "model_index.json",
        "safety/config.json",
        "safety/pytorch_model.bin",  # its folder has nothing better
        "vae/config.json",
        "vae/m.safetensors",
    ]
    assert chosen(["config.json", "model.fp16.safetensors"]) == ["config.json", "model.fp16.safetensors"]
    half = ["config.json", "model.fp16.safetensors", "pytorch_model.bin"]
    assert chosen(half) == ["config.json", "pytorch_model.bin"]
    both = ["config.json", "model.safetensors", "open_clip_config.json", "open_clip_pytorch_model.bin"]
    assert chosen([*both, "pytorch_model.bin"]) == both
    spacy = ["config.cfg", "meta.json", "ner/model", "vocab/lookups.bin", "vocab/strings.json", "tokenizer"]
    assert chosen([*spacy, "README.md", "en-3.8-py3-none-any.whl", ".gitattributes"]) == sorted(spacy)


def test_a_repository_is_fetched_in_part_once_and_then_found_without_a_network(tmp_path: Path) -> None:
    code = "w = Weights('tiny/model'); before = w.local(); print(before, w.fetch(), w.digest(), w.fetch() == w.local())"
    with fake_hub(FILES) as hub:
        done = python(code, tmp_path, HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    before, path, digest, same = done.stdout.split()
    assert (before, same) == ("None", "True")
    assert hub.downloaded == LOADED
    assert {p.name for p in Path(path).iterdir()} == LOADED
    assert Path(path).name == hub.commit
    assert digest == digest_of(Path(path))
    (Path(path) / "README.md").write_text("fetched by another tool")  # is not what the model is
    again = python("print(Weights('tiny/model').fetch(), Weights('tiny/model').digest())", tmp_path, HF_HUB_OFFLINE="1")
    assert again.stdout.split() == [path, digest], again.stderr
    pinned = python(f"print(Weights('tiny/model@{hub.commit}').local())", tmp_path, HF_HUB_OFFLINE="1")
    assert pinned.stdout.strip() == path
    (Path(path) / "model-00002-of-00002.safetensors").unlink()
    assert python("print(Weights('tiny/model').local())", tmp_path).stdout.strip() == "None"


def test_one_file_of_a_repository(tmp_path: Path) -> None:
    with fake_hub(FILES) as hub:
        done = python("print(Weights('tiny/model:README.md').fetch())", tmp_path, HF_ENDPOINT=hub.url)
        assert Path(done.stdout.strip()).read_bytes() == FILES["README.md"], done.stderr
        assert hub.downloaded == {"README.md"}
        absent = python("Weights('tiny/model:other.pt').fetch()", tmp_path, HF_ENDPOINT=hub.url)
        assert "tiny/model has no other.pt; it has config.json" in absent.stderr
        unknown = python("Weights('tiny/none').fetch()", tmp_path, HF_ENDPOINT=hub.url)
        assert "the model hub has no tiny/none, or it is private" in unknown.stderr
    with fake_hub(FILES, gated=True) as hub:
        gated = python("Weights('tiny/model@main').fetch()", tmp_path, HF_ENDPOINT=hub.url)
    assert "accept its terms at https://huggingface.co/tiny/model" in gated.stderr
    whole = python("print(Weights('tiny/model').local())", tmp_path)  # the one file is not the repository
    assert whole.stdout.strip() == "None"


@pytest.mark.parametrize("how", ["offline", "refused", "silent"])
def test_without_a_network_it_says_so_at_once_and_what_helps(tmp_path: Path, how: str) -> None:
    code = (
        "hub.TIMEOUT = 1\n"
        "for spec in ('tiny/model', 'tiny/model:model.bin'):\n"
        "    start = time.monotonic()\n"
        "    try: Weights(spec).fetch()\n"
        "    except Exception as error: print(json.dumps([type(error).__name__, str(error), time.monotonic() - start]))"
    )
    if how == "offline":
        done = python(code, tmp_path, HF_HUB_OFFLINE="1")
    elif how == "refused":
        done = python(code, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    else:
        with silent_hub() as url:
            done = python(code, tmp_path, HF_ENDPOINT=url)
    first, second = map(json.loads, done.stdout.splitlines())
    for kind, said, _ in (first, second):
        assert kind == "X2IError"
        assert "weights tiny/model" in said
        assert "the model hub cannot be reached" in said
        assert "Run `x2i models fetch RECIPE` on a machine with a network" in said
        assert str(tmp_path / "hf" / "hub") in said
    assert first[2] < 5
    assert second[2] < 0.1  # a hub that was silent is not asked again


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A snapshot of `tiny/model` as older tools leave it: no list of files; sharded."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--tiny--model"
    out = folder / "snapshots" / ("a" * 40)
    out.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    for name in LOADED:
        (out / name).write_bytes(FILES[name])
    return out


@pytest.mark.parametrize("gone", sorted(n for n in LOADED if n.startswith("model-")))
def test_a_snapshot_that_lacks_a_shard_is_not_there(snapshot: Path, gone: str) -> None:
    weights = Weights("tiny/model")
    assert weights.local() == snapshot
    (snapshot / gone).unlink()
    assert weights.local() is None
    (snapshot / gone).symlink_to("../../blobs/swept-away")
    assert weights.local() is None


def test_a_snapshot_of_the_configuration_alone_is_not_there(snapshot: Path) -> None:
    for path in snapshot.iterdir():
        if path.name not in ("config.json", "tokenizer.json"):
            path.unlink()
    assert Weights("tiny/model").local() is None
    assert Weights("tiny/model:config.json").local() == snapshot / "config.json"


def test_looking_takes_no_time(snapshot: Path) -> None:
    start = time.perf_counter()
    for _ in range(10):
        assert Weights("tiny/model").local() == snapshot
    assert (time.perf_counter() - start) / 10 < 0.05


def test_addresses() -> None:
    assert Address.parse("org/m@refs/pr/1:sub/a.pt") == Address("org/m", "refs/pr/1", "sub/a.pt")
    assert Address.parse("Qwen/Qwen2.5-VL-3B") == Address("Qwen/Qwen2.5-VL-3B", "main", None)
    for no in ("a/b/c", "../x", "", "a b/c", "/a"):
        assert Address.parse(no) is None
