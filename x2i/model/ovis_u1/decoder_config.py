"""The numbers of Ovis-U1's decoder. Light to import: no torch."""

from __future__ import annotations

from pydantic import Field, model_validator

from x2i.base.config import Config


class DecoderConfig(Config):
    """All numbers of the decoder and its refiner. The defaults are the published configuration of Ovis-U1-3B.

    They give the published count of parameters; the 27 layers and 16 heads that the paper's text names do not.
    """

    in_channels: int = Field(16, gt=0, description="values of a token: latent channels * patch_size^2")
    out_channels: int = Field(16, gt=0, description="values of the velocity of a token")
    patch_size: int = Field(2, gt=0, description="latents per token side")
    vec_in_dim: int = Field(1536, gt=0, description="width of the refiner's summary; equal to hidden_size")
    context_in_dim: int = Field(4096, gt=0, description="width E of the context: two hidden states of the LLM")
    hidden_size: int = Field(1536, gt=0, description="width D")
    mlp_ratio: float = Field(4.0, gt=0, description="width of the MLPs over D")
    heads: int = Field(12, gt=0, description="attention heads")
    depth: int = Field(6, ge=0, description="double blocks: text and image with weights of their own")
    depth_single: int = Field(12, ge=0, description="single blocks: one stream")
    axes_dim: tuple[int, int, int] = Field((16, 56, 56), description="values of a head per position axis")
    theta: float = Field(10_000.0, gt=0, description="base of the rotary frequencies")
    qkv_bias: bool = Field(True, description="bias of the query, key and value maps in double blocks")
    time_dim: int = Field(256, gt=0, description="width of the sine-cosine features of the timestep")
    refiner_depth: int = Field(2, ge=0, description="blocks of the refiner")
    refiner_heads: int = Field(24, gt=0, description="attention heads of the refiner")
    base_shift: float = Field(0.5, description="mu of the time shift at 256 tokens")
    max_shift: float = Field(1.15, description="mu of the time shift at 4096 tokens")

    @model_validator(mode="after")
    def _check(self) -> DecoderConfig:
        if self.hidden_size % self.heads or self.hidden_size % self.refiner_heads:
            raise ValueError("hidden_size must be a multiple of heads and of refiner_heads")
        if sum(self.axes_dim) != self.hidden_size // self.heads or any(n % 2 for n in self.axes_dim):
            raise ValueError("axes_dim must be even numbers whose sum is hidden_size / heads")
        if self.vec_in_dim != self.hidden_size:
            raise ValueError("vec_in_dim must equal hidden_size: the refiner's summary has that width")
        if self.in_channels % self.patch_size**2 or self.in_channels != self.out_channels:
            raise ValueError("in_channels must be a multiple of patch_size^2, and equal to out_channels")
        return self
