"""Who looks at whom in OmniGen's sequence [left pad][text and condition images][time token][noisy patches].

Tensor names carry their axes: B batch · L condition tokens (padded) · N noisy tokens · S = L + 1 + N.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def condition_mask(valid_BL: Tensor, blocks_BL: Tensor) -> Tensor:
    """Which condition token (row) may look at which (column): bool [B, L, L].

    Args:
        valid_BL: False on padding.
        blocks_BL: 0 on text, k > 0 on the tokens of the k-th condition image.

    Causal, and an image is bidirectional inside. Rows of padding look everywhere, so that no softmax is empty;
    nothing looks at padding.
    """
    length = valid_BL.shape[1]
    same_BLL = (blocks_BL[:, :, None] == blocks_BL[:, None, :]) & (blocks_BL > 0)[:, :, None]
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=valid_BL.device).tril()
    return ((same_BLL | causal_LL) & valid_BL[:, None, :]) | ~valid_BL[:, :, None]


def step_mask(valid_BL: Tensor, noisy: int) -> Tensor:
    """What the time token and N noisy tokens may look at: bool [B, 1 + N, S].

    Time sees the condition and itself, the noisy tokens see everything but padding.
    """
    batch = valid_BL.shape[0]
    allowed_BTS = F.pad(valid_BL, (0, 1 + noisy), value=True)[:, None, :].repeat(1, 1 + noisy, 1)
    allowed_BTS[:, 0, valid_BL.shape[1] + 1 :] = False
    return allowed_BTS.view(batch, 1 + noisy, -1)


def hybrid_mask(valid_BL: Tensor, blocks_BL: Tensor, noisy: int) -> Tensor:
    """The whole sequence's mask: bool [B, S, S]. No condition token sees time or noise, so these two parts are all."""
    condition_BLS = F.pad(condition_mask(valid_BL, blocks_BL), (0, 1 + noisy)) | ~valid_BL[:, :, None]
    return torch.cat([condition_BLS, step_mask(valid_BL, noisy)], dim=1)


def additive(allowed: Tensor, like: Tensor) -> Tensor:
    """0 where allowed, the type's lowest number elsewhere, in the type in which the attention computes."""
    device = like.device.type
    cast = not like.is_meta and torch.is_autocast_enabled(device)  # of the meta device it cannot be asked
    dtype = torch.get_autocast_dtype(device) if cast else like.dtype
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=like.device)
    return zeros.masked_fill(~allowed, torch.finfo(dtype).min)


def position_ids(valid_BL: Tensor, after: int) -> Tensor:
    """Positions [B, L + after] for the rotary embedding: 0 on padding, then 0, 1, 2 … through to the last token."""
    return (F.pad(valid_BL, (0, after), value=True).long().cumsum(dim=1) - 1).clamp_min(0)
