"""Samples and shards: the published layout, bytes that depend on the samples alone, offsets that hold."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from x2i.corpus.sample import PLACEHOLDER, Picture, Sample, placeholder
from x2i.corpus.shard import ShardWriter, entry_size, header


def picture(extension: str = "png", colour: str = "red") -> Picture:
    out = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(out, {"png": "PNG", "jpg": "JPEG"}[extension])
    return Picture(out.getvalue(), extension, 6, 4)


def sample(key: str = "a-b-edit", inputs: int = 2) -> Sample:
    words = " and ".join(placeholder(n) for n in range(1, inputs + 1))
    pictures = tuple(picture("png", c) for c in ("red", "green", "blue")[:inputs])
    return Sample(key, "edit", f"Blend {words}.", pictures, picture("jpg"), (), {"seed": "s"})


def test_a_sample_has_the_published_layout() -> None:
    names = [name for name, _ in sample().members()]
    assert names == ["json", "input_1.png", "input_2.png", "output.jpg"]
    record = json.loads(dict(sample().members())["json"])
    assert record == {
        "task_type": "edit",
        "instruction": "Blend <img><|image_1|></img> and <img><|image_2|></img>.",
        "input_images": ["a-b-edit.input_1.png", "a-b-edit.input_2.png"],
        "output_image": "a-b-edit.output.jpg",
        "provenance": {"seed": "s"},
    }


def test_understanding_samples_carry_messages_instead_of_an_output() -> None:
    messages = ({"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "Red."})
    record = Sample("k", "vqa", "", (picture(),), None, messages).record()
    assert "output_image" not in record
    assert record["messages"] == list(messages)


@pytest.mark.parametrize("instruction", ["No mark.", placeholder(2), placeholder(1) + placeholder(3), placeholder(0)])
def test_placeholders_that_do_not_fit_the_inputs_are_refused(instruction: str) -> None:
    with pytest.raises(ValueError, match="placeholders"):
        Sample("k", "edit", instruction, (picture(),), picture())


def test_a_placeholder_may_come_twice_and_is_found_again() -> None:
    text = f"{placeholder(1)}, once more {placeholder(1)}"
    assert PLACEHOLDER.findall(text) == ["1", "1"]
    Sample("k", "edit", text, (picture(),), picture())


def write(path: Path, samples: list[Sample]) -> ShardWriter:
    with ShardWriter(path) as writer:
        for one in samples:
            entry = writer.write(one.key, one.members())
            assert entry.size == entry_size(len(data) for _, data in one.members())
    return writer


def test_a_shard_is_a_plain_tar_and_its_offsets_hold(tmp_path: Path) -> None:
    samples = [sample(f"k{i}-x", i % 3) for i in range(7)]
    path = tmp_path / "0.tar"
    with ShardWriter(path) as writer:
        entries = [writer.write(s.key, s.members()) for s in samples]
    data = path.read_bytes()
    assert (writer.size, writer.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert len(data) % tarfile.RECORDSIZE == 0
    for one, entry in zip(samples, entries, strict=True):
        whole = data[entry.offset : entry.offset + entry.size]
        assert hashlib.sha256(whole).hexdigest() == entry.sha256
        found = {m.suffix: data[m.offset : m.offset + m.size] for m in entry.members}
        assert found == dict(one.members())
    with tarfile.open(path) as tar:
        infos = tar.getmembers()
    assert [i.name for i in infos] == [f"{s.key}.{name}" for s in samples for name, _ in s.members()]
    assert {(i.mtime, i.uid, i.gid, i.mode, i.uname, i.gname) for i in infos} == {(0, 0, 0, 0o644, "", "")}


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, [sample("a-x"), sample("b-x")]) for name in ("0.tar", "1.tar"))
    other = write(tmp_path / "2.tar", [sample("b-x"), sample("a-x")])
    assert first.sha256 == second.sha256 != other.sha256


def test_an_empty_shard_is_a_tar_all_the_same(tmp_path: Path) -> None:
    assert write(tmp_path / "0.tar", []).samples == 0
    with tarfile.open(tmp_path / "0.tar") as tar:
        assert tar.getnames() == []


def test_a_name_that_no_plain_header_holds_is_refused() -> None:
    assert len(header("a/" * 40 + "b" * 90, 3)) == tarfile.BLOCKSIZE
    with pytest.raises(ValueError):
        header("b" * 300, 3)
