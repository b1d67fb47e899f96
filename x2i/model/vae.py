"""Pixels to latents and back. Which autoencoder is configuration.

    {kind: pixels, factor: 4}                           space-to-depth: no weights, exactly invertible
    {kind: autoencoder_kl, weights: stabilityai/sdxl-vae}    a diffusers AutoencoderKL, by hub id or folder

Pixels are float [B, 3, H, W] in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from x2i.base.errors import X2IError
from x2i.base.weights import Weights
from x2i.model.config import AutoencoderKLConfig, PixelsConfig, VAEConfig


class VAE(Protocol):
    """What the trainer and the sampler need of an autoencoder."""

    channels: int  # of the latents
    shrink: int  # pixels per latent side

    def encode(self, pixels: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """[B, 3, H, W] -> [B, C, H / shrink, W / shrink]. Draws from one generator per row; without them, takes the mean.

        Pixels may lie on another device than the weights; the latents lie with the weights.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, 3, h * shrink, w * shrink], not clipped."""
        ...

    def to(self, device: torch.device) -> VAE:
        """Move the weights, if there are any."""
        ...


class Pixels:
    """Space-to-depth."""

    def __init__(self, config: PixelsConfig) -> None:
        self.shrink = config.factor
        self.channels = 3 * config.factor**2
        self._scale = config.scale

    def encode(self, pixels: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        return F.pixel_unshuffle(pixels, self.shrink) * self._scale

    def decode(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents, self.shrink) / self._scale

    def to(self, device: torch.device) -> Pixels:
        return self


class AutoencoderKL:
    """diffusers' AutoencoderKL: posterior sample, (z - shift) * scale, and back."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        import diffusers

        folder = Weights(config.weights).fetch()
        try:
            self._vae = diffusers.AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            raise X2IError(f"vae {config.weights}: {folder} holds no AutoencoderKL of diffusers ({error})") from None
        self.channels = int(self._vae.config.latent_channels)
        self.shrink = 2 ** (len(self._vae.config.block_out_channels) - 1)
        self._scale = float(self._vae.config.scaling_factor)
        self._shift = float(self._vae.config.shift_factor or 0.0)

    @property
    def module(self) -> Any:
        """diffusers' AutoencoderKL."""
        return self._vae

    @torch.no_grad()
    def encode(self, pixels: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        posterior = self._vae.encode(pixels.to(self._vae.device, self._vae.dtype)).latent_dist
        z = posterior.mode() if generators is None else posterior.sample(list(generators))
        return ((z - self._shift) * self._scale).to(pixels.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        z = latents.to(self._vae.dtype) / self._scale + self._shift
        return self._vae.decode(z).sample.to(latents.dtype)

    def to(self, device: torch.device) -> AutoencoderKL:
        self._vae.to(device)
        return self


def build(config: VAEConfig) -> VAE:
    """The autoencoder that a configuration names. Raises X2IError if its weights cannot be had."""
    return Pixels(config) if isinstance(config, PixelsConfig) else AutoencoderKL(config)
