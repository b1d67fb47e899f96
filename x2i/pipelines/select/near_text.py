"""Near-duplicate texts from their MinHash signatures: every pair at or above the threshold is found.

Locality-sensitive hashing by bands (Broder 1997; Leskovec, Rajaraman and Ullman, "Mining of Massive
Datasets", ch. 3), but with the bands chosen by the pigeonhole principle instead of by a probability: two
signatures that differ in at most d places agree on the whole of one of any d + 1 bands.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from x2i.pipelines.select.dedup import NearDuplicates

_BASE = np.uint64(0x9E3779B97F4A7C15)


def near_texts(signatures: np.ndarray | pa.Array | pa.ChunkedArray, similarity: float) -> NearDuplicates:
    """Drop each text whose signature agrees with a better one's that stays in `similarity` of its places or more.

    Signatures come best first. The rule is that of `near_duplicates`: a text falls to the best one that
    stays and is near enough, so that no two survivors are near each other. `distance` is the number of
    places in which the two signatures differ. Rows without a signature (null) are near nothing.

    Memory beyond the signatures: about 40 bytes for each band that a row shares with another row.

    Args:
        signatures: uint32 [N, P], or an Arrow column of lists of P uint32 (`texts.minhash`).
        similarity: of the sets of shingles, estimated by the signatures; above 0.5, at most 1.
    """
    if not 0.5 < similarity <= 1:
        raise ValueError(f"similarity must be above 0.5 and at most 1, not {similarity}")
    signatures, rows = _dense(signatures)
    most = int(np.floor(signatures.shape[1] * (1 - similarity) + 1e-9))
    copies, originals = _identical(signatures)
    singles = np.setdiff1d(np.arange(len(signatures)), copies, assume_unique=True)
    buckets, of_row = _buckets(signatures, singles, most)

    fell = np.full(len(signatures), -1, np.int64)
    distance = np.zeros(len(signatures), np.int64)
    # of each bucket the rows that stay, best first: stayed[begins[b] : ends[b]]
    begins = np.concatenate([[0], np.cumsum(np.bincount(buckets))])
    ends = begins[:-1].copy()
    stayed = np.empty(len(buckets), np.int64)
    for i in np.flatnonzero(np.diff(of_row)).tolist():
        mine = buckets[of_row[i] : of_row[i + 1]]
        candidates = np.concatenate([stayed[a:b] for a, b in zip(begins[mine], ends[mine], strict=True)])
        candidates.sort()
        candidates = candidates[np.diff(candidates, prepend=-1) > 0]
        apart = (signatures[candidates] != signatures[i]).sum(axis=1)
        near = np.flatnonzero(apart <= most)
        if len(near):
            fell[i], distance[i] = candidates[near[0]], apart[near[0]]
        else:
            stayed[ends[mine]] = i
            ends[mine] += 1
    gone = fell[originals] >= 0  # a copy goes where the original went; if that stays, the copy falls to it
    fell[copies] = np.where(gone, fell[originals], originals)
    distance[copies] = np.where(gone, distance[originals], 0)
    dropped = np.flatnonzero(fell >= 0)
    return NearDuplicates(rows[dropped], rows[fell[dropped]], distance[dropped])


def _dense(signatures: np.ndarray | pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The signatures that are there, uint32 [M, P] (no copy where Arrow allows), and their rows, int64 [M]."""
    if isinstance(signatures, np.ndarray):
        return signatures, np.arange(len(signatures))
    rows = np.flatnonzero(np.asarray(signatures.is_valid()))
    whole = signatures.combine_chunks() if isinstance(signatures, pa.ChunkedArray) else signatures
    there = whole.drop_null()
    if not len(there):
        return np.empty((0, 1), np.uint32), rows
    return np.asarray(there.flatten()).reshape(len(there), -1), rows


def _identical(signatures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose signature an earlier row has as well, and the first such row of each; int64 both."""
    _, first, inverse = np.unique(_hash(signatures), return_index=True, return_inverse=True)
    original = first[inverse]
    copies = np.flatnonzero(original != np.arange(len(signatures)))
    if len(copies):  # equal hashes, but are they equal?
        copies = copies[[bool((signatures[c] == signatures[original[c]]).all()) for c in copies]]
    return copies, original[copies]


def _buckets(signatures: np.ndarray, rows: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """For each row the buckets (a band and its value) that it shares with another row of `rows`.

    Returns:
        int64 buckets of all rows one after another, and where each row's begin, int64 [len(signatures) + 1].
    """
    width = signatures.shape[1] // (most + 1)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    used = 0
    for band in range(most + 1):
        hashes = _hash(signatures[rows, band * width : (band + 1) * width])
        _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        shared = np.flatnonzero(counts[inverse] > 1)
        found.append((rows[shared], inverse[shared] + used))
        used += len(counts)
    owner = np.concatenate([f[0] for f in found])
    order = np.argsort(owner, kind="stable")
    begins = np.searchsorted(owner[order], np.arange(len(signatures) + 1))
    return np.concatenate([f[1] for f in found])[order], begins


def _hash(columns: np.ndarray) -> np.ndarray:
    """A uint64 per row of uint32 [N, C]."""
    out = np.zeros(len(columns), np.uint64)
    for column in columns.T:
        out = (out ^ column) * _BASE
        out ^= out >> np.uint64(32)
    return out
