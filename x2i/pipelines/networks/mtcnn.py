"""The three networks of MTCNN, a cascade that finds faces: proposals, refinement, and output with five landmarks.

Paper: Zhang, Zhang, Li and Qiao 2016, "Joint face detection and alignment using multitask cascaded convolutional
networks", arXiv 1604.02878. Parameters are named as in facenet-pytorch (https://github.com/timesler/facenet-pytorch,
MIT), whose weights are the authors' Caffe models converted.

Shapes: B batch, C channels, H height, W width. Inputs are RGB, (value - 127.5) / 128.
"""

from __future__ import annotations

import torch
from torch import nn


class Proposals(nn.Module):
    """P-Net: fully convolutional; each place of its output looks at 12x12 pixels, two pixels apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 10, 3)
        self.prelu1 = nn.PReLU(10)
        self.pool1 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv2 = nn.Conv2d(10, 16, 3)
        self.prelu2 = nn.PReLU(16)
        self.conv3 = nn.Conv2d(16, 32, 3)
        self.prelu3 = nn.PReLU(32)
        self.conv4_1 = nn.Conv2d(32, 2, 1)
        self.conv4_2 = nn.Conv2d(32, 4, 1)

    def forward(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probability of a face [B, H', W'], and the moves [B, 4, H', W'] of its box's sides, in its widths."""
        x_BCHW = self.pool1(self.prelu1(self.conv1(x_BCHW)))
        x_BCHW = self.prelu3(self.conv3(self.prelu2(self.conv2(x_BCHW))))
        return self.conv4_1(x_BCHW).float().softmax(1)[:, 1], self.conv4_2(x_BCHW).float()


def _flat(x_BCHW: torch.Tensor) -> torch.Tensor:
    return x_BCHW.permute(0, 3, 2, 1).flatten(1)  # Caffe's order, from MATLAB: width first


class Refinement(nn.Module):
    """R-Net: crops of 24x24."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 28, 3)
        self.prelu1 = nn.PReLU(28)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2 = nn.Conv2d(28, 48, 3)
        self.prelu2 = nn.PReLU(48)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3 = nn.Conv2d(48, 64, 2)
        self.prelu3 = nn.PReLU(64)
        self.dense4 = nn.Linear(576, 128)
        self.prelu4 = nn.PReLU(128)
        self.dense5_1 = nn.Linear(128, 2)
        self.dense5_2 = nn.Linear(128, 4)

    def forward(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probability of a face [B], and the moves [B, 4] of its box's sides."""
        x_BCHW = self.pool1(self.prelu1(self.conv1(x_BCHW)))
        x_BCHW = self.prelu3(self.conv3(self.pool2(self.prelu2(self.conv2(x_BCHW)))))
        x_BD = self.prelu4(self.dense4(_flat(x_BCHW)))
        return self.dense5_1(x_BD).float().softmax(1)[:, 1], self.dense5_2(x_BD).float()


class Output(nn.Module):
    """O-Net: crops of 48x48."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3)
        self.prelu1 = nn.PReLU(32)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.prelu2 = nn.PReLU(64)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3 = nn.Conv2d(64, 64, 3)
        self.prelu3 = nn.PReLU(64)
        self.pool3 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv4 = nn.Conv2d(64, 128, 2)
        self.prelu4 = nn.PReLU(128)
        self.dense5 = nn.Linear(1152, 256)
        self.prelu5 = nn.PReLU(256)
        self.dense6_1 = nn.Linear(256, 2)
        self.dense6_2 = nn.Linear(256, 4)
        self.dense6_3 = nn.Linear(256, 10)

    def forward(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Probability of a face [B], moves [B, 4], and five points [B, 5, 2] (x, y) as shares of the crop."""
        x_BCHW = self.pool1(self.prelu1(self.conv1(x_BCHW)))
        x_BCHW = self.pool2(self.prelu2(self.conv2(x_BCHW)))
        x_BCHW = self.prelu4(self.conv4(self.pool3(self.prelu3(self.conv3(x_BCHW)))))
        x_BD = self.prelu5(self.dense5(_flat(x_BCHW)))
        points_B52 = self.dense6_3(x_BD).float().unflatten(1, (2, 5)).transpose(1, 2)
        return self.dense6_1(x_BD).float().softmax(1)[:, 1], self.dense6_2(x_BD).float(), points_B52
