"""The plan: exact mixture, whole epochs, random access, and nothing depends on what should not matter."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from x2i.base.errors import RecipeError
from x2i.trainer.config import Shuffle
from x2i.trainer.order import Order, permuted
from x2i.trainer.plan import StagePlan, round_mixture


@dataclass
class Rows:
    """Samples of one task, numbered from `first`, in row groups with so many of them."""

    counts: np.ndarray
    sizes: np.ndarray
    first: int
    name: str

    def at(self, entry: int, rank: int) -> int:
        assert 0 <= rank < self.counts[entry]
        return self.first + int(self.counts[:entry].sum()) + rank

    def task(self, sample: int) -> str:
        assert self.first <= sample < self.first + self.counts.sum()
        return self.name


def rows(first: int, name: str, *counts: int) -> Rows:
    return Rows(np.array(counts, int), np.full(len(counts), 10), first, name)


SAMPLES = {"a": rows(0, "a", 3, 4), "b": rows(7, "b", 5, 1, 7), "c": rows(20, "c", 1), "d": rows(0, "d")}
MIXTURE = {"a": 0.5, "b": 0.3, "c": 0.2}


def plan(batch: int = 4, seed: int = 0, stage: str = "one", window: int = 40, **mixture: float) -> StagePlan:
    return StagePlan(SAMPLES, mixture or MIXTURE, batch, seed, stage, window)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 1025])
def test_permutation_visits_every_place_once(size: int) -> None:
    assert sorted(permuted(i, size, "k", 1) for i in range(size)) == list(range(size))


def test_permutations_of_other_keys_differ_and_look_shuffled() -> None:
    orders = [[permuted(i, 512, "k", epoch) for i in range(512)] for epoch in range(2)]
    for order in orders:
        assert np.mean(np.array(order) == np.arange(512)) < 0.05
        assert abs(np.corrcoef(order, np.arange(512))[0, 1]) < 0.15
    assert np.mean(np.array(orders[0]) == np.array(orders[1])) < 0.05


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [
        ([1, 1, 1], 10, [4, 3, 3]),
        ([0.5, 0.3, 0.2], 40, [20, 12, 8]),
        ([1e6, 1, 1], 8, [6, 1, 1]),
        ([0.26, 0.26, 0.48], 4, [1, 1, 2]),
    ],
)
def test_mixture_is_rounded_to_whole_draws(weights: list[float], total: int, expected: list[int]) -> None:
    assert round_mixture(weights, total) == expected


def test_mixture_is_exact_in_every_window() -> None:
    p = plan()
    for window in range(3):
        dealt = Counter(p.draw(window * 40 + i).task for i in range(40))
        assert dealt == {"a": 20, "b": 12, "c": 8}


def test_each_epoch_of_a_task_visits_every_sample_once_each_time_in_another_order() -> None:
    p = plan()
    seen = [d.sample for i in range(400) if (d := p.draw(i)).task == "b"]
    epochs = [seen[k : k + 13] for k in range(0, len(seen) - 13, 13)]
    assert len(epochs) > 5
    for epoch in epochs:
        assert sorted(epoch) == list(range(7, 20))
    assert len({tuple(e) for e in epochs}) == len(epochs)


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        ({"span": 1}, 1),
        ({"span": 10}, 1),
        ({"span": 30}, 3),
        ({"span": 95}, 10),
        ({"open_samples": 1}, 1),
        ({"open_samples": 16}, 16),
        ({}, 60),
    ],
)
def test_an_epoch_is_whole_however_short_its_runs_are_and_each_run_keeps_to_its_row_groups(
    limits: dict[str, int], most: int
) -> None:
    counts = np.random.default_rng(0).integers(1, 9, 60)
    samples = Rows(counts, np.full(60, 10), 0, "a")
    p = StagePlan({"a": samples}, {"a": 1}, 1, 0, "one", 50, **limits)
    total = int(counts.sum())
    home = np.repeat(np.arange(60), counts)
    orders = []
    for epoch in range(2):
        order = [p.draw(epoch * total + i).sample for i in range(total)]
        assert sorted(order) == list(range(total))
        open_groups, last = 0, {int(home[s]): i for i, s in enumerate(order)}
        first = {int(home[s]): i for i, s in reversed(list(enumerate(order)))}
        for i in range(total):
            open_groups = max(open_groups, sum(first[g] <= i <= last[g] for g in range(60)))
        assert open_groups <= most
        assert np.corrcoef(order, np.arange(total))[0, 1] < 0.4
        orders.append(order)
    assert orders[0] != orders[1]


def test_any_step_can_be_had_alone() -> None:
    sequential = [plan().step(n) for n in range(30)]
    p = plan()
    for n in (29, 0, 17, 11, 28):
        assert p.step(n) == sequential[n]
    assert plan().step(25) == sequential[25]


def test_the_stream_does_not_depend_on_the_batch() -> None:
    one = [d for n in range(24) for d in plan(batch=2).step(n)]
    other = [d for n in range(6) for d in plan(batch=8).step(n)]
    assert one == other


def test_seed_and_stage_change_the_order() -> None:
    first = [d.sample for d in plan(batch=40).step(0)]
    assert first != [d.sample for d in plan(batch=40, seed=1).step(0)]
    assert first != [d.sample for d in plan(batch=40, stage="two").step(0)]


def test_scaling_the_weights_or_the_order_of_keys_changes_nothing() -> None:
    assert plan(b=3, a=5, c=2).step(3) == plan().step(3)


def test_spares_are_other_samples_of_the_same_task() -> None:
    p = plan()
    draw = next(d for i in range(40) if (d := p.draw(i)).task == "a")
    spares = [p.spare(draw, attempt) for attempt in range(1, 7)]
    assert all(s.task == "a" and s.index == draw.index for s in spares)
    assert p.spare(draw, 1) == spares[0]
    assert len({s.sample for s in spares}) > 1


def test_a_task_without_samples_is_refused_and_the_remedy_named() -> None:
    with pytest.raises(RecipeError, match="no training samples of deblurr; they have a, b, c"):
        plan(a=1, deblurr=1)
    with pytest.raises(RecipeError, match="no training samples of d; they have a, b, c"):
        plan(d=1)


@pytest.mark.parametrize(
    ("size", "block", "window"),
    [(5, 64, 4), (64, 64, 16), (1000, 8, 128), (1003, 8, 250), (1003, 16, 500), (4097, 64, 2048), (3000, 64, 4096)],
)
def test_an_order_in_blocks_visits_every_place_once_and_is_the_same_at_a_point_and_as_a_whole(
    size: int, block: int, window: int
) -> None:
    order = Order.of(size, block, window)
    whole = order.all("k", 1)
    assert sorted(whole.tolist()) == list(range(size))
    assert [order.at(place, "k", 1) for place in range(0, size, 7)] == whole[::7].tolist()
    assert whole.tolist() != order.all("k", 2).tolist()


def test_neighbours_of_a_block_come_one_after_the_other_within_the_window_and_blocks_are_mixed() -> None:
    size, block, window = 20_000, 32, 2048
    whole = Order.of(size, block, window).all("k")
    when = np.argsort(whole)
    blocks = when[: size // block * block].reshape(-1, block)
    steps = np.diff(blocks, axis=1)
    assert np.quantile(steps, 0.9) == np.quantile(steps, 0.1) == window // block + 1
    assert np.median(np.ptp(blocks, axis=1)) == pytest.approx(window, rel=0.05)
    for start in (0, 7000, size - 64):  # 64 draws in a row are of 64 blocks, from everywhere
        homes = whole[start : start + 64] // block
        assert len(set(homes.tolist())) == 64
        assert np.ptp(homes) > 0.8 * size / block


def test_neighbours_are_drawn_within_the_window_whatever_else_is_in_the_mixture() -> None:
    counts = np.full(40, 100)
    of = {name: Rows(counts, np.full(40, 200), first, name) for name, first in (("a", 0), ("b", 4000))}
    shuffle = Shuffle(block=8, window=400)
    p = StagePlan(of, {"a": 3, "b": 1}, 8, 0, "one", 40, shuffle=shuffle)
    for name, first in (("a", 0), ("b", 4000)):
        when = {d.sample: d.index for d in (p.draw(i) for i in range(5000)) if d.task == name and d.position < 4000}
        gaps = [abs(when[s + 1] - when[s]) for s in range(first, first + 3999) if s in when and s + 1 in when]
        assert len(gaps) > 900 and np.quantile(gaps, 0.75) < 100
    alone = StagePlan(of, {"a": 3, "b": 1}, 8, 0, "one", 40, shuffle=Shuffle(block=1, window=400))
    when = {d.sample: d.index for d in (alone.draw(i) for i in range(5000)) if d.task == "a" and d.position < 4000}
    assert np.median([abs(when[s + 1] - when[s]) for s in range(3999) if s in when and s + 1 in when]) > 500
