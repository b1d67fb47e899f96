"""What packing is made of: lengths as a model has them, classes of them, bins, permutations of many places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from tests.trainer.test_packing import row, stage
from x2i.corpus.manifest import MADE
from x2i.trainer.bins import LEFT, balanced, filled, fitted, most, placed, repair
from x2i.trainer.classes import segments
from x2i.trainer.lengths import Fit, Lengths, Measure, calibrate
from x2i.trainer.order import permuted, permuted_all, round_keys


def test_calibration_finds_what_a_tokenizer_makes_of_the_estimate() -> None:
    random = np.random.default_rng(0)
    estimate = random.integers(5, 400, 600).astype(float)
    real = np.rint(1.2 * estimate + 3 + random.normal(0, 0.8, 600) * np.sqrt(estimate))
    fit = calibrate(list(zip(estimate, real, strict=True)))
    assert fit.slope == pytest.approx(1.2, abs=0.02)
    assert fit.intercept == pytest.approx(3, abs=1)
    assert fit.spread == pytest.approx(0.8, rel=0.1)
    assert calibrate([]) == calibrate([(5, 9)] * 7) == Fit()
    assert calibrate([(10, 15)] * 20) == Fit(1.5, 0, 0)
    falling = calibrate([(n, 100 - n) for n in range(1, 50)])
    assert falling.slope > 0 and falling.intercept == 0


def test_lengths_are_those_of_the_model() -> None:
    rows = [row(1, "t2i", 10), row(2, "few", 20, [(9, 9), (9, 9)]), row(3, "chat", 30, [(1200, 600), (100, 50)], None)]
    of = stage(resolution=256, chat_resolution=300)
    lengths = Lengths(Fit(2, 1), Fit(3, 2), lambda width, height, chat: 7 if not chat else width + height, 5, 3, 11, 1)
    found = Measure(of, lengths)(pa.Table.from_pylist(rows, MADE))
    chat = 11 + 92 + (600 + 300 + 5) + (100 + 50 + 5)
    assert found.shown.tolist() == [11 + 21 + 7 + 3, 11 + 41 + 7 + 3 + 2 * (7 + 5), chat]
    assert found.bare.tolist() == [11 + 1 + 7 + 3, 11 + 1 + 7 + 3, chat]


def test_a_preference_takes_what_both_its_conversations_take() -> None:
    rows = [row(n, "chat", 30, [(100, 50)] * n, None) | {"rejected_tokens": n * 20 or None} for n in (0, 1, 2)]
    of = stage(preference={}, chat_resolution=300)
    lengths = Lengths(said=Fit(3, 2), picture=lambda width, height, chat: width + height, per_document=11, answers=2)
    lengths = replace(lengths, per_image=5, several=4.5)
    for told in (True, False):  # in corpora of earlier builds it is taken to be as long
        table = pa.Table.from_pylist(rows, MADE)
        found = Measure(of, lengths)(table if told else table.drop_columns(["rejected_tokens"]))
        text = [3 * (30 + other) + 2 for other in ((30, 20, 40) if told else (30,) * 3)]
        assert found.shown.tolist() == [22 + text[0], 22 + text[1] + 2 * 155, 22 + text[2] + 4 * 155 + 2 * 9]
    cut = replace(lengths, said_most=30, chat_most=200)
    assert Measure(of, cut)(pa.Table.from_pylist(rows, MADE)).shown.tolist() == [22 + 60, 22 + 60 + 300, 400]


def test_texts_that_are_cut_take_what_is_kept_of_them() -> None:
    rows = [row(1, "t2i", 10), row(2, "few", 900, [(9, 9), (9, 9)]), row(3, "chat", 900, [(100, 50)], None)]
    lengths = Lengths(picture=lambda width, height, chat: 7, per_image=5, text_most=40, said_most=60)
    found = Measure(stage(), lengths)(pa.Table.from_pylist(rows, MADE))
    assert found.shown.tolist() == [10 + 7, 40 + 3 * 7, 60 + 7]
    assert found.doubt == pytest.approx([0.49 * 10, 0, 0])  # how long they are is certain
    found = Measure(stage(), replace(lengths, chat_most=50))(pa.Table.from_pylist(rows, MADE))
    assert found.shown.tolist() == [10 + 7, 40 + 3 * 7, 50]


def test_many_permutations_at_once_are_those_of_one_at_a_time() -> None:
    sizes = np.repeat([1, 2, 7, 64, 1000, 70_001], 64)
    places = np.concatenate([np.random.default_rng(0).integers(0, n, 64) for n in (1, 2, 7, 64, 1000, 70_001)])
    names = [("a", place % 5) for place in range(len(sizes))]
    keys = np.array([round_keys(*name) for name in names], np.uint64)
    found = permuted_all(places, sizes, keys)
    assert found.tolist() == [permuted(int(p), int(n), *k) for p, n, k in zip(places, sizes, names, strict=True)]


def test_segments_leave_the_least_spread() -> None:
    assert segments(np.array([1, 1, 2, 9, 10, 50]), 3) == (2, 10)
    assert segments(np.array([4.0, 4.0]), 3) == ()
    values = np.random.default_rng(0).lognormal(3, 1, 20_000)
    cuts = segments(values, 8)
    assert len(cuts) == 7 and list(cuts) == sorted(cuts)

    def spread(ends: Sequence[float]) -> float:
        place = np.searchsorted(ends, values)
        mean = np.bincount(place, values) / np.bincount(place)
        return float(((values - mean[place]) ** 2).sum())

    assert spread(cuts) < 0.4 * spread(np.quantile(values, np.arange(1, 8) / 8).tolist())


def test_bins_are_mended_by_exchanges() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(266, 377, 620)
    for home in (balanced(lengths, 100), filled(lengths, 100, 2048)):
        assert repair(lengths, home, 100, 2048)
        assert np.bincount(home, lengths, 100).max() <= 2048 and len(home) == 620
    wild = placed(lengths, 100, 2048, random.integers(0, 100, 620))
    kept = wild >= 0
    assert kept.sum() >= 615 and np.bincount(wild[kept], lengths[kept], 100).max() <= 2048
    assert not repair(np.full(8, 300), balanced(np.full(8, 300), 1), 1, 2048)


def test_what_does_not_fit_is_left_out_and_not_more() -> None:
    lengths = np.array([900, 700, 500, 300, 300, 200, 100])  # 3,000 for 2 bins of 1,400
    home = placed(lengths, 2, 1400, balanced(lengths, 2))
    kept = home >= 0
    assert np.bincount(home[kept], lengths[kept], 2).max() <= 1400 and lengths[~kept].sum() <= 300
    assert np.count_nonzero(placed(np.full(17, 300), 2, 2048, np.zeros(17, int)) < 0) == 5


def test_as_many_items_are_taken_as_fit_each_time() -> None:
    random = np.random.default_rng(0)
    fixed = most(lambda count: np.full(count, 288), 50, 2048, 360)
    assert fixed.count == 7 * 50 and np.bincount(fixed.home).tolist() == [7] * 50 and fixed.fill == 350 * 288

    def drawn(count: int) -> np.ndarray:
        return np.asarray(266 + 1111 * (np.arange(count) + random.random(count)) / count).astype(int)

    found = most(drawn, 120, 2048, 400)
    assert found.fill >= 0.985 * 120 * 2048
    left = []
    for _ in range(4):
        lengths = drawn(found.count)
        left.append(np.mean(placed(lengths, 120, 2048, fitted(found.home, lengths, 120)) < 0))
    assert np.mean(left) < 4 * LEFT
    assert most(lambda count: np.full(count, 3000), 5, 2048, 4).fill == 0


def test_texts_that_were_counted_are_certain() -> None:
    rows = [row(1, "t2i", 10), row(2, "few", 20, [(9, 9), (9, 9)]), row(3, "chat", 900, [(100, 50)], None)]
    lengths = Lengths(picture=lambda width, height, chat: 7, per_image=5, said_most=60)
    lengths = replace(lengths, counted=np.array([99, 99, -1, 31, 700], np.int32))
    found = Measure(stage(), lengths)(pa.Table.from_pylist(rows, MADE), first=2)
    assert found.shown.tolist() == [10 + 7, 31 + 3 * 7 + 2 * 5, 60 + 7]
    assert found.doubt == pytest.approx([0.49 * 10, 0, 0])
