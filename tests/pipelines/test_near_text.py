"""Near-duplicate texts: against brute force, and on what the rule promises."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from x2i.pipelines.annotators._texts import PERMUTATIONS, minhash, normalise, shingles
from x2i.pipelines.select.dedup import NearDuplicates
from x2i.pipelines.select.near_text import near_texts

WORDS = [a + b for a in ("mo", "ta", "ri", "ken", "sul", "va") for b in ("na", "lo", "pir", "dex", "um", "shi", "ga")]


def signature(text: str) -> np.ndarray:
    return minhash(shingles(normalise(text), 5, words=False))


def captions(count: int, seed: int = 0) -> list[str]:
    """Captions of which about a half are copies of earlier ones with words changed, dropped or added."""
    generator = np.random.default_rng(seed)
    out: list[list[str]] = []
    for _ in range(count):
        if out and generator.random() < 0.5:
            words = list(out[int(generator.integers(len(out)))])
            for _ in range(int(generator.integers(0, 4))):
                at = int(generator.integers(len(words)))
                words[at : at + 1] = [[], [str(generator.choice(WORDS))], [words[at], "and"]][
                    generator.integers(3)
                ] or []
                words = words or ["one"]
        else:
            words = generator.choice(WORDS, int(generator.integers(6, 20))).tolist()
        out.append(words)
    return [" ".join(w) for w in out]


def brute_force(signatures: np.ndarray, similarity: float) -> tuple[list[int], list[int], list[int]]:
    """The rule as it is written, over every survivor."""
    kept = np.empty(len(signatures), np.int64)
    count, dropped, survivor, distance = 0, [], [], []
    small = signatures.astype(np.uint16)  # a screen: equal entries stay equal
    for i in range(len(signatures)):
        same = (small[kept[:count]] == small[i]).sum(axis=1)
        for k in np.flatnonzero(same >= similarity * PERMUTATIONS):
            exact = int((signatures[kept[k]] == signatures[i]).sum())
            if exact >= similarity * PERMUTATIONS - 1e-9:
                dropped.append(i)
                survivor.append(int(kept[k]))
                distance.append(PERMUTATIONS - exact)
                break
        else:
            kept[count] = i
            count += 1
    return dropped, survivor, distance


def lists(found: NearDuplicates) -> tuple[list[int], list[int], list[int]]:
    return found.dropped.tolist(), found.survivor.tolist(), found.distance.tolist()


def test_ten_thousand_texts_as_brute_force_finds_them() -> None:
    signatures = np.stack([signature(t) for t in captions(10_000)])
    tracemalloc.start()
    found = near_texts(signatures, 0.8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lists(found) == brute_force(signatures, 0.8)
    assert 2000 < len(found.dropped) < 6000
    assert peak < 5 * signatures.nbytes


@pytest.mark.parametrize("similarity", [0.51, 0.6, 0.7, 0.9, 1.0])
def test_every_threshold_misses_none(similarity: float) -> None:
    signatures = np.stack([signature(t) for t in captions(800, seed=1)])
    found = near_texts(signatures, similarity)
    assert lists(found) == brute_force(signatures, similarity)
    assert len(found.dropped)


def test_places_that_agree_may_lie_anywhere() -> None:
    """The worst case for bands: differences spread so that every band but one has one."""
    generator = np.random.default_rng(2)
    base = generator.integers(2**32, size=PERMUTATIONS, dtype=np.uint32)
    for most, similarity in ((25, 0.8), (12, 0.9), (38, 0.7)):
        other = base.copy()
        width = PERMUTATIONS // (most + 1)
        other[np.arange(most) * width] ^= 1
        assert lists(near_texts(np.stack([base, other]), similarity)) == ([1], [0], [most])
        other[-1] ^= 1  # one more
        assert lists(near_texts(np.stack([base, other]), similarity)) == ([], [], [])


def test_a_dropped_text_takes_none_with_it() -> None:
    generator = np.random.default_rng(3)
    best = generator.integers(2**32, size=PERMUTATIONS, dtype=np.uint32)
    middle, far = best.copy(), best.copy()
    middle[:20] ^= 1
    far[:40] ^= 1
    found = near_texts(np.stack([best, middle, far, middle]), 0.8)
    assert lists(found) == ([1, 3], [0, 0], [20, 20])  # `far` is near `middle`, which is gone


def test_rows_without_a_text_are_near_nothing() -> None:
    one, two = signature("a brown dog runs in a field"), signature("two cats sleep on a mat")
    column = pa.array([None, one.tolist(), None, two.tolist(), one.tolist()], pa.list_(pa.uint32(), PERMUTATIONS))
    chunks = pa.chunked_array([column[:3], column[3:]])
    for given in (column, chunks, column.cast(pa.list_(pa.uint32()))):
        assert lists(near_texts(given, 0.8)) == ([4], [1], [0])
    assert lists(near_texts(column[:1], 0.8)) == ([], [], [])
    assert lists(near_texts(pa.chunked_array([], column.type), 0.8)) == ([], [], [])
    assert lists(near_texts(np.empty((0, PERMUTATIONS), np.uint32), 0.8)) == ([], [], [])


def test_many_copies_cost_no_pairs() -> None:
    signatures = np.tile(signature("a brown dog runs in a field"), (50_000, 1))
    signatures[::5_000] = signature("two cats sleep on a mat")
    found = near_texts(signatures, 0.8)
    assert len(found.dropped) == 49_998
    assert set(found.survivor.tolist()) == {0, 1}


def test_thresholds_that_bands_cannot_serve_are_refused() -> None:
    for similarity in (0.5, 0.0, 1.1):
        with pytest.raises(ValueError, match=r"above 0\.5"):
            near_texts(np.empty((0, PERMUTATIONS), np.uint32), similarity)
