"""The blocks of Ovis-U1's decoder, in the published names. What they make up is told in decoder.py, how their tokens lie
in streams.py.

Tensor names carry their axes:
    B rows, or 1 in a pack · I image tokens · L text tokens · S = L + I · D width · H heads · E width of a head
    G rows, or documents of a pack
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from x2i.model.ovis_u1.decoder_config import DecoderConfig
from x2i.model.ovis_u1.streams import Stream, Streams


class MLPEmbedder(nn.Module):
    """Two linear maps with SiLU between them."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(features, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    """Root mean square normalisation, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        full = x.float()
        return (full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * self.scale


class QKNorm(nn.Module):
    """Norms of queries and keys."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(width)
        self.key_norm = RMSNorm(width)

    def forward(self, qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, 3 * D] -> q, k, v [B, H, S, E] in v's dtype."""
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return self.query_norm(q).to(v.dtype), self.key_norm(k).to(v.dtype), v


class SelfAttention(nn.Module):
    """The maps of an attention; the attention itself is the block's."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.norm = QKNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def heads_of(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised queries and keys, and values, [B, H, S, E]."""
        return self.norm(self.qkv(x_BSD), self.heads)


class Modulation(nn.Module):
    """Shift, scale and gate for each of `sets` places, from the vector."""

    def __init__(self, width: int, sets: int) -> None:
        super().__init__()
        self.sets = sets
        self.lin = nn.Linear(width, 3 * sets * width)

    def forward(self, vector_GD: Tensor, stream: Stream) -> list[tuple[Tensor, Tensor, Tensor]]:
        parts = [stream.spread(part) for part in self.lin(F.silu(vector_GD)).chunk(3 * self.sets, dim=-1)]
        return [(parts[i], parts[i + 1], parts[i + 2]) for i in range(0, 3 * self.sets, 3)]


def _mlp(width: int, ratio: float) -> nn.Sequential:
    hidden = int(width * ratio)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


class DoubleBlock(nn.Module):
    """Text and image attend together; the image also to itself."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, heads, bias = config.hidden_size, config.heads, config.qkv_bias
        self.img_mod = Modulation(width, 3)
        self.img_norm1 = _norm(width)
        self.img_attn = SelfAttention(width, heads, bias)
        self.img_self_attn = SelfAttention(width, heads, bias)
        self.img_norm2 = _norm(width)
        self.img_mlp = _mlp(width, config.mlp_ratio)
        self.txt_mod = Modulation(width, 2)
        self.txt_norm1 = _norm(width)
        self.txt_attn = SelfAttention(width, heads, bias)
        self.txt_norm2 = _norm(width)
        self.txt_mlp = _mlp(width, config.mlp_ratio)

    def forward(self, img_BID: Tensor, txt_BLD: Tensor, vector_GD: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        (shift1, scale1, gate1), (shift2, scale2, gate2), (shift3, scale3, gate3) = self.img_mod(
            vector_GD, streams.image
        )
        (txt_shift1, txt_scale1, txt_gate1), (txt_shift2, txt_scale2, txt_gate2) = self.txt_mod(vector_GD, streams.text)
        normed_BID = self.img_norm1(img_BID)

        img = self.img_attn.heads_of((1 + scale1) * normed_BID + shift1)
        txt = self.txt_attn.heads_of((1 + txt_scale1) * self.txt_norm1(txt_BLD) + txt_shift1)
        q, k, v = (streams.join(t, i) for t, i in zip(txt, img, strict=True))
        joint_BLD, joint_BID = streams.part(streams.whole.attend(q, k, v))

        q, k, v = self.img_self_attn.heads_of((1 + scale3) * normed_BID + shift3)
        alone_BID = streams.image.attend(q, k, v)

        img_BID = img_BID + gate1 * self.img_attn.proj(joint_BID)
        img_BID = img_BID + gate3 * self.img_self_attn.proj(alone_BID)
        img_BID = img_BID + gate2 * self.img_mlp((1 + scale2) * self.img_norm2(img_BID) + shift2)
        txt_BLD = txt_BLD + txt_gate1 * self.txt_attn.proj(joint_BLD)
        txt_BLD = txt_BLD + txt_gate2 * self.txt_mlp((1 + txt_scale2) * self.txt_norm2(txt_BLD) + txt_shift2)
        return img_BID, txt_BLD


class SingleBlock(nn.Module):
    """Attention and MLP side by side over one stream."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.heads, self.sizes = config.heads, (3 * width, hidden)
        self.linear1 = nn.Linear(width, sum(self.sizes))
        self.linear2 = nn.Linear(width + hidden, width)
        self.norm = QKNorm(width // config.heads)
        self.pre_norm = _norm(width)
        self.modulation = Modulation(width, 1)

    def forward(self, x_BSD: Tensor, vector_GD: Tensor, stream: Stream) -> Tensor:
        ((shift, scale, gate),) = self.modulation(vector_GD, stream)
        qkv, mlp = self.linear1((1 + scale) * self.pre_norm(x_BSD) + shift).split(self.sizes, dim=-1)
        q, k, v = self.norm(qkv, self.heads)
        seen_BSD = stream.attend(q, k, v)
        return x_BSD + gate * self.linear2(torch.cat([seen_BSD, F.gelu(mlp, approximate="tanh")], dim=-1))


class FinalLayer(nn.Module):
    """Tokens to velocities, shifted and scaled by the vector. Zero at initialisation."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = _norm(width)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BND: Tensor, vector_GD: Tensor, stream: Stream) -> Tensor:
        shift, scale = (stream.spread(part) for part in self.adaLN_modulation(vector_GD).chunk(2, dim=1))
        return self.linear((1 + scale) * self.norm_final(x_BND) + shift)
