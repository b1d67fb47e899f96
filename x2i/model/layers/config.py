"""The numbers of layers that several models share. Light to import: no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from x2i.base.config import Config


class AIMv2Config(Config):
    """All numbers of an AIMv2 image encoder. The defaults are those of the large one in Ovis-U1."""

    hidden_size: int = Field(1024, gt=0, description="width D")
    layers: int = Field(24, gt=0, description="transformer blocks")
    heads: int = Field(8, gt=0, description="attention heads")
    intermediate_size: int = Field(2816, gt=0, description="width of the SwiGLU")
    patch_size: int = Field(14, gt=0, description="pixels per patch side")
    image_size: int = Field(448, gt=0, description="pixels per side that the table of positions was made for")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of the RMSNorms")
    rope: bool = Field(
        True,
        description="native resolution: the table of positions is interpolated, and queries and keys are rotated in 2-D"
        " (Ovis-U1); false: images of one size, fixed table (apple/aimv2, Ovis2)",
    )
    hidden_stride: int = Field(2, gt=0, description="patches per side of a block; blocks of patches lie together")
    qkv_bias: bool = Field(False, description="bias of the query, key and value maps")
    use_bias: bool = Field(False, description="bias of the attention's output map and of the SwiGLU")

    @model_validator(mode="after")
    def _check(self) -> AIMv2Config:
        if self.hidden_size % self.heads:
            raise ValueError("hidden_size must be a multiple of heads")
        if self.rope and (self.hidden_size // self.heads) % 4:
            raise ValueError("hidden_size / heads must be a multiple of 4 for 2-D rotary positions")
        if self.image_size % (self.patch_size * self.hidden_stride):
            raise ValueError("image_size must be a multiple of patch_size * hidden_stride")
        return self


class VisualTokenizerConfig(Config):
    """Encoder and head that turn an image into probabilities over a visual vocabulary (Ovis)."""

    encoder: AIMv2Config = Field(default_factory=lambda: AIMv2Config(), description="the image encoder")
    vocab_size: int = Field(65_536, gt=0, description="rows of the visual embedding table, indicators included")
    indicators: int = Field(4, ge=0, description="last rows, kept for marks around images: 4 (U1, Ovis2.5), 5 (Ovis2)")
    tokenize: Literal["softmax", "gumbel_argmax", "st_argmax"] = Field(
        "softmax", description="how logits become weights of the table's rows"
    )
    tau: float = Field(1.0, gt=0, description="temperature of gumbel_argmax")

    @model_validator(mode="after")
    def _check(self) -> VisualTokenizerConfig:
        if self.indicators >= self.vocab_size:
            raise ValueError("vocab_size must be larger than indicators")
        return self


def to_published_encoder(encoder: AIMv2Config) -> dict[str, Any]:
    """The keys that every published config.json has of an AIMv2 (apple/aimv2, AIDC-AI/Ovis, AIDC-AI/Ovis-U1)."""
    return {
        "hidden_size": encoder.hidden_size,
        "num_hidden_layers": encoder.layers,
        "num_attention_heads": encoder.heads,
        "num_channels": 3,
        "intermediate_size": encoder.intermediate_size,
        "patch_size": encoder.patch_size,
        "image_size": encoder.image_size,
        "rms_norm_eps": encoder.norm_eps,
        "attention_dropout": 0.0,
        "qkv_bias": encoder.qkv_bias,
    }
