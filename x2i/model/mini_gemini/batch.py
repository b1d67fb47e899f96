"""One batch of Mini-Gemini's inputs.

Tensor names carry their axes: B rows · L tokens (padded on the left) · M images · V low views per image
C channels · H, W height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Label of a token that is not learned.
IGNORE = -100


@dataclass(frozen=True)
class ChatBatch:
    """Conversations as token ids, with the pixels of their images.

    Attributes:
        ids_BL: int64; 0 on padding and on image tokens.
        valid_BL: bool, False on padding.
        image_BL: bool, True on image tokens.
        labels_BL: int64, the id where it is learned, `IGNORE` elsewhere; None: to be answered.
        low_MVCHW, high_MCHW: float32 pixels of the images, row by row, normalised; None: no images.
    """

    ids_BL: Tensor
    valid_BL: Tensor
    image_BL: Tensor
    labels_BL: Tensor | None = None
    low_MVCHW: Tensor | None = None
    high_MCHW: Tensor | None = None

    def to(self, device: torch.device | str) -> ChatBatch:
        """The same batch on another device."""
        moved = {name: None if tensor is None else tensor.to(device) for name, tensor in vars(self).items()}
        return ChatBatch(**moved)
