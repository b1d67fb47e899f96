"""What lies together in a shard is drawn in the same stretch of steps, and by the same rank: so it can be read at once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from tests.trainer.test_packing import row
from tests.trainer.test_packing import write as write_rows
from x2i import corpus
from x2i.trainer.config import Shuffle
from x2i.trainer.mixture import plan_of, table_of
from x2i.trainer.ranges import Window
from x2i.trainer.shares import Shares
from x2i.trainer.stage import Stage
from x2i.trainer.table import SampleRef

ROWS, BYTES = 12_000, 10_240
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"batch": 32},
    "buckets": {"batch": 32, "buckets": [[256, 256], [320, 192], [192, 320]]},
    "packs": {"pack": {"tokens": 8192, "packs": 4}},
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> corpus.Corpus:
    """More samples than the windows below, of two tasks, each task's together in a shard."""
    random = np.random.default_rng(0)
    shapes = [(640, 480), (480, 640), (512, 512)]
    rows = []
    for number in range(ROWS):
        shard, within = divmod(number, 500)
        shape = shapes[int(random.integers(3))]
        made = row(number, "t2i" if within < 250 else "grey", int(random.integers(10, 121)), output=shape)
        rows.append({**made, "shard": f"shards/{shard:05d}.tar", "offset": within * BYTES, "size": BYTES})
    return write_rows(tmp_path_factory.mktemp("large") / "corpus", rows, 1000)


def reads(opened: corpus.Corpus, way: str, shuffle: Shuffle, ranks: int) -> float:
    """Reads of a sample, for one rank that looks 1,500 of its samples ahead; in the middle of an epoch."""
    stage = Stage.model_validate(
        {"name": "one", "resolution": 256, "steps": 9, "lr": 1, "mixture": {"t2i": 2, "grey": 1}} | WAYS[way]
    )
    table = table_of([opened], [stage], 0.0)
    plan, share = plan_of(table, stage, 0, shuffle=shuffle), Shares(ranks // 2, ranks, set())
    window, step = Window(BYTES, 1 << 30), 60
    due: list[SampleRef] = []
    while len(due) < 1500:
        for draw in share.take(plan.step(step)):
            due.append(table[draw.sample])
            window.add(len(due) - 1, due[-1])
        step += 1
    count, served = 0, set[int]()
    for number, ref in enumerate(due):
        if number not in served:
            served.update(window.take(number, ref, 1 << 30)[1])
            count += 1
    return count / len(due)


@pytest.mark.parametrize(
    ("way", "ranks", "most"),
    [("plain", 1, 0.1), ("plain", 4, 0.25), ("buckets", 1, 0.2), ("packs", 1, 0.5), ("packs", 4, 0.25)],
)
def test_neighbours_are_due_together(large: corpus.Corpus, way: str, ranks: int, most: float) -> None:
    together = reads(large, way, Shuffle(block=32, window=2048), ranks)
    apart = reads(large, way, Shuffle(block=1, window=2048), ranks)
    assert together < most and together < 0.65 * apart


def test_a_larger_block_is_read_in_fewer_pieces(large: corpus.Corpus) -> None:
    found = [reads(large, "plain", Shuffle(block=block, window=4096), 1) for block in (1, 4, 16, 64)]
    assert found == sorted(found, reverse=True) and found[-1] < found[0] / 4


def test_a_batch_is_still_of_samples_from_everywhere(large: corpus.Corpus) -> None:
    stage = Stage(name="one", resolution=256, steps=9, lr=1, mixture={"t2i": 1}, batch=64)
    plan = plan_of(table_of([large], [stage], 0.0), stage, 0, shuffle=Shuffle(block=32, window=2048))
    for step in range(0, 90, 10):
        samples = np.array([draw.sample for draw in plan.step(step)])
        assert len(set((samples // 64).tolist())) > 40 and np.ptp(samples) > ROWS / 2


@pytest.mark.parametrize("way", WAYS)
def test_each_sample_comes_as_often_as_the_others(large: corpus.Corpus, way: str) -> None:
    """The order in blocks leaves none out: in three epochs each is drawn three times, or is about to be."""
    stage = Stage.model_validate(
        {"name": "one", "resolution": 256, "steps": 9, "lr": 1, "mixture": {"t2i": 1, "grey": 1}} | WAYS[way]
    )
    plan = plan_of(table_of([large], [stage], 0.0), stage, 0, shuffle=Shuffle(block=32, window=2048))
    drawn, step = Counter[int](), 0
    while drawn.total() < 3 * ROWS:
        drawn.update(draw.sample for draw in plan.step(step))
        step += 1
    assert len(drawn) == ROWS and max(drawn.values()) <= 4
    # packs leave out one of some hundred
    assert sum(count < 2 for count in drawn.values()) <= (0.001 * ROWS if way == "packs" else 0)
