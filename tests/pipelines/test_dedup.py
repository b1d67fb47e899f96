"""Near-duplicate removal against its definition, by brute force; planted pairs at every distance are found."""

import tracemalloc

import numpy as np
import pytest

from x2i.pipelines.select import dedup, hamming
from x2i.pipelines.select.dedup import near_duplicates
from x2i.pipelines.select.hamming import pairs_between, pairs_within

Fallen = dict[int, tuple[int, int]]


def by_definition(hashes: np.ndarray, bits: int) -> Fallen:
    """Row -> (survivor, distance), straight from the docstring's words."""
    kept = np.empty(len(hashes), np.int64)
    count = 0
    fallen: Fallen = {}
    for i, h in enumerate(hashes):
        distance = np.bitwise_count(hashes[kept[:count]] ^ h)
        near = np.flatnonzero(distance <= bits)
        if len(near):
            fallen[i] = int(kept[near[0]]), int(distance[near[0]])
        else:
            kept[count] = i
            count += 1
    return fallen


def found(hashes: np.ndarray, bits: int) -> Fallen:
    got = near_duplicates(hashes, bits)
    assert (np.diff(got.dropped) > 0).all()
    return {int(d): (int(s), int(k)) for d, s, k in zip(got.dropped, got.survivor, got.distance, strict=True)}


def random(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)


def around(centres: np.ndarray, count: int, flips: int, seed: int = 0) -> np.ndarray:
    """Hashes up to `flips` bits away from some of `centres`."""
    rng = np.random.default_rng(seed)
    out = centres[rng.integers(0, len(centres), count)]
    for _ in range(flips):
        out = out ^ np.where(rng.random(count) < 0.7, np.uint64(1) << rng.integers(0, 64, count, dtype=np.uint64), 0)
    return out.astype(np.uint64)


def halves(count: int) -> np.ndarray:
    """Half of them vary in the upper bits only, the others in the lower ones: buckets of many that differ."""
    hashes = random(count)
    hashes[::2] &= np.uint64(0xFFFFFFFF)
    hashes[1::2] &= np.uint64(0xFFFFFFFF00000000)
    return hashes


CASES = {
    "random": random(3000),
    "planted": np.concatenate([random(2000), around(random(2000), 1000, 10)]),
    "dense": around(random(3), 2000, 5),
    "equal": np.concatenate([np.zeros(1000, np.uint64), around(np.zeros(1, np.uint64), 1000, 12)]),
    "narrow": random(3000) & np.uint64(0xFFFF0000000000FF),
    "halves": halves(3000),
    "one": random(1),
    "none": random(0),
}


