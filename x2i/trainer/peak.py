"""What devices can do at most, and what share of it was used (MFU). Light to import: no torch.

    mfu = needed FLOPs / (seconds x devices x peak)

The FLOPs are those of `x2i.trainer.flops`; the peak is that of dense bfloat16 products, by the makers' data sheets.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: Dense bf16 FLOP/s of the makers' data sheets, by what a device's name holds; of several the first.
_PEAKS = (
    ("gb200", 2500e12),
    ("b200", 2250e12),
    ("h200", 989e12),
    ("gh200", 989e12),
    ("h100 pcie", 756e12),
    ("h100 nvl", 835e12),
    ("h100", 989e12),
    ("h800", 989e12),
    ("h20", 148e12),
    ("a100", 312e12),
    ("a800", 312e12),
    ("l40s", 362e12),
    ("l4", 121e12),
    ("a40", 150e12),
    ("a10g", 70e12),
    ("a10", 125e12),
    ("4090", 165e12),
    ("3090", 71e12),
)


def known_names() -> list[str]:
    """What devices may be called."""
    return [name for name, _ in _PEAKS]


def peak(device: torch.device | str) -> float | None:
    """Dense bf16 FLOP/s of a device, or of a device's name; None for a CPU and for what is not known."""
    if not isinstance(device, str):
        if device.type != "cuda":
            return None
        from torch.cuda import get_device_name

        device = get_device_name(device)
    words = " " + re.sub(r"[^a-z0-9]+", " ", device.lower()) + " "
    return next((value for known, value in _PEAKS if f" {known} " in words), None)


def mfu(flops: float, seconds: float, devices: int, peak: float | None) -> float | None:
    """Share of the devices' peak: needed FLOPs / (seconds x devices x peak); None where the peak is not known."""
    if peak is None or seconds <= 0 or devices < 1:
        return None
    return flops / (seconds * devices * peak)
