"""Near-duplicate removal against its definition, by brute force; planted pairs at every distance are found."""

import numpy as np
import pytest

from x2i.pipelines.select import dedup
from x2i.pipelines.select.dedup import near_duplicates


def by_definition(hashes: list[int], bits: int) -> dict[int, tuple[int, int]]:
    """Row -> (survivor, distance), straight from the docstring's words."""
    kept: list[int] = []
    fallen: dict[int, tuple[int, int]] = {}
    for i, h in enumerate(hashes):
        near = [(k, (hashes[k] ^ h).bit_count()) for k in kept if (hashes[k] ^ h).bit_count() <= bits]
        if near:
            fallen[i] = near[0]
        else:
            kept.append(i)
    return fallen


def planted(count: int, seed: int) -> list[int]:
    """Random hashes, some of them a few flipped bits away from another."""
    rng = np.random.default_rng(seed)
    hashes = [int(h) for h in rng.integers(0, 2**64, count, dtype=np.uint64)]
    for i in range(count // 2, count):
        near = hashes[int(rng.integers(0, count // 2))]
        for bit in rng.choice(64, int(rng.integers(0, 12)), replace=False):
            near ^= 1 << int(bit)
        hashes[i] = near
    return hashes


@pytest.mark.parametrize("bits", [0, 1, 4, 8, 16])
@pytest.mark.parametrize("block", [1, 7, 256])
def test_equals_the_definition(monkeypatch: pytest.MonkeyPatch, bits: int, block: int) -> None:
    monkeypatch.setattr(dedup, "BLOCK", block)
    hashes = planted(300, seed=bits)
    found = near_duplicates(np.array(hashes, np.uint64), bits)
    got = {int(d): (int(s), int(k)) for d, s, k in zip(found.dropped, found.survivor, found.distance, strict=True)}
    assert got == by_definition(hashes, bits)


def test_planted_pairs_at_each_distance_are_found_up_to_the_bound() -> None:
    base = 0x0123456789ABCDEF
    for distance in range(65):
        pair = np.array([base, base ^ ((1 << distance) - 1)], np.uint64)
        for bits in (0, 6, 31, 64):
            assert len(near_duplicates(pair, bits).dropped) == (distance <= bits)


def test_chains_are_not_swallowed() -> None:
    """A~B and B~C, but not A~C: B falls to A, and C, which no survivor resembles, stays."""
    found = near_duplicates(np.array([0b0000, 0b0011, 0b1111], np.uint64), 2)
    assert found.dropped.tolist() == [1]
    assert found.survivor.tolist() == [0]


def test_nothing_in_nothing_out() -> None:
    assert len(near_duplicates(np.array([], np.uint64), 6).dropped) == 0