@pytest.fixture(params=["as it chooses", "1 of the blocks", "3 of the blocks", "little memory"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small inputs would be compared in pairs: here they go the ways of large ones."""
    way: str = request.param
    if way != "as it chooses":
        chosen = 3 if way[0] == "3" else 1

        def cut(a: np.ndarray, b: np.ndarray, bits: int) -> hamming._Cut:
            return hamming._deal(a, b, bits, chosen)[0] if min(len(a), len(b)) > 40 else hamming._ALL

        monkeypatch.setattr(hamming, "_choose_between", cut)
        monkeypatch.setattr(hamming, "_choose_within", lambda a, bits: cut(a, a, bits))
    if way == "little memory":
        for name, value in {"CELLS": 1 << 9, "SLICE": 300, "HITS": 50, "HEAVY": 64}.items():
            monkeypatch.setattr(hamming, name, value)
        for name, value in {"PAIRS_PER_HASH": 0, "PAIRS": 1000, "ROUNDS": 1, "CHUNK": 100}.items():
            monkeypatch.setattr(dedup, name, value)
    return way


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bits", [0, 1, 4, 8])
def test_equals_the_definition(way: str, case: str, bits: int) -> None:
    assert found(CASES[case], bits) == by_definition(CASES[case], bits)


@pytest.mark.parametrize("bits", [16, 33, 63, 64])
def test_equals_the_definition_at_bounds_that_no_band_helps_with(bits: int) -> None:
    assert found(CASES["planted"], bits) == by_definition(CASES["planted"], bits)


def test_enough_hashes_for_bands_to_be_chosen() -> None:
    """And they are: the estimate of the work would have to be far off not to."""
    hashes = np.concatenate([random(16_000), around(random(16_000), 4_000, 9)])
    assert hamming._choose_within(hashes, 6).chosen
    assert found(hashes, 6) == by_definition(hashes, 6)


def test_planted_pairs_at_each_distance_are_found_up_to_the_bound() -> None:
    base = 0x0123456789ABCDEF
    for distance in range(65):
        pair = np.array([base, base ^ ((1 << distance) - 1)], np.uint64)
        for bits in (0, 6, 31, 64):
            assert len(near_duplicates(pair, bits).dropped) == (distance <= bits)


@pytest.mark.parametrize("bits", [3, 6])
def test_planted_pairs_at_each_distance_are_found_among_many(bits: int) -> None:
    rng = np.random.default_rng(bits)
    crowd = random(60_000)
    planted, distances = crowd[:1400].copy(), np.arange(1400) % (bits + 3)
    for i, distance in enumerate(distances.tolist()):
        for bit in rng.choice(64, distance, replace=False).tolist():
            planted[i] ^= np.uint64(1 << bit)
    got = found(np.concatenate([crowd, planted]), bits)
    for i, distance in enumerate(distances.tolist()):
        if distance <= bits:
            assert got[len(crowd) + i] == (i, distance)
        else:
            assert len(crowd) + i not in got


def test_chains_are_not_swallowed() -> None:
    """A~B and B~C, but not A~C: B falls to A, and C, which no survivor resembles, stays."""
    assert found(np.array([0b0000, 0b0011, 0b1111], np.uint64), 2) == {1: (0, 2)}


def test_a_chain_longer_than_the_rounds_of_judging() -> None:
    """Gray code: each differs in one bit from the next, and is judged only when the one before it is."""
    numbers = np.arange(4000, dtype=np.uint64)
    hashes = numbers ^ (numbers >> np.uint64(1))
    assert found(hashes, 1) == by_definition(hashes, 1)


@pytest.mark.parametrize("what", ["equal", "one cluster"])
def test_memory_and_time_where_all_are_near_each_other(what: str) -> None:
    """100,000 hashes have five thousand million pairs; they would take 40 GB."""
    hashes = np.zeros(100_000, np.uint64) if what == "equal" else around(random(1), 100_000, 6)
    tracemalloc.start()
    got = near_duplicates(hashes, 6)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    stays = np.setdiff1d(np.arange(len(hashes)), got.dropped)
    assert peak < 120e6
    assert (got.distance <= 6).all()
    assert np.isin(got.survivor, stays).all()
    apart = np.bitwise_count(hashes[stays][:, None] ^ hashes[stays]) + 64 * np.eye(len(stays), dtype=int)
    assert (apart > 6).all()


@pytest.mark.parametrize("case", ["planted", "equal", "narrow", "halves"])
def test_all_pairs_of_two_sets(way: str, case: str) -> None:
    queries, hashes = CASES[case][::3], CASES[case][1::4]
    got = [np.stack([q, h, d]) for q, h, d in pairs_between(queries, hashes, 5)]
    together = np.concatenate(got, axis=1).T
    apart = np.bitwise_count(queries[:, None] ^ hashes)
    expected = np.argwhere(apart <= 5)
    assert sorted(map(tuple, together[:, :2].tolist())) == sorted(map(tuple, expected.tolist()))
    assert (together[:, 2] == apart[together[:, 0], together[:, 1]]).all()


def test_all_pairs_of_one_set_come_once(way: str) -> None:
    hashes = np.unique(CASES["planted"])
    got = [p for i, j in pairs_within(hashes, 7) for p in zip(i.tolist(), j.tolist(), strict=True)]
    expected = np.argwhere(np.triu(np.bitwise_count(hashes[:, None] ^ hashes) <= 7, 1))
    assert sorted(got) == sorted(map(tuple, expected.tolist()))
