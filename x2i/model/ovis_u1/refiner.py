"""Ovis-U1's refiner: from the language model's hidden states to what the decoder is conditioned on.

Architecture (paper arXiv 2506.23044; code AIDC-AI/Ovis-U1-3B, modeling_yak.py):
- input: the last and the last but one hidden state of the language model, side by side
- gates: an MLP of the mean over the text gives c, from which each block takes two gates; zero at initialisation
- tokens: a linear map; a learned summary token is put first
- blocks: bidirectional attention and MLP (SiLU), LayerNorm with affine, no positions
- output: the summary's vector, and the text tokens

Tensor names carry their axes: B batch · L text tokens · S = 1 + L · E width of the context · D width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from x2i.model.ovis_u1.decoder_config import DecoderConfig


class TextProjection(nn.Module):
    """Two linear maps with SiLU between them."""

    def __init__(self, context: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(context, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, mean_BE: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(mean_BE)))


class RefinerMLP(nn.Module):
    """The block's MLP."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x_BSD)))


class RefinerBlock(nn.Module):
    """Gated attention and gated MLP."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attn_qkv = nn.Linear(width, 3 * width)
        self.self_attn_proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = RefinerMLP(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BSD: Tensor, c_BD: Tensor, allowed_B11S: Tensor | None) -> Tensor:
        attn_gate_B1D, mlp_gate_B1D = self.adaLN_modulation(c_BD)[:, None].chunk(2, dim=-1)
        q, k, v = self.self_attn_qkv(self.norm1(x_BSD)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed_B11S)
        x_BSD = x_BSD + attn_gate_B1D * self.self_attn_proj(seen.transpose(1, 2).flatten(2))
        return x_BSD + mlp_gate_B1D * self.mlp(self.norm2(x_BSD))


class RefinerBlocks(nn.Module):
    """The blocks; a module of its own because the published names have it."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                RefinerBlock(config.hidden_size, config.refiner_heads, config.mlp_ratio)
                for _ in range(config.refiner_depth)
            ]
        )

    def forward(self, x_BSD: Tensor, c_BD: Tensor, allowed_B11S: Tensor | None) -> Tensor:
        for block in self.blocks:
            x_BSD = block(x_BSD, c_BD, allowed_B11S)
        return x_BSD


class Refiner(nn.Module):
    """Context of the language model to text tokens and their summary."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(config.context_in_dim, config.hidden_size)
        self.c_embedder = TextProjection(config.context_in_dim, config.hidden_size)
        self.individual_token_refiner = RefinerBlocks(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))

    def initialise(self) -> None:
        """Gates zero, the summary token close to zero, as published."""
        nn.init.normal_(self.cls_token, std=1e-6)
        for block in self.individual_token_refiner.blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
            nn.init.zeros_(block.adaLN_modulation[1].bias)

    def forward(self, hidden_BLE: Tensor, valid_BL: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Text tokens [B, L, D] and their summary [B, D].

        Args:
            hidden_BLE: the language model's hidden states.
            valid_BL: False on padding, wherever it lies. The published model runs each prompt without padding; with
                padding left out of the mean and of the attention, each row equals that. Rows of padding come out as
                numbers without meaning.
        """
        allowed_B11S = None
        if valid_BL is None:
            mean_BE = hidden_BLE.mean(dim=1)
        else:
            hidden_BLE = hidden_BLE.masked_fill(~valid_BL[..., None], 0)  # padding may hold anything, even NaN
            total_BE = hidden_BLE.sum(dim=1, dtype=torch.float32)  # bfloat16 cannot count beyond 256
            mean_BE = (total_BE / valid_BL.sum(dim=1, keepdim=True).clamp_min(1)).to(hidden_BLE.dtype)
            allowed_B11S = F.pad(valid_BL, (1, 0), value=True)[:, None, None]
        c_BD = self.c_embedder(mean_BE)
        summary_B1D = self.cls_token.expand(len(hidden_BLE), -1, -1)
        tokens_BLD = self.input_embedder(hidden_BLE)
        x_BSD = torch.cat([summary_B1D.to(tokens_BLD.dtype), tokens_BLD], dim=1)
        x_BSD = self.individual_token_refiner(x_BSD, c_BD, allowed_B11S)
        return x_BSD[:, 1:], x_BSD[:, 0]
