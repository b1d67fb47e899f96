"""Pictures of one subject by features: planted ones are found, whatever the order; crowds and copies are no pairs."""

from __future__ import annotations

import numpy as np
import pytest

from x2i.pipelines.select import lookalikes as module
from x2i.pipelines.select.lookalikes import bound, lookalikes


def pool(seed: int = 0, loners: int = 300, subjects: int = 8, photos: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [N, 64] and labels: loners, half of them in one crowd (any two alike), and subjects with photographs."""
    rng = np.random.default_rng(seed)
    crowd = rng.normal(size=64)
    alone = rng.normal(size=(loners, 64))
    alone[::2] += 2.0 * crowd
    centres = rng.normal(size=(subjects, 64)) * 2.5
    shown = np.repeat(centres, photos, axis=0) + rng.normal(size=(subjects * photos, 64))
    labels = np.concatenate([np.arange(loners), loners + np.repeat(np.arange(subjects), photos)])
    return np.concatenate([alone, shown]).astype(np.float32), labels


def ids(count: int) -> list[str]:
    return [f"{i:064x}" for i in range(count)]


def test_planted_subjects_are_found_and_crowds_are_not() -> None:
    embeddings, labels = pool()
    found = lookalikes([embeddings], ids(len(labels)))
    assert found.least == bound(len(labels))
    right = labels[found.a] == labels[found.b]
    assert right.all()
    assert right.sum() > 0.6 * 8 * 6
    more = lookalikes([embeddings], ids(len(labels)), least=5.0)
    assert (labels[more.a] == labels[more.b]).sum() > 0.9 * 8 * 6
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    plain = unit @ unit.T
    crowd = plain[:300:2, :300:2][np.triu_indices(150, 1)]
    assert (crowd > np.min(plain[found.a, found.b])).mean() > 0.1  # a plain cosine would have paired them


def test_the_order_of_rows_and_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, labels = pool(1)
    names = ids(len(labels))

    def pairs(order: np.ndarray) -> dict[frozenset[str], float]:
        found = lookalikes([embeddings[order]], [names[i] for i in order], least=3.0)
        assert (found.a < found.b).all()
        return {
            frozenset((names[order[a]], names[order[b]])): s
            for a, b, s in zip(found.a, found.b, found.score, strict=True)
        }

    whole = pairs(np.arange(len(labels)))
    assert len(whole) > 50
    assert pairs(np.random.default_rng(2).permutation(len(labels))) == whole
    monkeypatch.setattr(module, "ROWS", 37)
    monkeypatch.setattr(module, "COLUMNS", 53)
    assert pairs(np.arange(len(labels))) == whole


def test_it_is_what_the_definition_says() -> None:
    embeddings, _ = pool(3, loners=60, subjects=4)
    count, neighbours, least = len(embeddings), 3, 2.0
    unit = embeddings.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosines = unit @ unit.T
    score = np.zeros((count, count))
    for i in range(count):
        others = np.delete(cosines[i], i)
        middle = np.median(others)
        spread = 1.4826 * np.median(np.abs(others - middle))
        z = (cosines[i] - middle) / spread
        score[i] += z / 2
        score[:, i] += z / 2
    np.fill_diagonal(score, -np.inf)
    best = [set(np.argsort(-row)[:neighbours].tolist()) for row in score]
    expected = {(i, j) for i in range(count) for j in best[i] if i < j and i in best[j] and score[i, j] >= least}
    found = lookalikes([embeddings], ids(count), neighbours, least)
    assert set(zip(found.a.tolist(), found.b.tolist(), strict=True)) == expected
    assert np.allclose(found.score, [score[a, b] for a, b in zip(found.a, found.b, strict=True)], atol=0.01)


def test_copies_are_no_partners_and_take_no_ones_place() -> None:
    embeddings, labels = pool(4)
    hashes = np.random.default_rng(0).integers(0, 2**63, len(labels)).astype(np.uint64)
    first = 300
    copies = np.repeat(embeddings[first : first + 1], 6, axis=0)
    everything = np.concatenate([embeddings, copies])
    near = np.concatenate([hashes, hashes[first] ^ (np.uint64(1) << np.arange(6, dtype=np.uint64))])
    found = lookalikes([everything], ids(len(everything)), hashes=near, near=2)
    mine = {int(b) for a, b in zip(found.a, found.b, strict=True) if a == first}
    assert mine
    assert max(mine) < len(labels)  # partners, and none of its copies
    same = [*ids(len(labels)), *[ids(first + 1)[-1]] * 6]
    found = lookalikes([everything], same)
    assert not any(same[a] == same[b] for a, b in zip(found.a, found.b, strict=True))


def test_two_kinds_of_features_and_small_pools() -> None:
    embeddings, labels = pool(5)
    noise = np.random.default_rng(9).normal(size=(len(labels), 16)).astype(np.float32)
    both = lookalikes([embeddings, embeddings], ids(len(labels)))
    one = lookalikes([embeddings], ids(len(labels)))
    assert np.array_equal(both.a, one.a)
    assert len(lookalikes([embeddings, noise], ids(len(labels))).a) < len(one.a)
    assert len(lookalikes([embeddings[:2]], ids(2)).a) == 0
    assert len(lookalikes([np.empty((0, 4), np.float32)], []).a) == 0
