"""AIMv2: an image encoder over packed patches of images of any size.

Architecture (paper arXiv 2411.14402; code apple/ml-aim, and AIDC-AI/Ovis-U1-3B for native resolution):
- patches: one linear map (published as a convolution), RMSNorm, then a learned table of positions
- blocks: x + Attention(RMSNorm(x)), then x + SwiGLU(RMSNorm(x)); no biases
- native resolution (`rope`): the table is interpolated (bicubic) to the image's grid, and queries and keys are rotated:
  of each half head, one half by the row and one by the column, in float32
- attention is bidirectional within an image, and never crosses images
- `post_trunk_norm` is loaded and saved, but not applied: Ovis takes the features before it

Patches come in merge order: blocks of S x S patches after each other, in each block and over the blocks row by row.

Tensor names carry their axes:
    N patches of all images · F = 3 * P * P values of a patch · D width · H heads · E width of a head · R = E / 2
    S hidden stride (patches per block side) · P patch side
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from x2i.base.errors import X2IError
from x2i.model.layers import within
from x2i.model.layers.config import AIMv2Config

Grid = tuple[int, int]


class RMSNorm(nn.Module):
    """Root mean square normalisation, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        full = x.float()
        return (full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Patchifier(nn.Module):
    """Pixels of patches to tokens."""

    def __init__(self, config: AIMv2Config) -> None:
        super().__init__()
        # published as a convolution; on cut patches it is a matrix product
        self.proj = nn.Conv2d(3, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, patches_NF: Tensor) -> Tensor:
        """[N, F] -> [N, D]."""
        weight_DF = self.proj.weight.flatten(1)
        return self.norm(F.linear(patches_NF.to(weight_DF.dtype), weight_DF, self.proj.bias))


class Preprocessor(nn.Module):
    """Patches to tokens that know their place."""

    def __init__(self, config: AIMv2Config) -> None:
        super().__init__()
        self.config = config
        self.side = config.image_size // config.patch_size
        self.patchifier = Patchifier(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.side**2, config.hidden_size))

    def forward(self, patches_NF: Tensor, grids: Sequence[Grid]) -> Tensor:
        tokens_ND = self.patchifier(patches_NF)
        tables = {grid: self.positions(grid) for grid in dict.fromkeys(grids)}
        return tokens_ND + torch.cat([tables[grid] for grid in grids]).to(tokens_ND.dtype)

    def positions(self, grid: Grid) -> Tensor:
        """The table for one image, [rows * columns, D], in merge order."""
        table_DHW = self.pos_embed[0].view(self.side, self.side, -1).permute(2, 0, 1)
        if grid != (self.side, self.side):
            table_DHW = F.interpolate(table_DHW[None].float(), size=grid, mode="bicubic", align_corners=False)[0]
        return merge_order(table_DHW.permute(1, 2, 0), self.config.hidden_stride)


class Attention(nn.Module):
    """Self-attention within each image."""

    def __init__(self, config: AIMv2Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)

    def forward(self, x_ND: Tensor, lengths: Sequence[int], angles_NR: Tensor | None) -> Tensor:
        q_NHE, k_NHE, v_NHE = self.qkv(x_ND).view(len(x_ND), 3, self.heads, -1).unbind(1)
        if angles_NR is not None:
            q_NHE, k_NHE = rotate(q_NHE, angles_NR), rotate(k_NHE, angles_NR)
        return self.proj(within.attend(q_NHE, k_NHE, v_NHE, lengths).flatten(1))


class SwiGLU(nn.Module):
    """fc2(silu(fc1(x)) * fc3(x))."""

    def __init__(self, config: AIMv2Config) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.use_bias)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.use_bias)
        self.fc3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.use_bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x_ND)) * self.fc3(x_ND))


class Block(nn.Module):
    """One transformer block."""

    def __init__(self, config: AIMv2Config) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.norm_1 = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config)
        self.norm_2 = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x_ND: Tensor, lengths: Sequence[int], angles_NR: Tensor | None) -> Tensor:
        x_ND = x_ND + self.attn(self.norm_1(x_ND), lengths, angles_NR)
        return x_ND + self.mlp(self.norm_2(x_ND))


class Trunk(nn.Module):
    """The blocks, and the norm after them, which is only kept."""

    def __init__(self, config: AIMv2Config) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.post_trunk_norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x_ND: Tensor, lengths: Sequence[int], angles_NR: Tensor | None) -> Tensor:
        for block in self.blocks:
            x_ND = block(x_ND, lengths, angles_NR)
        return x_ND


