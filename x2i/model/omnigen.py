"""OmniGen: one transformer that reads text and images and predicts the velocity of an image's latents.

Architecture (paper arXiv 2409.11340; code VectorSpaceLab/OmniGen):
- trunk: a Phi-3 decoder over one sequence, [left pad][text and condition images][time token][noisy patches]
- two patchers (convolutions): one for the noisy image, one for clean condition images; both add the same
  fixed 2-D sine-cosine table, cropped around its centre
- the timestep in [0, 1] enters twice: as a token before the noisy patches, and as shift and scale of the head
- mask: text, images and time are causal; a condition image is bidirectional inside; noisy patches see everything
- head: LayerNorm without affine, shift and scale, Linear; zero at initialisation, so the first output is 0

Tensor names carry their axes:
    B batch · L condition tokens (padded) · N noisy tokens · S = L + 1 + N · D width
    C latent channels · H, W latent height and width · P patch side
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Phi3Config, Phi3Model

from x2i.model.config import OmniGenConfig
from x2i.model.prompt import PromptBatch


class PatchEmbed(nn.Module):
    """Latents to tokens: one linear map per patch."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, H/P * W/P, D]."""
        return self.proj(x_BCHW).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Timestep in [0, 1] to a vector: [cos, sin] features, then a two-layer MLP."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        """[B] -> [B, D]."""
        half = self.features // 2
        rate = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t_B.device) / half)
        angle = t_B.float()[:, None] * rate[None]
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class FinalLayer(nn.Module):
    """Tokens to the velocity of their patches, shifted and scaled by the timestep. Zero at initialisation."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BND: Tensor, time_BD: Tensor) -> Tensor:
        shift_BD, scale_BD = self.adaLN_modulation(time_BD).chunk(2, dim=1)
        return self.linear(self.norm_final(x_BND) * (1 + scale_BD[:, None]) + shift_BD[:, None])


class OmniGen(nn.Module):
    """Predicts the velocity x1 - x0 of noisy latents, given text, condition images and the timestep."""

    def __init__(self, config: OmniGenConfig) -> None:
        super().__init__()
        self.config = config
        width, patch, channels = config.hidden_size, config.patch_size, config.in_channels
        self.x_embedder = PatchEmbed(channels, width, patch)
        self.input_x_embedder = PatchEmbed(channels, width, patch)
        self.time_token = TimestepEmbedder(config.time_dim, width)
        self.t_embedder = TimestepEmbedder(config.time_dim, width)
        table = sincos_table(width, config.pos_embed_max_size, config.pos_embed_base_size)
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", table[None])  # in the published checkpoints, so kept in ours
        self.final_layer = FinalLayer(width, patch * patch * channels)
        self.llm = Phi3Model(_trunk(config))
        self._initialise()

    def _initialise(self) -> None:
        for patcher in (self.x_embedder.proj, self.input_x_embedder.proj):
            nn.init.xavier_uniform_(patcher.weight.view(patcher.weight.shape[0], -1))
            nn.init.zeros_(patcher.bias)
        for embedder in (self.time_token, self.t_embedder):
            for linear in (embedder.mlp[0], embedder.mlp[2]):
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)
        for linear in (self.final_layer.linear, self.final_layer.adaLN_modulation[1]):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, prompt: PromptBatch) -> Tensor:
        """Velocity of the noisy latents.

        Args:
            x_BCHW: noisy latents; H and W are multiples of the patch size.
            t_B: timesteps in [0, 1]; 0 is noise, 1 is data.
            prompt: token ids, and the latents of the condition images in the order of their placeholders.

        Returns:
            Tensor of the shape of `x_BCHW`.

        Raises:
            ValueError: an image is larger than the table of positions, or not a multiple of the patch.
        """
        height, width = x_BCHW.shape[-2:]
        hidden_BSD = self.hidden(x_BCHW, t_B, prompt)
        noisy_BND = hidden_BSD[:, prompt.ids_BL.shape[1] + 1 :]
        return self.unpatchify(self.final_layer(noisy_BND, self.t_embedder(t_B)), height, width)

    def hidden(self, x_BCHW: Tensor, t_B: Tensor, prompt: PromptBatch) -> Tensor:
        """The trunk's last hidden states [B, S, D] of the whole sequence."""
        condition_BLD = self.embed_prompt(prompt)
        noisy_BND = self.x_embedder(x_BCHW) + self.positions(*x_BCHW.shape[-2:])
        time_BD = self.time_token(t_B)
        embeds_BSD = torch.cat([condition_BLD, time_BD[:, None], noisy_BND], dim=1)
        allowed_BSS = hybrid_mask(prompt.valid_BL, prompt.blocks_BL, noisy_BND.shape[1])
        # transformers hands a 4-D mask through to the attention untouched
        return self.llm(
            inputs_embeds=embeds_BSD,
            attention_mask=additive(allowed_BSS, embeds_BSD)[:, None],
            position_ids=position_ids(prompt.valid_BL, noisy_BND.shape[1]),
            use_cache=False,
        ).last_hidden_state

    def embed_prompt(self, prompt: PromptBatch) -> Tensor:
        """Token embeddings [B, L, D], with the patches of the condition images in their places."""
        embeds_BLD = self.llm.embed_tokens(prompt.ids_BL)
        if not prompt.images:
            return embeds_BLD
        if len({image.shape for image in prompt.images}) == 1:
            stacked = torch.stack(list(prompt.images))
            tokens = self.input_x_embedder(stacked) + self.positions(*stacked.shape[-2:])
            tokens_MD = tokens.flatten(0, 1)
        else:
            parts = [self.input_x_embedder(i[None])[0] + self.positions(*i.shape[-2:])[0] for i in prompt.images]
            tokens_MD = torch.cat(parts)
        is_image_BL1 = (prompt.blocks_BL > 0)[..., None]
        return embeds_BLD.masked_scatter(is_image_BL1, tokens_MD.to(embeds_BLD.dtype))

    def positions(self, height: int, width: int) -> Tensor:
        """The table's centre, [1, H/P * W/P, D], for latents of this height and width."""
        patch, side = self.config.patch_size, self.config.pos_embed_max_size
        rows, columns = height // patch, width // patch
        if rows > side or columns > side or height % patch or width % patch:
            raise ValueError(
                f"latents of {height} x {width}: each side must be a multiple of {patch}, and at most {side * patch}"
            )
        top, left = (side - rows) // 2, (side - columns) // 2
        grid = self.pos_embed.view(side, side, -1)[top : top + rows, left : left + columns]
        return grid.reshape(1, rows * columns, -1)

    def unpatchify(self, patches_BNO: Tensor, height: int, width: int) -> Tensor:
        """[B, N, P * P * C] -> [B, C, H, W]."""
        patch, channels = self.config.patch_size, self.config.in_channels
        rows, columns = height // patch, width // patch
        grid = patches_BNO.view(-1, rows, columns, patch, patch, channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, height, width)


