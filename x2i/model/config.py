"""What configurations of models share, and the autoencoders. Light to import: no torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from x2i.base.config import Config


class ModelConfig(Config):
    """Base of all numbers of an architecture; `architecture` is the name of its package."""

    architecture: ClassVar[str]
    #: The numbers that say how words and pictures are read, and not what the network is: a stage may change them.
    reading: ClassVar[tuple[str, ...]] = ()

    @property
    def vocabulary(self) -> int:
        """Rows of the table of token embeddings."""
        holder: Any = getattr(self, "llm", self)
        return int(holder.vocab_size)

    def adapted(self, *, vocab_size: int, latent_channels: int) -> ModelConfig:
        """The same numbers for this tokenizer (rows that its table of embeddings must have) and this autoencoder."""
        raise NotImplementedError


class PixelsConfig(Config):
    """No autoencoder: the latents are the pixels, rearranged."""

    kind: Literal["pixels"] = "pixels"
    factor: int = Field(4, gt=0, description="pixels per latent side; channels are 3 * factor^2")
    scale: float = Field(1.0, gt=0, description="multiplies the latents; 2 gives photographs about unit variance")


class AutoencoderKLConfig(Config):
    """A pretrained autoencoder of diffusers, frozen."""

    kind: Literal["autoencoder_kl"]
    weights: str = Field(description="hub id (org/model[@revision]) or folder that save_pretrained wrote")


VAEConfig = Annotated[PixelsConfig | AutoencoderKLConfig, Field(discriminator="kind")]


class ModelFile(Config):
    """The content of a checkpoint's config.json: all that is needed to use its weights."""

    architecture: str = Field("omnigen", description="which model class")
    model: dict[str, Any] = Field(description="its numbers")
    vae: VAEConfig | None = Field(None, description="its autoencoder; null for models that draw nothing")
    max_text_tokens: int | None = Field(None, description="longest instruction that it was trained with")
    resolution: int = Field(512, description="side in pixels of the pictures of its last stage")
    chat_resolution: int | None = Field(
        None, description="shorter side in pixels of pictures that are asked about; default: `resolution`"
    )
    base: str | None = Field(None, description="the weights that its adapters change; null where it has all weights")
