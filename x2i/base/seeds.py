"""Digests and random generators that derive from content, never from time, worker or order."""

import hashlib
import json
from typing import Any

import numpy as np


def canonical_json(value: Any) -> str:
    """One spelling per value: sorted keys, no spaces, UTF-8 kept. Raises TypeError on other types."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(*parts: Any) -> str:
    """SHA-256 (64 hex digits) of the canonical JSON of `parts`."""
    text = canonical_json(list(parts))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()  # file names may hold any bytes


def generator(*parts: Any) -> np.random.Generator:
    """A numpy generator (PCG64) seeded by the digest of `parts`, the same on every machine."""
    return np.random.Generator(np.random.PCG64(int(digest(*parts)[:32], 16)))
