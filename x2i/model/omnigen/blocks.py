"""The small parts of OmniGen around its trunk: patchers, timestep embedders, head, table of positions.

Tensor names carry their axes: B batch · N tokens · D width · O values of a patch
    C latent channels · H, W latent height and width · P patch side.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Latents to tokens: one linear map per patch."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, H/P * W/P, D]."""
        return self.proj(x_BCHW.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Timestep in [0, 1] to a vector: [cos, sin] features, then a two-layer MLP."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        """[B] -> [B, D]."""
        half = self.features // 2
        rate = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t_B.device) / half)
        angle = t_B.float()[:, None] * rate[None]
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class FinalLayer(nn.Module):
    """Tokens to the velocity of their patches, shifted and scaled by the timestep. Zero at initialisation."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, time_BD: Tensor, rows_N: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, N, O]; with `rows_N`, which says which timestep is whose, [N, D] -> [N, O]."""
        shift_BD, scale_BD = self.adaLN_modulation(time_BD).chunk(2, dim=1)
        if rows_N is None:
            shift, scale = shift_BD[:, None], scale_BD[:, None]
        else:  # as of an embedding: its gradient adds up many tokens of few rows, in a fixed order
            shift, scale = F.embedding(rows_N, shift_BD), F.embedding(rows_N, scale_BD)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


def sincos_table(width: int, side: int, base: int) -> Tensor:
    """Fixed positions [side * side, width]: half of the channels from x, half from y (as DiT, x first)."""
    axis = torch.arange(side, dtype=torch.float32) / (side / base)
    rate = 1.0 / 10_000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angle = axis.double()[:, None] * rate[None]
    line = torch.cat([angle.sin(), angle.cos()], dim=1)  # [side, width / 2]
    from_x = line[None].expand(side, side, -1)
    from_y = line[:, None].expand(side, side, -1)
    return torch.cat([from_x, from_y], dim=-1).reshape(side * side, width).float()
