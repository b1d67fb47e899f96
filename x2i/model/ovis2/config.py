"""The numbers of Ovis2, its presets and its stages. Light to import: no torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from x2i.base.config import Config
from x2i.model.config import ModelConfig
from x2i.model.layers.config import AIMv2Config, VisualTokenizerConfig

# apple/aimv2-{large,huge,1B}-patch14-448
_LARGE = AIMv2Config(rope=False)
_HUGE = AIMv2Config(hidden_size=1536, heads=12, intermediate_size=4096, rope=False)
_1B = AIMv2Config(hidden_size=2048, heads=16, intermediate_size=5632, rope=False)


class Qwen2Numbers(Config):
    """All numbers of the language model. The defaults are those of Qwen2.5-0.5B-Instruct."""

    hidden_size: int = Field(896, gt=0, description="width D")
    layers: int = Field(24, gt=0, description="decoder layers")
    heads: int = Field(14, gt=0, description="query heads")
    kv_heads: int = Field(2, gt=0, description="key and value heads")
    intermediate_size: int = Field(4864, gt=0, description="width of the SwiGLU")
    vocab_size: int = Field(151_936, gt=0, description="rows of the token embedding")
    tied: bool = Field(True, description="the output map is the token embedding")
    norm_eps: float = Field(1e-6, gt=0, description="epsilon of the RMSNorms")
    rope_theta: float = Field(1_000_000.0, gt=0, description="base of the rotary frequencies")
    max_positions: int = Field(32_768, gt=0, description="longest sequence, in tokens")

    @model_validator(mode="after")
    def _check(self) -> Qwen2Numbers:
        if self.hidden_size % self.heads or self.heads % self.kv_heads:
            raise ValueError("hidden_size must be a multiple of heads, and heads a multiple of kv_heads")
        return self


class Tiles(Config):
    """Most tiles of an image, by what it comes with; its view as a whole is not counted."""

    single: int = Field(9, gt=0, description="an image alone")
    several: int = Field(4, gt=0, description="one of several images")
    video: int = Field(1, gt=0, description="a frame")
    covering: float = Field(0.9, gt=0, lt=1, description="share of the area that a grid of few tiles must keep")


class Ovis2Config(ModelConfig):
    """All numbers of an Ovis2. The defaults are those of Ovis2-1B."""

    architecture: ClassVar[str] = "ovis2"
    reading: ClassVar[tuple[str, ...]] = ("tiles", "max_length", "caption_template")

    llm: Qwen2Numbers = Field(default_factory=lambda: Qwen2Numbers(), description="the language model")
    tokenizer: VisualTokenizerConfig = Field(
        default_factory=lambda: VisualTokenizerConfig(encoder=_LARGE, indicators=5), description="the visual tokenizer"
    )
    tiles: Tiles = Field(default_factory=lambda: Tiles(), description="how images are cut")
    max_length: int = Field(32_768, gt=0, description="longest sequence with the visual tokens; longer ones are cut")
    caption_template: str = Field(
        "<image>\nDescription:\n", description="what stands around the image in front of a bare caption; see TEMPLATES"
    )

    @model_validator(mode="after")
    def _check(self) -> Ovis2Config:
        if self.tokenizer.indicators != 5:
            raise ValueError("tokenizer.indicators must be 5: start, mid, column, row, end")
        if self.tokenizer.encoder.rope:
            raise ValueError("tokenizer.encoder.rope must be false: tiles have one size")
        if self.caption_template.count("<image>") != 1:
            raise ValueError("caption_template must have one <image>")
        return self

    @property
    def side(self) -> int:
        """Pixels per side of a tile."""
        return self.tokenizer.encoder.image_size

    @property
    def tile_tokens(self) -> int:
        """Visual tokens of a tile."""
        return (self.side // (self.tokenizer.encoder.patch_size * self.tokenizer.encoder.hidden_stride)) ** 2

    def adapted(self, *, vocab_size: int, latent_channels: int) -> Ovis2Config:
        """The same numbers for this tokenizer; there is no autoencoder."""
        return self.model_copy(update={"llm": self.llm.model_copy(update={"vocab_size": vocab_size})})


def parts(config: Ovis2Config) -> dict[str, tuple[str, ...]]:
    """Names of the papers for parts of the model -> prefixes of their parameters' names."""
    return {
        "llm": ("llm.",),
        "encoder": ("visual_tokenizer.backbone.",),
        "last_block": (f"visual_tokenizer.backbone.trunk.blocks.{config.tokenizer.encoder.layers - 1}.",),
        "head": ("visual_tokenizer.head.",),
        "table": ("vte.",),
        "all": ("",),
    }


