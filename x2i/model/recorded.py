"""Figures of tensors, recorded from other code, and how far ours are from them.

An architecture keeps them in its `recorded.json`: under `outputs` the figures, under `names` number and digest of names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

#: How many values of a tensor are recorded, spread evenly, beside its mean and its deviation.
VALUES = 64


def distance(ours: Tensor, public: Tensor) -> float:
    """Largest absolute difference; infinite if the shapes differ, or a value is none."""
    if ours.shape != public.shape:
        return math.inf
    found = (ours - public).abs().max().item()
    return math.inf if math.isnan(found) else found


def figures(tensor: Tensor) -> dict[str, Any]:
    """What is recorded of a tensor: shape, values spread evenly, mean, deviation, largest absolute value."""
    flat = tensor.detach().double().flatten()
    places = np.linspace(0, len(flat) - 1, VALUES).astype(int)
    return {
        "shape": list(tensor.shape),
        "mean": flat.mean().item(),
        "deviation": flat.std(correction=0).item(),
        "largest": flat.abs().max().item(),
        "values": flat[places].tolist(),
    }


def distance_from_figures(ours: Tensor, figures_there: Mapping[str, Any]) -> float:
    """Largest difference of the figures of a tensor from recorded ones; infinite if the shapes differ."""
    found = figures(ours)
    if found["shape"] != list(figures_there["shape"]):
        return math.inf
    both = [
        *((found[key], figures_there[key]) for key in ("mean", "deviation", "largest")),
        *zip(found["values"], figures_there["values"], strict=True),
    ]
    largest = max(abs(a - b) for a, b in both)
    return math.inf if any(math.isnan(a) for a, _ in both) else largest


def content(architecture: str) -> dict[str, Any]:
    """The content of an architecture's `recorded.json`."""
    path = Path(__file__).parent / architecture / "recorded.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
