"""Texts as they are compared: normalised, hashed, signed by MinHash."""

from __future__ import annotations

import hashlib
import re
import unicodedata

import numpy as np

#: The hash functions of a MinHash signature. The seed is part of the format: signatures of another are not comparable.
PERMUTATIONS, SEED = 128, 20_010_703
_MASK = (1 << 64) - 1
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing modulo 2^64
_BLOCK = 4096


def normalise(text: str) -> str:
    """NFKC, case folded, without marks or punctuation, single spaces: equal for texts that read the same."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"[\W_]+", " ", folded).strip()


def key(normalised: str) -> int:
    """64 bits of the SHA-256 of a normalised text, for finding exact duplicates."""
    return int.from_bytes(hashlib.sha256(normalised.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): a bijection of uint64 that scatters neighbours."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


#: Hash function i of a shingle x is the upper half of mix(x xor KEYS[i]); uint64 [PERMUTATIONS].
KEYS = mix((np.arange(1, PERMUTATIONS + 1, dtype=np.uint64) + np.uint64(SEED)) * _BASE)


def shingles(normalised: str, size: int, words: bool) -> np.ndarray:
    """Hashes of all runs of `size` characters (or words), uint64 [N >= 1]; a shorter text is one shingle."""
    if words:
        units = np.array([key(w) for w in normalised.split()], np.uint64)
    else:
        units = np.frombuffer(normalised.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    size = min(size, len(units))
    runs = np.zeros(len(units) - size + 1, np.uint64)
    for i in range(size):  # a polynomial in _BASE, modulo 2^64
        runs = runs * _BASE + units[i : i + len(runs)] + np.uint64(1)
    return mix(runs)


def minhash(shingled: np.ndarray) -> np.ndarray:
    """A MinHash signature (Broder 1997), uint32 [PERMUTATIONS].

    The share of equal entries of two signatures is an unbiased estimate of the Jaccard similarity J of
    their sets of shingles, with standard error sqrt(J (1 - J) / PERMUTATIONS): at most 0.044.

    Args:
        shingled: uint64 [N >= 1], see `shingles`; repeated ones change nothing.
    """
    lowest = np.full(PERMUTATIONS, _MASK, np.uint64)
    for start in range(0, len(shingled), _BLOCK):  # a book as a caption should not take a gigabyte
        block = shingled[start : start + _BLOCK]
        lowest = np.minimum(lowest, mix(block[None, :] ^ KEYS[:, None]).min(axis=1))
    return (lowest >> np.uint64(32)).astype(np.uint32)
