"""ConvNeXt, all four stages of it: the encoder of Mini-Gemini's high-resolution view.

Architecture (arXiv 2201.03545), named as in timm, of whose class OpenCLIP's published weights are:
- stem: a 4x4 convolution of stride 4, LayerNorm over channels
- stages 1 to 3 begin with LayerNorm and a 2x2 convolution of stride 2
- block: depthwise 7x7 convolution, LayerNorm, two-layer GELU MLP, a scale per channel, residual
- every LayerNorm has epsilon 1e-6

No stochastic depth: MGM trains with OpenCLIP's rate of 0.1 in this frozen encoder, and also publishes a script
without it (`..._nodp.sh`).

Tensor names carry their axes: B batch · C channels · H, W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MLP(nn.Module):
    """Two linear maps with a GELU between them, four times as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """One residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))
        self.conv_dw = nn.Conv2d(channels, channels, kernel_size=7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = MLP(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        inner_BHWC = self.mlp(self.norm(self.conv_dw(x_BCHW).permute(0, 2, 3, 1))) * self.gamma
        return x_BCHW + inner_BHWC.permute(0, 3, 1, 2)


class StageBlocks(nn.Module):
    """Blocks at one resolution, half of the one before where `channels` is given."""

    def __init__(self, channels: int | None, width: int, depth: int) -> None:
        super().__init__()
        self.downsample: nn.Module = nn.Identity()
        if channels is not None:
            self.downsample = nn.Sequential(ChannelNorm(channels), nn.Conv2d(channels, width, kernel_size=2, stride=2))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.blocks(self.downsample(x_BCHW))


class ConvNeXt(nn.Module):
    """Pixels to the features of all stages, on the grid of the first."""

    def __init__(self, widths: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__()
        self.vision_stem = nn.Sequential(nn.Conv2d(3, widths[0], kernel_size=4, stride=4), ChannelNorm(widths[0]))
        before = [None, *widths[:-1]]
        stages = (StageBlocks(b, w, d) for b, w, d in zip(before, widths, depths, strict=True))
        self.vision_stages = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H, W], sides multiples of 32, to [B, sum of widths, H/4, W/4] in the weights' dtype.

        Later stages are enlarged bilinearly, in float32.
        """
        x_BCHW = self.vision_stem(pixels_BCHW.to(self.vision_stem[0].weight.dtype))
        grid, found = x_BCHW.shape[-2:], []
        for stage in self.vision_stages:
            x_BCHW = stage(x_BCHW)
            found.append(x_BCHW if x_BCHW.shape[-2:] == grid else resized(x_BCHW, (grid[0], grid[1])))
        return torch.cat(found, dim=1)


def resized(x_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corners not aligned, no antialiasing; computed in float32, returned in the dtype given."""
    return F.interpolate(x_BCHW.float(), size=size, mode="bilinear", align_corners=False).to(x_BCHW.dtype)
