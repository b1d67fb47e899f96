"""MDP3: the frames of a clip that together say most about a text, without repeating themselves (arXiv 2501.02885).

Frames and text are embeddings of one space. k(x, y) is a mean of Gaussians, r_i = k(frame i, text), and
    L̃ = diag(r^(1/λ)) L diag(r^(1/λ)),    log det L̃_S = (2/λ) Σ log r_i + log det L_S:
relevance plus diversity. The video is cut into segments; what is chosen in one is a determinantal point
process given what was chosen in the one before (SeqDPP, Gong et al., 2014):
    P(S_t | S_{t-1}) = det L̃_{S_{t-1} ∪ S_t} / det(L̃_{S_{t-1} ∪ V_t} + I_{V_t}),
and sought are the k frames of largest Π_t P(S_t | S_{t-1}).

The published algorithm is a heuristic: a table over (segment, frames chosen so far) in which each step is greedy
and each cell remembers one way to it. Where few subsets are possible, `mdp3` finds the true maximum instead
(all of a single segment's subsets, or the Viterbi algorithm over the segments' subsets). Up to 10 frames, and well
beyond, that is what `exact="auto"` does; so there it equals brute force, which the published algorithm need not.

Where the paper and its repository differ: the paper has α = 2^{-3,-2,0,1,2}, the repository 2^{-3…1} (`PAPER`,
`REPOSITORY`). The repository adds the Gaussians without dividing (for k frames of one segment a constant), treats
a video as one segment by default, leaves the normaliser out in the path that it uses, and breaks where the number
of frames is no multiple of the segment. Its defaults are `mdp3(…, segment=n, alphas=REPOSITORY, exact=False)`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

#: The Gaussians' variances α in exp(-d²/2α), as the paper and as its repository have them.
PAPER = (0.125, 0.25, 1.0, 2.0, 4.0)
REPOSITORY = (0.125, 0.25, 0.5, 1.0, 2.0)

#: Most pairs of subsets (of a segment and the one before) that `exact="auto"` tries; a fraction of a second.
FEW = 20_000

#: On the kernel's diagonal: a set with two equal frames has a determinant all the same, only a very small one.
RIDGE = 1e-6
#: Scores closer than this are equal: then the earlier frame or subset is taken, and not what rounding prefers.
TIE = 1e-7

Floats = NDArray[np.float64]
Subset = tuple[int, ...]


def mdp3(
    frames: NDArray[np.floating],
    query: NDArray[np.floating],
    k: int,
    segment: int = 32,
    lam: float = 0.2,
    alphas: Sequence[float] = PAPER,
    exact: bool | Literal["auto"] = "auto",
) -> list[int]:
    """Choose k frames. Computed in float64.

    Args:
        frames: [n, d], their embeddings in the order of time; brought to length 1 here.
        query: [d], the text's embedding; or [chunks, d], of which each is brought to length 1, and the mean taken.
        segment: frames in a segment; the last may be shorter. n or more: one segment.
        lam: λ; the smaller, the more relevance counts, against diversity.
        exact: True: the maximum; False: the published algorithm; "auto": the maximum if `subsets` is at most FEW.

    Returns:
        Indices of frames, ascending; all of them if there are no more than k.

    Raises:
        ValueError: shapes that do not fit, an embedding that is zero or not finite, a parameter out of range;
            or `exact=True` asks for more than 100 times FEW.
    """
    if k < 1 or segment < 1 or not lam > 0 or not alphas or min(alphas) <= 0:
        raise ValueError(f"k={k}, segment={segment}, lam={lam}, alphas={tuple(alphas)}: all must be above zero")
    model = _Model(_unit(frames, "frames"), _text(query), lam, alphas)
    n = model.n
    if n <= k:
        return list(range(n))
    number = subsets(n, k, segment)
    if exact is True and number > 100 * FEW:
        raise ValueError(f"exact=True would try {number:,} subsets; use 'auto', smaller segments, or fewer frames")
    parts = _parts(n, segment)
    return _viterbi(model, parts, k) if exact is True or (exact and number <= FEW) else _published(model, parts, k)


def greedy(
    frames: NDArray[np.floating],
    query: NDArray[np.floating],
    k: int,
    lam: float = 0.2,
    alphas: Sequence[float] = PAPER,
) -> list[int]:
    """Choose k frames by a greedy DPP: one after another, each the one that raises log det L̃_S most.

    The same as `mdp3` of a single segment with `exact=False`. Arguments, result and errors as there.
    """
    return mdp3(frames, query, k, max(1, len(frames)), lam, alphas, exact=False)


def subsets(n: int, k: int, segment: int) -> int:
    """How many pairs of subsets (in one segment and the one before) the exact search for k of n frames compares."""
    total, before, sizes_before = 0, 0, [0]
    for part in _parts(n, segment):
        sizes = list(_sizes(len(part), n, k))
        pairs = ((a, b) for a in sizes_before for b in sizes if a + b <= k)
        total += sum(math.comb(before, a) * math.comb(len(part), b) for a, b in pairs)
        before, sizes_before = len(part), sizes
    return total


def text_chunks(tokens: int, limit: int = 64) -> list[range]:
    """Cut a text of so many tokens for an encoder that takes `limit`: equally long runs, from both ends inwards.

    The two runs that meet in the middle overlap if the length is no multiple. For the mean of their embeddings
    see `mdp3`. From the authors' repository (AIDC-AI/Ovis, plugin/mdp3.py).
    """
    if tokens < 1 or limit < 1:
        return []
    number = -(-tokens // limit)
    length = -(-tokens // number)
    heads = [range(i * length, (i + 1) * length) for i in range(-(-number // 2))]
    tails = [range(tokens - (i + 1) * length, tokens - i * length) for i in range(number // 2)]
    return heads + tails[::-1]


def kernel(x: Floats, y: Floats, alphas: Sequence[float]) -> Floats:
    """The mean over α of exp(-‖x - y‖² / 2α): [n, d] and [m, d] to [n, m], between 0 and 1."""
    squared = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T
    squared = np.maximum(squared, 0.0)
    return np.mean([np.exp(squared / (-2 * a)) for a in alphas], axis=0)


class _Model:
    """L, and the weights q_i = (2/λ) log r_i, so that log det L̃_S = Σ q_i + log det L_S without underflow."""

    def __init__(self, frames: Floats, text: Floats, lam: float, alphas: Sequence[float]) -> None:
        if text.shape[-1] != frames.shape[1]:
            raise ValueError(f"frames have {frames.shape[1]} dimensions, the query {text.shape[-1]}")
        self.n = len(frames)
        self.kernel = kernel(frames, frames, alphas) + RIDGE * np.eye(self.n)
        self.weights = 2 / lam * np.log(np.maximum(kernel(frames, text[None], alphas)[:, 0], np.finfo(float).tiny))

    def given(self, chosen: Sequence[int], part: range) -> tuple[Floats, float]:
        """What is left of a segment's kernel once `chosen` is known, [m, m], and the segment's log normaliser.

        log det L̃_{C ∪ S} = log det L̃_C + Σ_S q + log det of that rest at S; and the normaliser likewise,
        so that the first term falls out of P(S | C). Eliminated frame by frame, as Cholesky does: with frames
        that are nearly equal a solver would lose all digits.
        """
        at = [*chosen, *part]
        rest = self.kernel[np.ix_(at, at)]
        for _ in chosen:
            row = rest[0, 1:]
            rest = rest[1:, 1:] - row[:, None] * row[None] / max(rest[0, 0], RIDGE)
        scale = np.exp(self.weights[part.start : part.stop] / 2)
        normaliser = np.linalg.slogdet(np.eye(len(part)) + scale[:, None] * rest * scale[None])[1]
        return rest, float(normaliser)


def _published(model: _Model, parts: list[range], k: int) -> list[int]:
    """The paper's table. A cell holds the best score for so many frames so far, these frames, and the segment's own."""
    cells: dict[int, tuple[float, Subset, Subset]] = {0: (0.0, (), ())}
    for part in parts:
        after: dict[int, tuple[float, Subset, Subset]] = {}
        for number, (score, chosen, last) in cells.items():
            rest, normaliser = model.given(last, part)
            picks, scores = _greedy(rest, model.weights[part.start : part.stop], min(k - number, len(part)))
            for i, gained in enumerate(scores):
                here = tuple(sorted(part.start + p for p in picks[:i]))
                total = score + gained - normaliser
                if number + i not in after or total > after[number + i][0] + TIE:
                    after[number + i] = (total, chosen + here, here)
        cells = after
    return list(cells[k][1])


def _greedy(rest: Floats, weights: Floats, most: int) -> tuple[list[int], list[float]]:
    """Up to `most` positions, greedily; and Σ q + log det of the first 0, 1, 2 … of them.

    Incremental Cholesky (Chen et al., 2018): `left` is what remains of each diagonal entry, so that a step costs
    one product instead of a determinant per candidate.
    """
    left = rest.diagonal().copy()
    rows = np.zeros((most, len(left)))
    picks: list[int] = []
    scores = [0.0]
    for step in range(most):
        gains = weights + np.log(np.maximum(left, RIDGE))
        gains[picks] = -np.inf
        best = _first(gains)
        rows[step] = (rest[best] - rows[:step, best] @ rows[:step]) / np.sqrt(max(left[best], RIDGE))
        left -= rows[step] ** 2
        picks.append(best)
        scores.append(scores[-1] + float(gains[best]))
    return picks, scores


def _viterbi(model: _Model, parts: list[range], k: int) -> list[int]:
    """The maximum over all choices: after each segment, the best score for each subset of it and number so far."""
    before: list[Subset] = [()]
    values = np.full((k + 1, 1), -np.inf)  # [number of frames so far, subset of the last segment]
    values[0, 0] = 0.0
    ways: list[tuple[list[Subset], NDArray[np.int64]]] = []
    for part in parts:
        groups = [list(itertools.combinations(part, size)) for size in _sizes(len(part), model.n, k)]
        here = [subset for group in groups for subset in group]
        scores = np.array([_scores(model, chosen, part, groups, k) for chosen in before])
        after = np.full((k + 1, len(here)), -np.inf)
        way = np.zeros((k + 1, len(here)), np.int64)
        end = 0
        for group in groups:
            size, columns = len(group[0]), slice(end, end := end + len(group))
            for number in range(size, k + 1):
                totals = values[number - size][:, None] + scores[:, columns]
                way[number, columns] = best = np.argmax(totals >= totals.max(axis=0) - TIE, axis=0)
                after[number, columns] = np.take_along_axis(totals, best[None], axis=0)[0]
        before, values = here, after
        ways.append((here, way))
    number, column = k, _first(values[k])
    chosen: list[int] = []
    for here, way in reversed(ways):
        chosen += here[column]
        number, column = number - len(here[column]), int(way[number, column])
    return sorted(chosen)


def _scores(model: _Model, chosen: Subset, part: range, groups: list[list[Subset]], k: int) -> Floats:
    """log P(S | chosen) for all subsets S of a segment, which come in groups of one size; -inf for too many frames."""
    rest, normaliser = model.given(chosen, part)
    out = []
    for group in groups:
        size = len(group[0])
        if len(chosen) + size > k:
            out.append(np.full(len(group), -np.inf))
            continue
        at = np.array(group, np.int64).reshape(len(group), size)
        blocks = rest[at[:, :, None] - part.start, at[:, None, :] - part.start]
        sign, log = np.linalg.slogdet(blocks)
        log = np.where(sign > 0, log, size * math.log(RIDGE))  # equal frames, and rounding below the ridge
        out.append(log + model.weights[at].sum(1) - normaliser)
    return np.concatenate(out)


def _first(values: Floats) -> int:
    """The index of the largest value; the first of those that are as large."""
    return int(np.argmax(values >= values.max() - TIE))


def _parts(n: int, segment: int) -> list[range]:
    return [range(i, min(i + segment, n)) for i in range(0, n, segment)]


def _sizes(length: int, n: int, k: int) -> Iterator[int]:
    """How many of a segment's frames can be among k of n."""
    yield from range(max(0, k - (n - length)), min(length, k) + 1)


def _unit(vectors: NDArray[np.floating], what: str) -> Floats:
    array = np.asarray(vectors, np.float64)
    if array.ndim != 2 or not array.shape[1]:
        raise ValueError(f"{what}: expected [number, dimensions], found {list(array.shape)}")
    lengths = np.linalg.norm(array, axis=1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise ValueError(f"{what}: an embedding that is zero or not finite")
    return array / lengths


def _text(query: NDArray[np.floating]) -> Floats:
    chunks = _unit(np.atleast_2d(np.asarray(query, np.float64)), "query")
    if not len(chunks):
        raise ValueError("query: no chunks")
    mean: Floats = chunks.mean(axis=0)
    return mean