#: What trains in each stage. 1a and 1b read bare captions (`TEMPLATES`), the others conversations; 1b has more tiles
#: than 1a. In 1a the head and the table start anew, the table from the mean and deviation of the token embedding.
#: That the whole encoder trains in 1b and 2 is taken from Ovis 1 and 1.5, whose second stage does so; of Ovis2 it is
#: known that the language model is frozen in both.
#: The scripts of Ovis 1 and 1.5 (three stages: 1a, 2, 3): lr 1e-4; 1e-4, in 1.5 5e-5; 2e-5, in 1.5 1e-5. Cosine, clip
#: 1. In version 1 the last block starts anew too.
STAGES: dict[str, tuple[str, ...]] = {
    "1a": ("last_block", "head", "table"),
    "1b": ("encoder", "head", "table"),
    "2": ("encoder", "head", "table"),
    "3": ("all",),
    "4": ("all",),  # direct preference optimisation
}

#: What stands around the image in front of a bare caption (AIDC-AI/Ovis: v1's script, and v1.5's dataset_info).
TEMPLATES: dict[str, str] = {
    "caption": "<image>'s caption: ",
    "description": "<image>\nDescription:\n",
    "text": "<image>\nText:\n",
    "entry": "<image>\nEntry:\n",
}


def _published(encoder: AIMv2Config, llm: Qwen2Numbers) -> Ovis2Config:
    return Ovis2Config(llm=llm, tokenizer=VisualTokenizerConfig(encoder=encoder, indicators=5))


# The encoder and the language model of each size: model card of AIDC-AI/Ovis2-4B.
PRESETS: dict[str, Ovis2Config] = {
    "ovis2-1b": Ovis2Config(),
    "ovis2-2b": _published(
        _LARGE, Qwen2Numbers(hidden_size=1536, layers=28, heads=12, kv_heads=2, intermediate_size=8960)
    ),
    "ovis2-4b": _published(
        _HUGE, Qwen2Numbers(hidden_size=2048, layers=36, heads=16, kv_heads=2, intermediate_size=11_008)
    ),
    "ovis2-8b": _published(
        _HUGE,
        Qwen2Numbers(
            hidden_size=3584, layers=28, heads=28, kv_heads=4, intermediate_size=18_944, vocab_size=152_064, tied=False
        ),
    ),
    "ovis2-16b": _published(
        _HUGE,
        Qwen2Numbers(
            hidden_size=5120, layers=48, heads=40, kv_heads=8, intermediate_size=13_824, vocab_size=152_064, tied=False
        ),
    ),
    "ovis2-34b": _published(
        _1B,
        Qwen2Numbers(
            hidden_size=5120, layers=64, heads=40, kv_heads=8, intermediate_size=27_648, vocab_size=152_064, tied=False
        ),
    ),
    # for the demo and for tests: tiles of 16 visual tokens
    "ovis2-tiny": Ovis2Config(
        llm=Qwen2Numbers(
            hidden_size=128,
            layers=4,
            heads=4,
            kv_heads=2,
            intermediate_size=256,
            vocab_size=1024,
            rope_theta=10_000.0,
            max_positions=2048,
        ),
        tokenizer=VisualTokenizerConfig(
            encoder=AIMv2Config(
                hidden_size=64,
                layers=3,
                heads=4,
                intermediate_size=128,
                patch_size=4,
                image_size=32,
                rope=False,
            ),
            vocab_size=256,
            indicators=5,
        ),
        tiles=Tiles(single=4, several=2),
        max_length=1024,
    ),
}
