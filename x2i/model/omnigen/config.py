"""The numbers of OmniGen, and its presets. Light to import: no torch."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from x2i.base.config import Config
from x2i.model.config import ModelConfig


class LongRope(Config):
    """Phi-3's rotary scaling for long sequences ("su", today "longrope")."""

    short_factor: tuple[float, ...] = Field(description="divisors of the frequencies up to `original` positions")
    long_factor: tuple[float, ...] = Field(description="divisors of the frequencies beyond")
    original: int = Field(4096, description="sequence length of the first pretraining, in tokens")


class OmniGenConfig(ModelConfig):
    """All numbers of an OmniGen. The defaults are those of the published 3.8-billion-parameter model."""

    architecture: ClassVar[str] = "omnigen"

    trunk: str = Field("phi3", description="decoder of transformers (model_type): phi3, qwen3, llama …")
    trunk_options: dict[str, Any] = Field(
        default_factory=dict, description="further numbers of the decoder, by transformers' names: head_dim …"
    )
    hidden_size: int = Field(3072, gt=0, description="width D of the trunk")
    layers: int = Field(32, gt=0, description="decoder layers")
    heads: int = Field(32, gt=0, description="query heads")
    kv_heads: int = Field(32, gt=0, description="key and value heads")
    intermediate_size: int = Field(8192, gt=0, description="width of the SwiGLU")
    vocab_size: int = Field(32064, gt=0, description="rows of the token embedding")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of the RMSNorms")
    rope_theta: float = Field(10_000.0, gt=0, description="base of the rotary frequencies")
    rope_scaling: LongRope | None = Field(None, description="rotary scaling for long sequences; null for none")
    max_positions: int = Field(131_072, gt=0, description="longest sequence, in tokens")
    in_channels: int = Field(4, gt=0, description="latent channels C")
    patch_size: int = Field(2, gt=0, description="latents per patch side P")
    pos_embed_max_size: int = Field(192, gt=0, description="patches per side of the table of positions")
    pos_embed_base_size: int = Field(64, gt=0, description="units that the table spans: one patch is base / max")
    time_dim: int = Field(256, gt=0, description="width of the sine-cosine features of the timestep")
    text_head: bool = Field(False, description="predict the next token too; the published model does not")
    tie_text_head: bool = Field(False, description="the text head is the token embedding, and no tensor of its own")

    @model_validator(mode="after")
    def _check(self) -> OmniGenConfig:
        if self.hidden_size % 4 or self.heads % self.kv_heads:
            raise ValueError("hidden_size must be a multiple of 4, and heads one of kv_heads")
        if self.hidden_size % self.heads and "head_dim" not in self.trunk_options:
            raise ValueError("hidden_size must be a multiple of heads, or trunk_options have a head_dim")
        if self.tie_text_head and not self.text_head:
            raise ValueError("tie_text_head without text_head: there is no text head to tie")
        return self

    def adapted(self, *, vocab_size: int, latent_channels: int) -> OmniGenConfig:
        return self.model_copy(update={"vocab_size": vocab_size, "in_channels": latent_channels})


# Phi-3-mini-128k's factors, one per rotated frequency (head_dim 96 / 2).
_PHI3_128K = LongRope(
    short_factor=(
        *(1.05, 1.05, 1.05, 1.1, 1.1, 1.1, 1.25, 1.25, 1.4, 1.45, 1.55, 1.85, 1.9, *[2.0] * 19, 2.1, 2.1),
        *(2.2, 2.35, 2.35, 2.35, 2.35, 2.4, 2.4, 2.65, 2.7, 2.9, 2.95, 3.05, 3.05, 3.05),
    ),
    long_factor=(
        *(1.03, 1.05, 1.05, 1.08, 1.23, 1.23, 1.3, 1.45, 1.6, 1.65, 1.9, 2.86, 3.69, 5.42, 5.49, 5.49, 9.09),
        *(11.58, 15.66, 15.77, 15.79, 18.36, 21.99, 23.08, 30.01, 32.35, 32.59, 35.56, 39.95, 53.84, 56.2),
        *(57.95, 59.29, 59.77, 59.92, 61.19, 61.96, 62.5, 63.37, 63.48, 63.48, 63.66, 63.85, 64.08, 64.76),
        *(64.8, 64.81, 64.81),
    ),
)

PRESETS: dict[str, OmniGenConfig] = {
    "omnigen-3.8b": OmniGenConfig(rope_scaling=_PHI3_128K),
    # for the demo and for tests: the text head costs no parameters; patches one unit apart, so that few steps suffice to tell neighbours apart
    "omnigen-tiny": OmniGenConfig(
        hidden_size=256,
        layers=4,
        heads=8,
        kv_heads=8,
        intermediate_size=512,
        vocab_size=1024,
        max_positions=4096,
        in_channels=48,
        pos_embed_max_size=64,
        pos_embed_base_size=64,
        time_dim=64,
        text_head=True,
        tie_text_head=True,
    ),
    # the same design on another trunk: Qwen3-1.7B, whose tokens it shares
    "omnigen-qwen3-1.7b": OmniGenConfig(
        trunk="qwen3",
        trunk_options={"head_dim": 128},
        hidden_size=2048,
        layers=28,
        heads=16,
        kv_heads=8,
        intermediate_size=6144,
        vocab_size=151_936,
        norm_eps=1e-6,
        rope_theta=1_000_000.0,
        max_positions=40_960,
        text_head=True,
        tie_text_head=True,
    ),
}
