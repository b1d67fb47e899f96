"""Reading ahead: each rank its share, spares of the sample's own kind, and how long the training waited."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.trainer import corpora
from tests.trainer.test_data import damage, same, stage
from x2i import corpus
from x2i.trainer.config import Reading
from x2i.trainer.data import Example, SampleReader
from x2i.trainer.loader import Loader
from x2i.trainer.mixture import plan_of
from x2i.trainer.table import SampleTable

#: A whole reading of a corpus, and what of the heavy libraries it has imported.
READ_ALL = """
import sys
from x2i import corpus
from x2i.trainer.config import Reading
from x2i.trainer.data import SampleReader
from x2i.trainer.loader import Loader
from x2i.trainer.mixture import plan_of
from x2i.trainer.stage import Stage
from x2i.trainer.table import SampleTable

content = {"name": "s", "resolution": 32, "steps": 3, "batch": 8, "lr": 1.0, "mixture": {"photographs": 1}}
stage = Stage.model_validate(content | {"mixture_by": "source", "min_crop": float(sys.argv[2])})
table = SampleTable([corpus.open(sys.argv[1])], 0.0)
reader = SampleReader(table, decode=sys.argv[3])
batches = list(Loader(reader, plan_of(table, stage, 0), stage, 0, Reading()))
assert len(batches) == 3 and not reader.damaged
print([name for name in ("torch", "transformers", "cv2", "scipy", "duckdb", "ray") if name in sys.modules])
"""


@pytest.mark.parametrize(("decode", "min_crop"), [("reduced", 1.0), ("full", 0.5)])
def test_a_loader_does_without_pytorch(tmp_path: Path, decode: str, min_crop: float) -> None:
    """It would be most of what a process that only reads holds in memory."""
    folder = corpora.write(tmp_path / "corpus", [*corpora.samples(6), *corpora.chats(6)])
    command = [sys.executable, "-c", READ_ALL, str(folder), str(min_crop), decode]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_ranks_read_their_shares_and_together_the_whole(corpus_folder: Path) -> None:
    table, of = SampleTable([corpus.open(corpus_folder)], 0.2), stage(steps=5)
    plan, reader = plan_of(table, of, 0), SampleReader(table)

    def read(rank: int, ranks: int) -> list[list[Example]]:
        return list(Loader(reader, plan, of, 0, Reading(), share=lambda draws: draws[rank::ranks]))

    whole, shares = list(Loader(reader, plan, of, 0, Reading())), [read(rank, 2) for rank in range(2)]
    for examples, first, second in zip(whole, *shares, strict=True):
        assert all(map(same, examples[::2], first)) and all(map(same, examples[1::2], second))
    none = list(Loader(reader, plan, of, 0, Reading(), share=lambda _: []))
    assert none == [[]] * of.steps  # a rank may have nothing to do


def test_a_picture_gives_way_to_a_picture_and_an_answer_to_an_answer(tmp_path: Path) -> None:
    folder = corpora.write(tmp_path / "corpus", [*corpora.samples(6), *corpora.chats(18)], per_shard=1)
    of = stage(mixture={"photographs": 1}, mixture_by="source", steps=9)

    def read() -> tuple[list[Example], SampleReader]:
        table = SampleTable([corpus.open(folder)], 0.0)
        reader = SampleReader(table)
        return [e for batch in Loader(reader, plan_of(table, of, 0), of, 0, Reading()) for e in batch], reader

    before = read()[0]
    kinds = [e.output is None for e in before]
    victims = sorted({e.key for e in before if e.output is None})[::2] + [e.key for e in before if e.inputs][:1]
    for key in victims:
        damage(folder, key, "flip")
    after, reader = read()
    assert [e.output is None for e in after] == kinds and 0 < sum(kinds) < len(kinds)
    assert sum(e.replaced is not None for e in after) >= len(victims)
    assert {d.key for d in reader.damaged.values()} >= set(victims)


def test_the_wait_for_samples_is_told_once(corpus_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, of = SampleTable([corpus.open(corpus_folder)], 0.2), stage(steps=4)
    plan, reader = plan_of(table, of, 0), SampleReader(table)
    planned = reader.planned

    def slow(*given: object) -> Example:
        time.sleep(0.02)
        return planned(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(reader, "planned", slow)
    loader = Loader(reader, plan, of, 0, Reading(threads=1, prefetch=1))
    batches = iter(loader)
    next(batches)
    assert loader.waited() > 0.04 and loader.waited() == 0.0
    time.sleep(0.3)  # meanwhile the next one is read
    next(batches)
    assert loader.waited() < 0.04
