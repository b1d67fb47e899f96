"""PiDiNet: edge detection with pixel-difference convolutions.

Paper: Su et al. 2021, "Pixel difference networks for efficient edge detection", arXiv 2108.07009. Names and weights
(`table5_pidinet.pth`) are those of https://github.com/hellozhuo/pidinet, whose licence allows research use only.

A pixel-difference convolution weighs differences of pixels instead of pixels: from the centre (cd), from the next
one round the 3x3 ring (ad), from the one further out on the same ray (rd). Each is linear, so it equals a plain
convolution with other weights (rd: 5x5): `plain` gives them, and `PiDiNet.converted` runs on them.

Tensor names: B batch, C channels, H and W pixels; kernels OIKK (channels out, channels in, rows, columns).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: The configuration `carv4`: cd, ad, rd, cv (plain), again and again, over the stem and fifteen blocks.
CARV4 = ("cd", "ad", "rd", "cv") * 4
WIDTH, DILATED = 60, 24  # channels of the first stage, and of what the side branches see
#: The least side that survives the three pools.
LEAST = 8

_RING = (3, 0, 1, 6, 4, 2, 7, 8, 5)  # the neighbour, clockwise, of each place of a 3x3 kernel; the centre's is itself
_NEAR = (6, 7, 8, 11, 13, 16, 17, 18)  # places of a 5x5 kernel one step from the centre, and two steps on the same ray
_FAR = (0, 2, 4, 10, 14, 20, 22, 24)


def plain(kind: str, weight_OIKK: Tensor) -> Tensor:
    """The kernel of the plain convolution that equals a pixel-difference convolution with this 3x3 kernel.

    Args:
        kind: cv, cd, ad or rd. rd has no use for its first weight and gives a 5x5 kernel, the others 3x3.
    """
    weight_OIK = weight_OIKK.flatten(2)
    if kind == "cd":
        weight_OIK = weight_OIK.clone()
        weight_OIK[..., 4] -= weight_OIKK.sum((2, 3))
    elif kind == "ad":
        weight_OIK = weight_OIK - weight_OIK[..., list(_RING)]
    elif kind == "rd":
        wide = weight_OIK.new_zeros(*weight_OIK.shape[:2], 25)
        wide[..., list(_FAR)] = weight_OIK[..., 1:]
        wide[..., list(_NEAR)] = -weight_OIK[..., 1:]
        return wide.unflatten(2, (5, 5))
    return weight_OIK.unflatten(2, (3, 3))


class Difference(nn.Module):
    """A pixel-difference convolution by its definition: the kernel is derived at every call, as in training."""

    def __init__(self, kind: str, inputs: int, outputs: int, groups: int = 1) -> None:
        super().__init__()
        self.kind, self.groups = kind, groups
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups, 3, 3))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.kind == "cd":  # two convolutions, as published
            centre = F.conv2d(x_BCHW, self.weight.sum((2, 3), keepdim=True), groups=self.groups)
            return F.conv2d(x_BCHW, self.weight, padding=1, groups=self.groups) - centre
        weight_OIKK = plain(self.kind, self.weight)
        return F.conv2d(x_BCHW, weight_OIKK, padding=weight_OIKK.shape[-1] // 2, groups=self.groups)


def convolution(kind: str, inputs: int, outputs: int, groups: int, converted: bool) -> nn.Module:
    """A pixel-difference convolution, or the plain one that takes its place."""
    if not converted:
        return Difference(kind, inputs, outputs, groups)
    size = 5 if kind == "rd" else 3
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False)


class Block(nn.Module):
    """Depth-wise difference convolution, ReLU, 1x1, and a shortcut; the first of a later stage halves the size."""

    def __init__(self, kind: str, inputs: int, outputs: int, halves: bool, converted: bool) -> None:
        super().__init__()
        self.conv1 = convolution(kind, inputs, inputs, inputs, converted)
        self.conv2 = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if halves else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.shortcut is None:
            return x_BCHW + self.conv2(F.relu(self.conv1(x_BCHW)))
        x_BCHW = F.max_pool2d(x_BCHW, 2)
        return self.shortcut(x_BCHW) + self.conv2(F.relu(self.conv1(x_BCHW)))


class CDCM(nn.Module):
    """Compact dilation module: four dilated convolutions of one reduced map, added."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1)
        for i, dilation in enumerate((5, 7, 9, 11), 1):
            setattr(self, f"conv2_{i}", nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv1(F.relu(x_BCHW))
        return self.conv2_1(x_BCHW) + self.conv2_2(x_BCHW) + self.conv2_3(x_BCHW) + self.conv2_4(x_BCHW)


class CSAM(nn.Module):
    """Compact spatial attention: every pixel times a weight of 0 to 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 4, 1)
        self.conv2 = nn.Conv2d(4, 1, 3, padding=1, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW * self.conv2(self.conv1(F.relu(x_BCHW))).sigmoid()


class Reduce(nn.Module):
    """Features to a side map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 1, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(x_BCHW)


class PiDiNet(nn.Module):
    """Pixels to a soft edge map. 0.71 M parameters as published; sides of `LEAST` pixels or more.

    Args:
        converted: plain convolutions, for what `converted_weights` gives; False: as published, for the weights as
            they come.
    """

    def __init__(self, converted: bool = False) -> None:
        super().__init__()
        kinds = iter(CARV4)
        self.init_block = convolution(next(kinds), 3, WIDTH, 1, converted)
        widths, before = (WIDTH, 2 * WIDTH, 4 * WIDTH, 4 * WIDTH), WIDTH
        self._stages: list[list[str]] = []
        for stage, width in enumerate(widths, 1):
            names = [f"block{stage}_{i}" for i in range(1, 4 if stage == 1 else 5)]
            for i, name in enumerate(names):
                setattr(self, name, Block(next(kinds), before, width, i == 0 and stage > 1, converted))
                before = width
            self._stages.append(names)
        self.dilations = nn.ModuleList(CDCM(width, DILATED) for width in widths)
        self.attentions = nn.ModuleList(CSAM(DILATED) for _ in widths)
        self.conv_reduces = nn.ModuleList(Reduce(DILATED) for _ in widths)
        self.classifier = nn.Conv2d(4, 1, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """RGB with ImageNet's mean and deviation taken out, float [B, 3, H, W], to probabilities, float32 [B, H, W]."""
        size, sides = x_BCHW.shape[-2:], []
        x_BCHW = self.init_block(x_BCHW)
        for names, dilation, attention, reduce in zip(
            self._stages, self.dilations, self.attentions, self.conv_reduces, strict=True
        ):
            for name in names:
                x_BCHW = getattr(self, name)(x_BCHW)
            side_B1HW = reduce(attention(dilation(x_BCHW)))
            sides.append(F.interpolate(side_B1HW.float(), size, mode="bilinear", align_corners=False))
        return self.classifier(torch.cat(sides, 1)).float().sigmoid()[:, 0]


def converted_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights as `PiDiNet(converted=True)` takes them. A leading `module.` goes."""
    names = ["init_block"] + [f"block{s}_{i}.conv1" for s in range(1, 5) for i in range(1, 4 if s == 1 else 5)]
    kinds = {f"{name}.weight": kind for name, kind in zip(names, CARV4, strict=True)}
    state = {name.removeprefix("module."): tensor.float() for name, tensor in state.items()}
    return {name: plain(kinds[name], tensor) if name in kinds else tensor for name, tensor in state.items()}
