"""Reads in few pieces and within bounds: whatever is joined, fetched ahead or kept open, the same samples come out."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from tests.trainer import corpora
from tests.trainer.test_data import same, stage
from x2i import corpus
from x2i.base.errors import X2IError
from x2i.corpus.sample import Sample
from x2i.trainer import index, ranges
from x2i.trainer.config import Reading
from x2i.trainer.data import Example, SampleReader
from x2i.trainer.loader import Loader
from x2i.trainer.mixture import plan_of
from x2i.trainer.table import SampleTable


class Ranges(SimpleHTTPRequestHandler):
    """Files in parts, as an object store has them."""

    def do_GET(self) -> None:
        path, wanted = Path(self.translate_path(self.path)), self.headers.get("Range")
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        first, last = (wanted or f"bytes=0-{len(data) - 1}").removeprefix("bytes=").split("-")
        part = data[int(first) : int(last) + 1]
        if not part:
            return self.send_error(416)
        self.send_response(206 if wanted else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(part)
        return None

    def log_message(self, *given: Any) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def read(path: Path | str, open_files: int = 128, **reading: int) -> tuple[list[Example], SampleReader, Loader]:
    """Twelve steps of 36 photographs in three tasks, and what was read for them."""
    table, of = SampleTable([corpus.open(path)], 0.2), stage()
    reader = SampleReader(table, open_files=open_files)
    loader = Loader(reader, plan_of(table, of, 0), of, 0, Reading(**reading))
    found = [e for batch in loader for e in batch]
    reader.close()
    return found, reader, loader


def test_neighbours_are_read_at_once_and_come_out_the_same(corpus_folder: Path) -> None:
    plain, each, _ = read(corpus_folder, join_mib=0)
    joined, few, _ = read(corpus_folder, join_samples=48)
    assert len(plain) == 48 and all(map(same, plain, joined))
    assert each.shards.reads == 48 and few.shards.reads < 24
    _, close, _ = read(corpus_folder, join_samples=48, join_gap_kib=0)
    assert few.shards.reads < close.shards.reads < 48
    assert close.shards.bytes_read <= each.shards.bytes_read  # what two steps want is read once
    again = read(corpus_folder, join_samples=12, threads=1, prefetch=1)[0]
    assert all(map(same, plain, again))


@pytest.mark.parametrize("join_mib", [0, 8])
def test_behind_a_url_the_same_samples_are_read(corpus_folder: Path, join_mib: int) -> None:
    plain = read(corpus_folder)[0]
    memory = fsspec.filesystem("memory")
    memory.put(str(corpus_folder), "/corpus", recursive=True)
    try:
        found, reader, _ = read("memory://corpus", join_mib=join_mib)
    finally:
        memory.rm("/corpus", recursive=True)
    assert all(map(same, plain, found)) and (reader.shards.reads < 40) == bool(join_mib)
    with served(corpus_folder) as url:
        found, reader, _ = read(url, join_mib=join_mib, in_flight=3)
    assert all(map(same, plain, found)) and (reader.shards.reads < 40) == bool(join_mib)


def test_a_url_is_asked_again(corpus_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_PAUSE", 0.0)
    plain, answer, refused = read(corpus_folder)[0], Ranges.do_GET, []

    def busy(self: Ranges) -> None:
        if "shards" in self.path and self.headers["Range"] not in refused:
            refused.append(self.headers["Range"])
            return self.send_error(503)
        return answer(self)

    monkeypatch.setattr(Ranges, "do_GET", busy)
    with served(corpus_folder) as url:
        found, reader, _ = read(url)
    assert refused and not reader.damaged and all(map(same, plain, found))


def test_what_a_url_sends_by_half_is_asked_for_again(corpus_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_PAUSE", 0.0)
    plain, answer, halved = read(corpus_folder)[0], Ranges.do_GET, []

    def half(self: Ranges) -> None:
        wanted = self.headers["Range"]
        if "shards" in self.path and wanted not in halved:
            halved.append(wanted)
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            self.headers.replace_header("Range", f"bytes={first}-{(first + last) // 2}")
        return answer(self)

    monkeypatch.setattr(Ranges, "do_GET", half)
    with served(corpus_folder) as url:
        found, reader, _ = read(url)
    assert halved and not reader.damaged and all(map(same, plain, found))


@pytest.mark.parametrize("join_mib", [0, 8])
def test_a_server_that_sends_whole_files_is_named(
    corpus_folder: Path, monkeypatch: pytest.MonkeyPatch, join_mib: int
) -> None:
    answer = Ranges.do_GET

    def whole(self: Ranges) -> None:
        if "shards" in self.path:
            del self.headers["Range"]
        return answer(self)

    monkeypatch.setattr(Ranges, "do_GET", whole)
    with served(corpus_folder) as url, pytest.raises(X2IError, match="one that serves ranges of files"):
        read(url, join_mib=join_mib)


def test_a_manifest_behind_a_url_is_asked_for_again(
    corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_PAUSES", (0.0, 0.0))
    plain, answer, fails = read(corpus_folder)[0], Ranges.do_GET, 0

    def busy(self: Ranges) -> None:
        nonlocal fails
        if "manifest" in self.path and fails > 0:
            fails -= 1
            return self.send_error(503)
        return answer(self)

    monkeypatch.setattr(Ranges, "do_GET", busy)
    with served(corpus_folder) as url:
        there = corpus.open(url)
        fs = there._fs
        monkeypatch.setattr(
            fs, "open", partial(fs.open, block_size=1, cache_type="none")
        )  # else all of it comes at once
        table = SampleTable([there], 0.2)
        fails = 2
        assert table[0].key == SampleTable([corpus.open(corpus_folder)], 0.2)[0].key and fails == 0
        fails = 1000
        with pytest.raises(X2IError, match=r"manifest.parquet: row group \d+ cannot be read .*503.*serves ranges"):
            table[len(plain)]


def test_a_shard_that_is_cut_off_costs_no_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_PAUSE", 0.0)
    folder = corpora.write(tmp_path / "corpus", list(corpora.samples(36)), per_shard=200)
    shard = folder / "shards/00000.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size * 2 // 3])
    alone, first, _ = read(folder, join_mib=0)
    together, second, _ = read(folder, join_samples=48)
    assert all(map(same, alone, together)) and any(e.replaced for e in alone)
    assert first.damaged == second.damaged and len(first.damaged) > 5
    with served(folder) as url:
        assert all(map(same, alone, read(url, join_samples=48)[0]))


def test_what_is_read_ahead_has_a_bound(tmp_path: Path) -> None:
    folder = corpora.write(tmp_path / "corpus", list(corpora.samples(6)))
    table, of = SampleTable([corpus.open(folder)], 0.0), stage(resolution=256, steps=8)
    plan, held = plan_of(table, of, 0), []
    for mib in (1, 3, 512):
        loader = Loader(SampleReader(table), plan, of, 0, Reading(prefetch_mib=mib, prefetch=8))
        assert len(list(loader)) == 8
        held.append(loader.most_held)
    step = 4 * 2 * 3 * 256**2 + (1 << 18)
    assert held[0] <= step and held[1] <= 3 << 20 and held[2] > 4 << 20
    short = Loader(SampleReader(table), plan, of, 0, Reading(prefetch=1))
    batches = iter(short)
    next(batches)
    assert short.most_held <= 3 * step  # the step that is wanted, one ahead, and one whose place is free again
    batches.close()  # type: ignore[attr-defined]


def test_joined_reads_of_one_step_are_bounded_together(tmp_path: Path) -> None:
    made = []
    for number in range(80):
        noise = np.random.default_rng(number).integers(0, 256, (128, 128, 3), dtype=np.uint8)
        shown = corpora.picture(Image.fromarray(noise))
        made.append(corpora.Made(Sample(f"{number:04d}-t2i", "text_to_image", "Noise", (), shown), f"{number:064d}"))
    folder = corpora.write(tmp_path / "corpus", made)
    of = stage(resolution=8, batch=8, steps=20, mixture={"text_to_image": 1})
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/noise", recursive=True)
    try:
        table = SampleTable([corpus.open("memory://noise")], 0.0)
        loader = Loader(SampleReader(table), plan_of(table, of, 0), of, 0, Reading(prefetch_mib=1))
        assert len(list(loader)) == 20
    finally:
        memory.rm("/noise", recursive=True)
    assert loader.most_held < 5 << 18, loader.most_held  # and not half of what is free for each sample


def test_few_shards_are_open_at_a_time(tmp_path: Path) -> None:
    folder = corpora.write(tmp_path / "corpus", list(corpora.samples(36)), per_shard=1)
    before = set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else set()
    table, of = SampleTable([corpus.open(folder)], 0.2), stage()
    reader = SampleReader(table, open_files=3)
    plan = plan_of(table, of, 0)
    for _ in Loader(reader, plan, of, 0, Reading(threads=2)):
        assert reader.shards.open <= 5  # those in use besides
    reader.close()
    assert reader.shards.open == 0
    assert not before or len(set(os.listdir("/proc/self/fd")) - before) < 3


def test_where_no_more_files_may_be_open_no_sample_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = corpora.write(tmp_path / "corpus", list(corpora.samples(36)), per_shard=1)
    plain, most, opened = read(folder)[0], 6, set[int]()
    opening, closing = os.open, os.close

    def limited(name: str, *given: Any) -> int:
        if "/shards/" not in str(name):
            return opening(name, *given)
        if len(opened) >= most:
            raise OSError(errno.EMFILE, "Too many open files", name)
        opened.add(descriptor := opening(name, *given))
        return descriptor

    def closed(descriptor: int) -> None:
        opened.discard(descriptor)
        closing(descriptor)

    monkeypatch.setattr(os, "open", limited)
    monkeypatch.setattr(os, "close", closed)
    found, reader, _ = read(folder, threads=2)
    assert not reader.damaged and all(map(same, plain, found))
    most = 0
    with pytest.raises(X2IError, match="ulimit"):
        read(folder)


def test_an_error_of_the_plan_reaches_who_iterates(corpus_folder: Path) -> None:
    table, of = SampleTable([corpus.open(corpus_folder)], 0.2), stage()

    def refuse(draws: list[Any]) -> list[Any]:
        raise RuntimeError("no such rank")

    with pytest.raises(RuntimeError, match="no such rank"):
        list(Loader(SampleReader(table), plan_of(table, of, 0), of, 0, Reading(), refuse))
