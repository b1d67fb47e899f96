"""Ovis-U1's refiner: from the language model's hidden states to what the decoder is conditioned on.

Architecture (paper arXiv 2506.23044; code AIDC-AI/Ovis-U1-3B, modeling_yak.py):
- input: the last and the last but one hidden state of the language model, side by side
- gates: an MLP of the mean over the text gives c, from which each block takes two gates; zero at initialisation
- tokens: a linear map; a learned summary token is put first
- blocks: bidirectional attention and MLP (SiLU), LayerNorm with affine, no positions
- output: the summary's vector, and the text tokens

Tensor names carry their axes:
    B rows, or 1 in a pack · G rows, or documents of a pack · L text tokens · S = 1 + L · E width of the context · D width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from x2i.model.ovis_u1.decoder_config import DecoderConfig
from x2i.model.ovis_u1.streams import DocumentStreams, Rows, RowStreams, Stream, Streams


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

    def forward(self, x_BSD: Tensor, c_GD: Tensor, stream: Stream) -> Tensor:
        attn_gate, mlp_gate = (stream.spread(part) for part in self.adaLN_modulation(c_GD).chunk(2, dim=-1))
        q, k, v = self.self_attn_qkv(self.norm1(x_BSD)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x_BSD = x_BSD + attn_gate * self.self_attn_proj(stream.attend(q, k, v))
        return x_BSD + mlp_gate * self.mlp(self.norm2(x_BSD))


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

    def forward(self, x_BSD: Tensor, c_GD: Tensor, stream: Stream) -> Tensor:
        for block in self.blocks:
            x_BSD = block(x_BSD, c_GD, stream)
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
        summary_B1D = self.cls_token.expand(len(hidden_BLE), -1, -1)
        text_BLD, summary_B1D = self._refined(hidden_BLE, mean_BE, summary_B1D, RowStreams(Rows(allowed_B11S), 1))
        return text_BLD, summary_B1D[:, 0]

    def packed(self, hidden_LE: Tensor, streams: DocumentStreams) -> tuple[Tensor, Tensor]:
        """Text tokens [1, L, D] of documents one after the other, and their summaries [G, D].

        Args:
            hidden_LE: the language model's hidden states, without padding.
            streams: `text` is the summaries, one of each document, and `image` the words.
        """
        mean_GE = torch.stack([part.mean(dim=0) for part in hidden_LE.split(streams.image.lengths)])
        summary_1GD = self.cls_token.expand(-1, len(mean_GE), -1)
        text_1LD, summary_1GD = self._refined(hidden_LE[None], mean_GE, summary_1GD, streams)
        return text_1LD, summary_1GD[0]

    def _refined(self, hidden: Tensor, mean_GE: Tensor, summary: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        """Text tokens and summaries, as long as `hidden` and `summary`."""
        c_GD = self.c_embedder(mean_GE)
        tokens = self.input_embedder(hidden)
        x_BSD = streams.join(summary.to(tokens.dtype), tokens)
        summary, text = streams.part(self.individual_token_refiner(x_BSD, c_GD, streams.whole))
        return text, summary
