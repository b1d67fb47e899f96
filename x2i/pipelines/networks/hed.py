"""HED, holistically-nested edge detection, in the shape that ControlNet's own weights have.

Paper: Xie and Tu 2015, arXiv 1504.06375. Weights: `ControlNetHED.pth` of lllyasviel/Annotators, trained anew for
ControlNet and Apache-2.0; it takes RGB (the first HED took BGR). A VGG-16-like trunk of five stages; a 1x1
convolution after each gives a side map. The fused map is the sigmoid of the mean of the five, resized to the input.

Tensor names: B batch, C channels, H and W pixels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: (channels in, channels out, convolutions) of the stages. A 2x2 max pool stands before each but the first.
STAGES = ((3, 64, 2), (64, 128, 2), (128, 256, 3), (256, 512, 3), (512, 512, 3))
#: The least side that survives the four pools.
LEAST = 16


class Stage(nn.Module):
    """3x3 convolutions with ReLU, and the 1x1 projection to a side map."""

    def __init__(self, inputs: int, outputs: int, depth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(inputs if i == 0 else outputs, outputs, 3, padding=1) for i in range(depth)
        )
        self.projection = nn.Conv2d(outputs, 1, 1)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        for conv in self.convs:
            x_BCHW = F.relu(conv(x_BCHW))
        return x_BCHW, self.projection(x_BCHW)


class HED(nn.Module):
    """Pixels to a soft edge map. 14.7 M parameters; sides of `LEAST` pixels or more."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))  # the channel means, learned
        for i, sizes in enumerate(STAGES, 1):
            setattr(self, f"block{i}", Stage(*sizes))

    def sides(self, rgb_BCHW: Tensor) -> list[Tensor]:
        """The five side maps (logits [B, 1, H', W']), at 1, 1/2 … 1/16 of the input's size."""
        x_BCHW, maps = rgb_BCHW - self.norm, []
        for i in range(1, len(STAGES) + 1):
            if i > 1:
                x_BCHW = F.max_pool2d(x_BCHW, 2)
            x_BCHW, side_B1HW = getattr(self, f"block{i}")(x_BCHW)
            maps.append(side_B1HW)
        return maps

    def forward(self, rgb_BCHW: Tensor) -> Tensor:
        """RGB 0 to 255, float [B, 3, H, W], to edge probabilities, float32 [B, H, W]."""
        size = rgb_BCHW.shape[-2:]
        sides = [F.interpolate(s.float(), size, mode="bilinear", align_corners=False) for s in self.sides(rgb_BCHW)]
        return torch.stack(sides).mean(0).sigmoid()[:, 0]
