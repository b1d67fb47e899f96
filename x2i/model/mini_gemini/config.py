"""The numbers of Mini-Gemini, its presets and its two stages. Light to import: no torch."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from x2i.base.config import Config
from x2i.model.config import ModelConfig

TemplateName = Literal["gemma", "vicuna_v1", "llama_3"]
Aspect = Literal["pad", "crop"]


class LanguageModelConfig(Config):
    """A causal language model of transformers whose logits are `lm_head` of its last hidden states."""

    model_type: str = Field(description="its name in transformers: gemma, llama, mistral, qwen2, …")
    vocab_size: int = Field(gt=0, description="rows of the token embedding")
    hidden_size: int = Field(gt=0, description="width D")
    numbers: dict[str, Any] = Field({}, description="further arguments of its configuration in transformers")


class LowConfig(Config):
    """The encoder of the low-resolution view: CLIP. The defaults are those of ViT-L/14 at 336 pixels."""

    image_size: int = Field(336, gt=0, description="pixels per side of one view")
    patch_size: int = Field(14, gt=0, description="pixels per patch side")
    hidden_size: int = Field(1024, gt=0, description="width C")
    layers: int = Field(24, gt=0, description="transformer layers of the checkpoint")
    heads: int = Field(16, gt=0, description="attention heads")
    intermediate_size: int = Field(4096, gt=0, description="width of the MLP")
    projection_dim: int = Field(768, gt=0, description="width of CLIP's joint space; no weight of ours has it")
    select_layer: int = Field(-2, lt=0, description="whose hidden states are the tokens: -1 is the last layer")

    @property
    def side(self) -> int:
        """Tokens per side of one view."""
        return self.image_size // self.patch_size


class HighConfig(Config):
    """The encoder of the high-resolution view: a ConvNeXt. The defaults are those of OpenCLIP's ConvNeXt-L."""

    image_size: int = Field(768, gt=0, description="pixels per side of the high-resolution view")
    widths: tuple[int, int, int, int] = Field((192, 384, 768, 1536), description="channels of the four stages")
    depths: tuple[int, int, int, int] = Field((3, 3, 27, 3), description="blocks of the four stages")

    @property
    def channels(self) -> int:
        """Channels of all stages together."""
        return sum(self.widths)


class MiniGeminiConfig(ModelConfig):
    """All numbers of a Mini-Gemini. Those of its encoders default to the published ones."""

    architecture: ClassVar[str] = "mini_gemini"
    reading: ClassVar[tuple[str, ...]] = ("template", "aspect")

    llm: LanguageModelConfig = Field(description="the language model")
    low: LowConfig = Field(default_factory=lambda: LowConfig(), description="encoder of the low-resolution view")
    high: HighConfig = Field(default_factory=lambda: HighConfig(), description="encoder of the high-resolution view")
    grid: int = Field(1, gt=0, description="low-resolution crops per side; 2 is the published HD")
    overview: bool = Field(False, description="with a grid: the whole image too, as one more low-resolution view")
    template: TemplateName = Field(description="how conversations are written")
    aspect: Aspect = Field("pad", description="oblong images are padded to a square, or cropped to one")

    @model_validator(mode="after")
    def _check(self) -> MiniGeminiConfig:
        low, high = self.low, self.high
        if low.image_size % low.patch_size or low.hidden_size % low.heads:
            raise ValueError("low: image_size must be a multiple of patch_size, and hidden_size of heads")
        if -low.select_layer > low.layers + 1:
            raise ValueError(f"low.select_layer {low.select_layer}: there are {low.layers} layers")
        if high.image_size % 32 or high.image_size // 4 % (self.grid * low.side):
            raise ValueError(
                f"high.image_size must be a multiple of 32 and of 4 * grid * {low.side} (the low view's tokens per side)"
            )
        if self.overview and self.grid == 1:
            raise ValueError("overview: without a grid the one view is the whole image already")
        return self

    @property
    def views(self) -> int:
        """Low-resolution views per image."""
        return self.grid**2 + self.overview

    @property
    def image_tokens(self) -> int:
        """Tokens that an image takes up in the language model."""
        return self.views * self.low.side**2

    def adapted(self, *, vocab_size: int, latent_channels: int) -> MiniGeminiConfig:
        return self.model_copy(update={"llm": self.llm.model_copy(update={"vocab_size": vocab_size})})


class Recipe(Config):
    """How MGM trains a stage (its scripts/*/train). The encoders stay frozen in both."""

    train: tuple[str, ...] = Field(description="names of `MiniGemini.parts`")
    learning_rate: float = Field(description="peak; cosine to zero after the warm-up")
    batch: int = Field(description="samples per step")
    warmup: float = Field(0.03, description="share of the steps")
    weight_decay: float = Field(0.0, description="of AdamW")
    epochs: int = Field(1, description="passes over the data")
    plain: bool = Field(False, description="captions without the chat's template")
    aspect: Aspect = Field("pad", description="of oblong images")


#: The stages as published. Captions are plain for Vicuna; the scripts for Gemma and Llama 3 keep the chat's template.
RECIPES: dict[str, Recipe] = {
    "alignment": Recipe(train=("projector", "mining"), learning_rate=1e-3, batch=256, plain=True, aspect="crop"),
    "instruction": Recipe(train=("projector", "mining", "llm"), learning_rate=2e-5, batch=128),
}
#: What trains in each stage.
STAGES: dict[str, tuple[str, ...]] = {name: recipe.train for name, recipe in RECIPES.items()}

_GEMMA_2B = LanguageModelConfig(
    model_type="gemma",
    vocab_size=256_000,
    hidden_size=2048,
    numbers={
        "intermediate_size": 16_384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "max_position_embeddings": 8192,
    },
)
_VICUNA_7B = LanguageModelConfig(
    model_type="llama",
    vocab_size=32_000,
    hidden_size=4096,
    numbers={
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
)
_VICUNA_13B = LanguageModelConfig(
    model_type="llama",
    vocab_size=32_000,
    hidden_size=5120,
    numbers={
        "intermediate_size": 13_824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
)
_LLAMA3_8B = LanguageModelConfig(
    model_type="llama",
    vocab_size=128_256,
    hidden_size=4096,
    numbers={
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    },
)
_PLAIN: dict[str, MiniGeminiConfig] = {
    "mgm-2b": MiniGeminiConfig(llm=_GEMMA_2B, template="gemma"),
    "mgm-7b": MiniGeminiConfig(llm=_VICUNA_7B, template="vicuna_v1"),
    "mgm-8b": MiniGeminiConfig(llm=_LLAMA3_8B, template="llama_3"),
    "mgm-13b": MiniGeminiConfig(llm=_VICUNA_13B, template="vicuna_v1"),
}
_HD = {"high": HighConfig(image_size=1536), "grid": 2, "overview": True}

PRESETS: dict[str, MiniGeminiConfig] = {
    **_PLAIN,
    **{f"{name}-hd": config.model_copy(update=_HD) for name, config in _PLAIN.items()},
    # for the demo and for tests
    "mini-gemini-tiny": MiniGeminiConfig(
        llm=LanguageModelConfig(
            model_type="gemma",
            vocab_size=1024,
            hidden_size=64,
            numbers={
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 1,
                "head_dim": 16,
                "max_position_embeddings": 2048,
            },
        ),
        low=LowConfig(image_size=32, patch_size=8, hidden_size=32, layers=2, heads=2, intermediate_size=64),
        high=HighConfig(image_size=64, widths=(16, 24, 32, 40), depths=(1, 1, 2, 1)),
        template="gemma",
    ),
}
