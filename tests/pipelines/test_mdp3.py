"""Key frames: MDP3 against brute force over all subsets, written here from the paper's formulas, determinant by determinant."""

from __future__ import annotations

import itertools
import time

import cv2
import numpy as np
import pytest
import skimage.data

from x2i.pipelines.select.mdp3 import PAPER, REPOSITORY, greedy, mdp3, subsets, text_chunks

LAM = 0.2


def embeddings(seed: int, n: int, d: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """n frames on a random walk over the sphere, as a video's are (neighbours are alike), and a text."""
    rng = np.random.default_rng(seed)
    walk = rng.standard_normal(d) + np.cumsum(rng.standard_normal((n, d)) * 0.5, axis=0)
    query = rng.standard_normal(d)
    if seed % 2:  # a text close to some frames: then the segments' normalisers weigh something, too
        query = walk[n // 2] + 0.3 * query
    return (walk / np.linalg.norm(walk, axis=1, keepdims=True)).astype(np.float32), query.astype(np.float32)


def kernel(x: np.ndarray, y: np.ndarray, alphas: tuple[float, ...]) -> float:
    squared = float(((x.astype(float) - y.astype(float)) ** 2).sum())
    return sum(np.exp(-squared / (2 * a)) for a in alphas) / len(alphas)


def conditioned(frames: np.ndarray, query: np.ndarray, alphas: tuple[float, ...] = PAPER) -> np.ndarray:
    """L̃, whose determinant at S is the product of r^(2/λ) over S times det L_S."""
    query = query / np.linalg.norm(query)
    L = np.array([[kernel(a, b, alphas) for b in frames] for a in frames])
    r = np.array([kernel(f, query, alphas) for f in frames]) ** (1 / LAM)
    return r[:, None] * L * r[None]


def log_det(matrix: np.ndarray, at: list[int]) -> float:
    return float(np.linalg.slogdet(matrix[np.ix_(at, at)])[1])


def log_probability(L: np.ndarray, chosen: tuple[int, ...], segment: int) -> float:
    """Σ_t log P(S_t | S_{t-1}) = log det L̃ at both, less log det(L̃ at S_{t-1} and all of segment t, plus I on the latter)."""
    total, before = 0.0, []
    for start in range(0, len(L), segment):
        part = range(start, min(start + segment, len(L)))
        now = [i for i in chosen if i in part]
        ground = L[np.ix_([*before, *part], [*before, *part])]
        identity = np.diag([0.0] * len(before) + [1.0] * len(part))
        total += log_det(L, before + now) - float(np.linalg.slogdet(ground + identity)[1])
        before = now
    return total


def brute(L: np.ndarray, k: int, segment: int) -> list[int]:
    return list(max(itertools.combinations(range(len(L)), k), key=lambda s: log_probability(L, s, segment)))


@pytest.mark.parametrize("n", range(2, 11))
def test_of_ten_frames_and_fewer_it_finds_what_brute_force_finds(n: int) -> None:
    for seed in range(3):
        frames, query = embeddings(seed, n)
        L = conditioned(frames, query)
        for k in range(1, n):
            best = max(itertools.combinations(range(n), k), key=lambda s: log_det(L, list(s)))
            assert mdp3(frames, query, k) == list(best), (seed, k)


@pytest.mark.parametrize("segment", [1, 3, 4, 5, 9])
def test_with_several_segments_too(segment: int) -> None:
    for seed, k in itertools.product(range(4), (1, 2, 3, 5, 8)):
        frames, query = embeddings(seed, 10)
        assert mdp3(frames, query, k, segment) == brute(conditioned(frames, query), k, segment), (seed, k)


def test_with_the_repositorys_kernel_too() -> None:
    differs = 0
    for seed in range(20):
        frames, query = embeddings(seed, 9, d=4)
        found = mdp3(frames, query, 4, alphas=REPOSITORY)
        assert found == brute(conditioned(frames, query, REPOSITORY), 4, 9)
        differs += found != mdp3(frames, query, 4)
    assert differs  # so the choice of the variances is a choice


def naive_greedy(L: np.ndarray, given: list[int], part: range, most: int) -> list[int]:
    picks: list[int] = []
    for _ in range(most):
        rest = [i for i in part if i not in picks]
        picks.append(max(rest, key=lambda i: log_det(L, given + picks + [i])))
    return picks


def test_one_segment_of_the_published_algorithm_is_the_greedy_dpp_with_full_determinants() -> None:
    for seed in range(5):
        frames, query = embeddings(seed, 30)
        expected = sorted(naive_greedy(conditioned(frames, query), [], range(30), 8))
        assert mdp3(frames, query, 8, segment=30, exact=False) == expected
        assert greedy(frames, query, 8) == expected


def test_the_published_algorithm_with_segments_is_its_table_with_full_determinants() -> None:
    for seed, segment in itertools.product(range(8), (6, 7, 10)):  # 20 is a multiple of one of them
        frames, query = embeddings(seed, 20)
        L, k = conditioned(frames, query), 5
        cells: dict[int, tuple[int, ...]] = {0: ()}
        for end in range(segment, 20 + segment, segment):
            part = range(end - segment, min(end, 20))
            seen = L[: part.stop, : part.stop]
            after: dict[int, tuple[int, ...]] = {}
            for number, chosen in cells.items():
                before = [i for i in chosen if i >= part.start - segment]
                picks = naive_greedy(L, before, part, min(k - number, len(part)))
                for i in range(len(picks) + 1):
                    way = (*chosen, *sorted(picks[:i]))
                    old = after.get(len(way))
                    if old is None or log_probability(seen, way, segment) > log_probability(seen, old, segment):
                        after[len(way)] = way
            cells = after
        assert mdp3(frames, query, k, segment, exact=False) == list(cells[k]), (seed, segment)


def test_the_maximum_is_never_worse_than_the_published_algorithm() -> None:
    better = 0
    for seed in range(40):
        frames, query = embeddings(seed, 12, d=6)
        L = conditioned(frames, query)
        best = log_probability(L, tuple(mdp3(frames, query, 4, segment=6)), 6)
        published = log_probability(L, tuple(mdp3(frames, query, 4, segment=6, exact=False)), 6)
        assert best >= published - 1e-6
        better += best > published + 1e-6
    assert better  # which is why the maximum is sought where it can be


def test_photographs_a_pan_and_a_cut() -> None:
    """A long pan over one scene, four frames of another, and a still: the query's scene, and no frame twice."""

    def features(view: np.ndarray) -> np.ndarray:
        small = cv2.resize(view, (8, 8), interpolation=cv2.INTER_AREA).astype(np.float32).reshape(-1)
        return small - small.mean()

    cat, coffee, rocket = skimage.data.chelsea(), skimage.data.coffee(), skimage.data.rocket()
    views = [cat[50:250, x : x + 200] for x in range(0, 240, 8)]
    views += [coffee[100:300, x : x + 200] for x in range(200, 232, 8)]
    views += [rocket[100:300, 200:400]] * 14
    frames = np.stack([features(v) for v in views])
    assert len(frames) == 48
    for segment in (16, 48):
        chosen = mdp3(frames, features(coffee[100:300, 210:410]), 4, segment)
        assert chosen == sorted(set(chosen))
        scenes = ["cat" if i < 30 else "coffee" if i < 34 else "rocket" for i in chosen]
        assert scenes.count("coffee") >= 2 and scenes.count("rocket") <= 1
        relevance_only = mdp3(frames, features(coffee[100:300, 210:410]), 4, segment, lam=0.001)
        assert relevance_only == [30, 31, 32, 33]
        diverse = mdp3(frames, features(coffee[100:300, 210:410]), 4, segment, lam=1000)
        assert {"cat", "coffee", "rocket"} == {"cat" if i < 30 else "coffee" if i < 34 else "rocket" for i in diverse}


def test_equal_frames_are_no_obstacle() -> None:
    frames, query = embeddings(0, 12)
    still = np.repeat(frames[:1], 40, axis=0)
    assert mdp3(still, query, 6, 40) == mdp3(still[:12], query, 6, 12) == [0, 1, 2, 3, 4, 5]
    for segment, exact in itertools.product((5, 8), (False, "auto")):  # what was chosen two segments ago is forgotten
        assert len(set(mdp3(still, query, 6, segment, exact=exact))) == 6
    twice = np.repeat(frames, 2, axis=0)  # of each pair one, as long as there are others
    for exact in (False, "auto"):
        chosen = mdp3(twice, query, 8, 24, exact=exact)
        assert len({i // 2 for i in chosen}) == 8 and all(i % 2 == 0 for i in chosen)


def test_what_is_few_passes_and_what_is_wrong_is_refused() -> None:
    frames, query = embeddings(0, 10)
    assert mdp3(frames, query, 10) == mdp3(frames, query, 16) == list(range(10))
    assert mdp3(frames[:0], query, 3) == []
    chunks = np.stack([query, frames[3] * 7])
    mean = (query / np.linalg.norm(query) + frames[3]) / 2
    assert mdp3(frames, chunks, 3) == brute_at(frames, mean, 3)
    assert mdp3(frames.astype(np.float16) * 3, query * 9, 3) == mdp3(frames, query, 3)
    for wrong in ({"k": 0}, {"segment": 0}, {"lam": 0}, {"alphas": ()}, {"alphas": (0.0,)}):
        with pytest.raises(ValueError, match="above zero"):
            mdp3(frames, query, **{"k": 3, **wrong})
    with pytest.raises(ValueError, match="12 dimensions, the query 5"):
        mdp3(frames, query[:5], 3)
    for bad in (0.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="zero or not finite"):
            mdp3(np.vstack([frames, np.full((1, 12), bad)]), query, 3)
    with pytest.raises(ValueError, match="subsets"):
        mdp3(*embeddings(0, 128), 8, exact=True)


def brute_at(frames: np.ndarray, point: np.ndarray, k: int) -> list[int]:
    """Brute force with a query that is a point within the sphere: the mean of chunks is not made longer."""
    r = np.array([kernel(f, point, PAPER) for f in frames]) ** (1 / LAM)
    L = np.array([[kernel(a, b, PAPER) for b in frames] for a in frames]) * r[:, None] * r[None]
    return brute(L, k, len(frames))


def test_the_papers_sizes_take_a_fraction_of_a_second() -> None:
    frames, query = embeddings(1, 128, d=64)
    assert subsets(128, 8, 32) > 10**6 and subsets(10, 4, 32) == 210
    start = time.process_time()
    chosen = mdp3(frames, query, 8)
    assert time.process_time() - start < 1
    assert len(set(chosen)) == 8 and chosen == sorted(chosen)


def test_a_long_text_is_cut_from_both_ends() -> None:
    assert text_chunks(0) == []
    assert text_chunks(64) == [range(64)]
    assert text_chunks(65) == [range(33), range(32, 65)]
    for tokens in range(1, 400):
        chunks = text_chunks(tokens)
        assert {i for c in chunks for i in c} == set(range(tokens))
        assert len({len(c) for c in chunks}) == 1 and len(chunks[0]) <= 64
        assert chunks == sorted(chunks, key=lambda c: c.start)