def hybrid_mask(valid_BL: Tensor, blocks_BL: Tensor, noisy: int) -> Tensor:
    """Which position (row) may look at which (column): bool [B, S, S] with S = L + 1 + noisy.

    Args:
        valid_BL: False on padding.
        blocks_BL: 0 on text, k > 0 on the tokens of the k-th condition image.
        noisy: number N of noisy tokens, which follow the time token.

    Rows of padding look everywhere, so that no softmax is empty; nothing looks at padding.
    """
    batch, length = valid_BL.shape
    total = length + 1 + noisy
    allowed_BSS = torch.ones(total, total, dtype=torch.bool, device=valid_BL.device).tril().repeat(batch, 1, 1)
    same_BLL = (blocks_BL[:, :, None] == blocks_BL[:, None, :]) & (blocks_BL > 0)[:, :, None]
    allowed_BSS[:, :length, :length] |= same_BLL
    allowed_BSS[:, length + 1 :] = True
    allowed_BSS[:, :, :length] &= valid_BL[:, None, :]
    allowed_BSS[:, :length] |= ~valid_BL[:, :, None]
    return allowed_BSS


def additive(allowed: Tensor, like: Tensor) -> Tensor:
    """0 where allowed, the type's lowest number elsewhere, in the type in which the attention computes."""
    device = like.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=like.device)
    return zeros.masked_fill(~allowed, torch.finfo(dtype).min)


def position_ids(valid_BL: Tensor, noisy: int) -> Tensor:
    """Positions [B, S] for the rotary embedding: 0 on padding, then 0, 1, 2 … through to the last noisy token."""
    batch = valid_BL.shape[0]
    rest = torch.ones(batch, 1 + noisy, dtype=torch.long, device=valid_BL.device)
    return (torch.cat([valid_BL.long(), rest], dim=1).cumsum(dim=1) - 1).clamp_min(0)


def sincos_table(width: int, side: int, base: int) -> Tensor:
    """Fixed positions [side * side, width]: half of the channels from x, half from y (as DiT, x first)."""
    axis = torch.arange(side, dtype=torch.float32) / (side / base)
    rate = 1.0 / 10_000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angle = axis.double()[:, None] * rate[None]
    line = torch.cat([angle.sin(), angle.cos()], dim=1)  # [side, width / 2]
    from_x = line[None].expand(side, side, -1)
    from_y = line[:, None].expand(side, side, -1)
    return torch.cat([from_x, from_y], dim=-1).reshape(side * side, width).float()


def _trunk(config: OmniGenConfig) -> Phi3Config:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    original = config.max_positions
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        original = scaling.original
        rope |= {
            "rope_type": "longrope",
            "short_factor": list(scaling.short_factor),
            "long_factor": list(scaling.long_factor),
            "original_max_position_embeddings": original,
        }
    return Phi3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.max_positions,
        original_max_position_embeddings=original,
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
