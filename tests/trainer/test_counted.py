"""Texts counted by the run's tokenizer: once, for all ranks, and packs are full of them to the token."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer import corpora
from tests.trainer.test_packing import row, write
from tests.trainer.test_packs import content, wordy
from x2i import corpus
from x2i.base.config import parse_config
from x2i.base.errors import X2IError
from x2i.trainer import counted as counting
from x2i.trainer.config import RunConfig
from x2i.trainer.counted import counted
from x2i.trainer.data import SampleReader
from x2i.trainer.measuring import COUNTS, FILE, lengths_of
from x2i.trainer.setup import Setup
from x2i.trainer.table import SampleTable


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SampleTable:
    """1,000 samples in ten row groups, of which 250 are conversations; files of 200 rows."""
    monkeypatch.setattr(counting, "_ROWS", 200)
    rows = [row(n, "t2i" if n % 4 else "chat", 9, output=(64, 64) if n % 4 else None) for n in range(1000)]
    return SampleTable([write(tmp_path / "corpus", rows, row_group=100)], 0.1, packed=True)


def test_texts_are_counted_once(table: SampleTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def count(sample: int) -> int | None:
        asked.append(sample)
        return None if sample == 41 else sample + 7

    found = counted(table, {"t2i"}, count, tmp_path / "counts", print)
    assert sorted(asked) == [n for n in range(1000) if n % 4]
    assert found.tolist() == [-1 if n == 41 or n % 4 == 0 else n + 7 for n in range(1000)]
    asked.clear()
    again = counted(table, {"t2i"}, count, tmp_path / "counts", print)
    assert not asked and np.array_equal(found, again)  # nor is what could not be read tried again
    for rank in ("0", "3"):  # ranks begin elsewhere
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "4")
        asked.clear()
        assert np.array_equal(counted(table, {"t2i"}, count, tmp_path / f"others{rank}", print), found)
        assert asked[0] == (1 if rank == "0" else 601)


def test_ranks_share_the_counting_and_have_the_same(table: SampleTable, tmp_path: Path) -> None:
    """What two count at once, differently for a bad disk, is for both what was kept first."""
    found: dict[int, np.ndarray] = {}

    def one(rank: int) -> None:
        found[rank] = counted(table, {"t2i", "chat"}, lambda sample: 10 * sample + rank, tmp_path / "counts", print)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


def test_a_damaged_file_of_counts_is_named(table: SampleTable, tmp_path: Path) -> None:
    counted(table, {"t2i"}, lambda sample: sample, tmp_path, print)
    files = sorted(tmp_path.glob("*.npy"))
    assert len(files) == 5
    for damage in (b"no", b"", b"PK\x03\x04 is a zip", bytes(900)):
        files[2].write_bytes(damage)
        with pytest.raises(X2IError, match=rf"{files[2].name}: cannot be read .* Remove it to count its texts anew"):
            counted(table, {"t2i"}, lambda sample: sample, tmp_path, print)
    np.save(files[2], np.zeros(200))
    with pytest.raises(X2IError, match=r"float64.*, and 200 are wanted"):
        counted(table, {"t2i"}, lambda sample: sample, tmp_path, print)
    np.save(files[2], np.zeros(3, np.int32))
    with pytest.raises(X2IError, match=r"and 200 are wanted"):
        counted(table, {"t2i"}, lambda sample: sample, tmp_path, print)


def test_packs_of_counted_texts_are_as_planned_to_the_token(tmp_path: Path) -> None:
    """Of one thousand tokens, pictures of two sizes and conversations, cut texts too; and again when a text is gone."""
    made = [wordy(item, 60) for item in corpora.chats(36)]
    made[0] = wordy(made[0], 4000)  # the model cuts it
    folder = corpora.write(
        tmp_path / "corpus", [*corpora.samples(24), *corpora.widened(list(corpora.samples(36))[54:]), *made]
    )
    run: dict[str, Any] = content(folder, tmp_path / "run", max_text_tokens=90)
    run["stages"] = [run["stages"][0] | {"pack": {"tokens": 1024, "packs": 2}, "steps": 1}]
    config = parse_config(RunConfig, run, "test")

    setup = Setup(config, [corpus.open(folder)], None)
    draws = {d.index: d for step in range(8) for d in setup.plans[0].step(step)}
    batches = [b for step in range(8) for b in setup.batches(0, step)]
    lengths = {e.draw: n for b in batches for e, n in zip(b.examples, b.inputs.lengths, strict=True)}
    assert lengths == {index: draw.tokens for index, draw in draws.items()}
    assert np.mean([sum(b.inputs.lengths) for b in batches]) >= 0.985 * 1024
    (file,) = (tmp_path / "run" / COUNTS).glob("*/*.npy")
    counts = np.load(file)
    assert (counts[[n for n in range(len(counts)) if setup.table.task(n) in setup.tasks]] > 0).all()
    for shard in folder.rglob("*.tar"):
        shard.write_bytes(b"\0" * shard.stat().st_size)
    of = setup.processors[0], SampleReader(setup.table), config.stages[0], config.output / FILE
    again = lengths_of(*of).counted
    assert again is not None and np.array_equal(again, counts)
    measured = (config.output / FILE).read_text()
    for damage in ("[]", "null", measured.replace("slope", "steep"), measured[:50], '{"only": 5}'):
        (config.output / FILE).write_text(damage)
        with pytest.raises(X2IError, match=rf"{FILE}: cannot be read .* Remove it to measure the texts anew"):
            lengths_of(*of)
    (config.output / FILE).write_text(measured)
    file.unlink()
    none = lengths_of(*of).counted
    assert none is not None and none.max() == -1