class AIMv2(nn.Module):
    """Features of the patches of several images."""

    def __init__(self, config: AIMv2Config) -> None:
        super().__init__()
        self.config = config
        self.preprocessor = Preprocessor(config)
        self.trunk = Trunk(config)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.preprocessor.pos_embed, std=0.02)

    def forward(self, patches_NF: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Features before the trunk's last norm.

        Args:
            patches_NF: packed patches of all images in merge order, as `patchify` makes them.
            grids: rows and columns of patches of each image.

        Returns:
            [N, D], in the order of the patches.

        Raises:
            X2IError: patches and grids do not agree, or a grid is not one that this encoder can take.
        """
        self._check(patches_NF, grids)
        lengths = [rows * columns for rows, columns in grids]
        tokens_ND = self.preprocessor(patches_NF, grids)
        return self.trunk(tokens_ND, lengths, self._angles(grids, tokens_ND.device))

    def _angles(self, grids: Sequence[Grid], device: torch.device) -> Tensor | None:
        if not self.config.rope:
            return None
        head, stride = self.config.hidden_size // self.config.heads, self.config.hidden_stride
        tables = {grid: rotary_angles(grid, head, stride, device) for grid in dict.fromkeys(grids)}
        return torch.cat([tables[grid] for grid in grids])

    def _check(self, patches_NF: Tensor, grids: Sequence[Grid]) -> None:
        patch, stride = self.config.patch_size, self.config.hidden_stride
        total, values = sum(rows * columns for rows, columns in grids), 3 * patch * patch
        if patches_NF.shape != (total, values) or not grids:
            raise X2IError(
                f"image encoder: grids {list(grids)} need patches [{total}, {values}], not {list(patches_NF.shape)}"
            )
        side = self.preprocessor.side
        for rows, columns in grids:
            if not self.config.rope and (rows, columns) != (side, side):
                raise X2IError(
                    f"image encoder: a grid of {rows} x {columns} patches, but its table of positions is fixed: resize "
                    f"images to {self.config.image_size} x {self.config.image_size} pixels"
                )
            if rows % stride or columns % stride:
                raise X2IError(
                    f"image encoder: a grid of {rows} x {columns} patches; the sides of images must be multiples "
                    f"of {patch * stride} pixels"
                )


def patchify(images: Sequence[Tensor], patch: int, stride: int) -> tuple[Tensor, list[Grid]]:
    """Cut images into patches in merge order.

    Args:
        images: float [3, H, W], resized and normalised; H and W are multiples of `patch * stride`.
        patch: pixels per patch side.
        stride: patches per block side.

    Returns:
        Packed patches [N, 3 * patch * patch], channel first, and rows and columns of patches of each image.

    Raises:
        X2IError: no image, or a side that is not a multiple.
    """
    if not images:
        raise X2IError("image encoder: no images to cut into patches")
    packed, grids = [], []
    for image in images:
        height, width = image.shape[-2:]
        rows, columns = height // patch, width // patch
        if image.shape[0] != 3 or height % (patch * stride) or width % (patch * stride):
            raise X2IError(
                f"image encoder: an image of shape {list(image.shape)}; expected [3, H, W] with sides that are "
                f"multiples of {patch * stride}"
            )
        cut = image.reshape(3, rows, patch, columns, patch).permute(1, 3, 0, 2, 4).reshape(rows, columns, -1)
        packed.append(merge_order(cut, stride))
        grids.append((rows, columns))
    return torch.cat(packed), grids


def merge_order(grid_HWC: Tensor, stride: int) -> Tensor:
    """[rows, columns, C] -> [rows * columns, C]: blocks of stride x stride after each other."""
    rows, columns, channels = grid_HWC.shape
    blocks = grid_HWC.reshape(rows // stride, stride, columns // stride, stride, channels)
    return blocks.transpose(1, 2).reshape(rows * columns, channels)


def rotary_angles(grid: Grid, head: int, stride: int, device: torch.device) -> Tensor:
    """Angles [rows * columns, head / 2] of 2-D rotary positions: first those of the row, then those of the column."""
    rows, columns = grid
    rate = 1.0 / 10_000 ** (torch.arange(0, head // 2, 2, dtype=torch.float32, device=device) / (head // 2))
    from_row = torch.outer(torch.arange(rows, dtype=torch.float32, device=device), rate)
    from_column = torch.outer(torch.arange(columns, dtype=torch.float32, device=device), rate)
    both = torch.cat([from_row[:, None].expand(-1, columns, -1), from_column[None].expand(rows, -1, -1)], dim=-1)
    return merge_order(both, stride)


def rotate(x_NHE: Tensor, angles_NR: Tensor) -> Tensor:
    """Turn value i of a head with value i + E / 2 by angle i, in float32; the result has x's dtype."""
    first, second = x_NHE.float().chunk(2, dim=-1)
    cos, sin = angles_NR.cos()[:, None], angles_NR.sin()[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_NHE.dtype)
