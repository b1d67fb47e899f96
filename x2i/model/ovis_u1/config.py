"""The numbers of Ovis-U1, its presets and the stages of its training. Light to import: no torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from x2i.base.config import Config
from x2i.model.config import ModelConfig
from x2i.model.layers.config import AIMv2Config, VisualTokenizerConfig
from x2i.model.ovis_u1.decoder_config import DecoderConfig


class Qwen3Numbers(Config):
    """All numbers of the language model, a Qwen3 whose output map is its token embedding. Defaults: Qwen3-1.7B."""

    hidden_size: int = Field(2048, gt=0, description="width D")
    layers: int = Field(28, gt=1, description="decoder layers; the last two give the decoder its context")
    heads: int = Field(16, gt=0, description="query heads")
    kv_heads: int = Field(8, gt=0, description="key and value heads")
    head_dim: int = Field(128, gt=0, description="width of a head; heads * head_dim need not be hidden_size")
    intermediate_size: int = Field(6144, gt=0, description="width of the SwiGLU")
    vocab_size: int = Field(151_936, gt=0, description="rows of the token embedding")
    norm_eps: float = Field(1e-6, gt=0, description="epsilon of the RMSNorms")
    rope_theta: float = Field(1_000_000.0, gt=0, description="base of the rotary frequencies")
    max_positions: int = Field(40_960, gt=0, description="longest sequence, in tokens")

    @model_validator(mode="after")
    def _check(self) -> Qwen3Numbers:
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ValueError("heads must be a multiple of kv_heads, and head_dim even")
        return self


class OvisU1Config(ModelConfig):
    """All numbers of an Ovis-U1. The defaults are those of the published 3-billion-parameter model."""

    architecture: ClassVar[str] = "ovis_u1"
    reading: ClassVar[tuple[str, ...]] = ("min_pixels", "max_pixels")

    llm: Qwen3Numbers = Field(default_factory=lambda: Qwen3Numbers(), description="the language model")
    tokenizer: VisualTokenizerConfig = Field(
        default_factory=lambda: VisualTokenizerConfig(), description="the visual tokenizer"
    )
    decoder: DecoderConfig = Field(default_factory=lambda: DecoderConfig(), description="what draws, with its refiner")
    min_pixels: int = Field(200_704, gt=0, description="fewest pixels of an image that is read; all for one drawn from")
    max_pixels: int = Field(2_408_448, gt=0, description="most pixels of an image that is read")
    max_tokens: int = Field(4496, gt=0, description="longest sequence with the visual tokens; longer ones are cut")

    @model_validator(mode="after")
    def _check(self) -> OvisU1Config:
        if self.decoder.context_in_dim != 2 * self.llm.hidden_size:
            raise ValueError("decoder.context_in_dim must be twice llm.hidden_size: two hidden states, side by side")
        if not self.tokenizer.encoder.rope:
            raise ValueError("tokenizer.encoder.rope must be true: images keep their own resolution")
        if self.tokenizer.indicators != 4:
            raise ValueError("tokenizer.indicators must be 4")
        if not 4 * self.image_factor**2 <= self.min_pixels <= self.max_pixels:
            raise ValueError("min_pixels must be at most max_pixels, and at least those of 2 x 2 visual tokens")
        return self

    @property
    def image_factor(self) -> int:
        """Pixels per side of a visual token."""
        return self.tokenizer.encoder.patch_size * self.tokenizer.encoder.hidden_stride

    @property
    def start_row(self) -> int:
        """Row of the visual table that begins an image; the next one ends it.

        The published code counts its four indicators from the fifth row before the end, so that this row is also that
        of the last visual word, and the last row is not used. Its weights are trained so, so it is kept.
        """
        return self.tokenizer.vocab_size - 5

    def adapted(self, *, vocab_size: int, latent_channels: int) -> OvisU1Config:
        values = latent_channels * self.decoder.patch_size**2
        return self.model_copy(
            update={
                "llm": self.llm.model_copy(update={"vocab_size": vocab_size}),
                "decoder": self.decoder.model_copy(update={"in_channels": values, "out_channels": values}),
            }
        )


#: Names of the paper for parts of the model -> prefixes of their parameters' names. By the paper's table the visual
#: head belongs to the encoder (578 M) and the visual embedding table is the adapter (135 M); `head` names the former.
PARTS: dict[str, tuple[str, ...]] = {
    "llm": ("llm.",),
    "encoder": ("visual_tokenizer.",),
    "head": ("visual_tokenizer.head.",),
    "adapter": ("vte.",),
    "refiner": ("visual_generator.backbone.txt_in.",),
    "decoder": tuple(
        f"visual_generator.backbone.{name}."
        for name in ("img_in", "time_in", "vector_in", "double_blocks", "single_blocks", "final_layer")
    ),
    "all": ("",),
}

#: What trains in each of the six stages (arXiv 2506.23044).
STAGES: dict[str, tuple[str, ...]] = {
    "s0": ("refiner", "decoder"),  # text to image
    "s1": ("adapter",),  # understanding, text to image, editing
    "s2": ("encoder", "adapter"),  # the same
    "s3": ("encoder", "adapter", "llm"),  # understanding
    "s4": ("refiner", "decoder"),  # text to image
    "s5": ("refiner", "decoder"),  # text to image, editing
}

PRESETS: dict[str, OvisU1Config] = {
    "ovis-u1-3b": OvisU1Config(),
    # for the demo and for tests: pictures of 32 pixels are 16 visual tokens to read, and 16 tokens to draw
    "ovis-u1-tiny": OvisU1Config(
        llm=Qwen3Numbers(
            hidden_size=128,
            layers=3,
            heads=4,
            kv_heads=2,
            head_dim=32,
            intermediate_size=256,
            vocab_size=1024,
            rope_theta=10_000.0,
            max_positions=2048,
        ),
        tokenizer=VisualTokenizerConfig(
            encoder=AIMv2Config(
                hidden_size=64, layers=2, heads=4, intermediate_size=128, patch_size=4, image_size=32, hidden_stride=2
            ),
            vocab_size=256,
        ),
        decoder=DecoderConfig(
            in_channels=192,
            out_channels=192,
            vec_in_dim=256,
            context_in_dim=256,
            hidden_size=256,
            mlp_ratio=2.0,
            heads=4,
            depth=1,
            depth_single=2,
            axes_dim=(16, 24, 24),
            time_dim=64,
            refiner_depth=1,
            refiner_heads=4,
        ),
        min_pixels=32 * 32,
        max_pixels=64 * 64,
        max_tokens=1024,
    ),
}
