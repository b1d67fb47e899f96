"""Rectified flow: straight paths from noise (t = 0) to data (t = 1), and how to follow them back.

OmniGen, section 1.3 of its code and paper 2409.11340: x_t = t x1 + (1 - t) x0, the network predicts x1 - x0,
t = sigmoid(z) with z standard normal (Esser et al. 2403.03206, logit-normal), plain squared error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]


def interpolate(noise: Tensor, data: Tensor, t_B: Tensor) -> Tensor:
    """x_t on the straight path; `t_B` has one timestep per sample of [B, C, H, W]."""
    t = t_B.view(-1, *[1] * (data.dim() - 1)).to(data.dtype)
    return t * data + (1 - t) * noise


def squared_error(predicted: Tensor, noise: Tensor, data: Tensor) -> Tensor:
    """Mean squared error of the velocity, one value per sample, float32 [B]."""
    return (predicted.float() - (data - noise).float()).pow(2).flatten(1).mean(dim=1)


def timesteps(steps: int, shift: float = 1.0) -> Tensor:
    """The sampler's grid from 0 to 1, `steps` + 1 values; t / (t + s - s t) bends it for a shift s != 1."""
    t = torch.linspace(0, 1, steps + 1)
    return t / (t + shift - shift * t)


def euler(velocity: Velocity, noise: Tensor, steps: int, shift: float = 1.0) -> Tensor:
    """Integrate dx = v dt from noise to data in `steps` steps; `velocity(x, t_B)` is the (guided) network."""
    grid = timesteps(steps, shift)
    x = noise
    for now, after in itertools.pairwise(grid):
        t_B = now.expand(x.shape[0]).to(x.device)
        x = x + (after - now).item() * velocity(x, t_B)
    return x


def guidance_weights(guidance: float, image_guidance: float, has_images: bool) -> tuple[float, float, float]:
    """Weights of the full, the image-only and the unconditional velocity; they sum to 1.

    With images: u + s_img (c_img - u) + s_txt (c - c_img). Without: u + s_txt (c - u), and no image branch.
    A weight of 0 says that its branch need not be computed.
    """
    if not has_images:
        return guidance, 0.0, 1 - guidance
    return guidance, image_guidance - guidance, 1 - image_guidance
