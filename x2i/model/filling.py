"""Weights and inputs that depend on names and seeds alone, so that figures recorded from other code can be compared."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor, nn


def fill(module: nn.Module, std: float = 0.05) -> None:
    """Fill every parameter with normal numbers seeded by its name; norms' one-dimensional weights lie around 1."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
            drawn = np.random.Generator(np.random.PCG64(seed)).standard_normal(tuple(parameter.shape))
            around = 1.0 if parameter.dim() == 1 and "norm" in name and not name.endswith("bias") else 0.0
            scale = 0.1 if around else std
            parameter.copy_(torch.from_numpy(around + scale * drawn).to(parameter.dtype))


def draw(seed: int, *shape: int) -> Tensor:
    """Normal numbers, float32, of numpy's PCG64: the same on every machine."""
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)).float()


def draw_ids(seed: int, length: int, vocabulary: int) -> list[int]:
    """Token ids from 3 up, of numpy's PCG64."""
    drawn: list[int] = np.random.Generator(np.random.PCG64(seed)).integers(3, vocabulary, length).tolist()
    return drawn
