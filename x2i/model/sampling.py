"""Draw pictures with any model that draws: requests in, pictures out, with guidance by text and by images.

A guided step is a weighted sum of velocities, one for each branch (everything; the images only; nothing …): which
branches there are, and what they are shown, the model's processor says. All branches go through the network in one
batch, or kind by kind; what does not depend on the timestep is computed once a picture.

Tensor names carry their axes: B pictures · C latent channels · H, W latent height and width.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from x2i.base.errors import X2IError
from x2i.model import flow
from x2i.model.base import Model, Processor, Request
from x2i.model.pixels import centre_crop, fit, to_images
from x2i.model.placeholders import with_placeholders
from x2i.model.vae import VAE


@dataclass(frozen=True)
class Options:
    """How to draw.

    Attributes:
        height, width: of the picture in pixels; multiples of `Painter.token_side`.
        steps: Euler steps from noise to data.
        guidance: weight of the text; 1 is no guidance.
        image_guidance: weight of the input images; 1 is no guidance. Matters only with images.
        seed: of the noise; picture i of a batch draws from (seed, i).
        shift: bends the timesteps (`flow.timesteps`); None: as the model does at this size.
        separate: one pass through the network for each kind of branch: slower, less memory.
        cache: keep keys and values of the condition, so that a step computes the picture alone.
        offload_cache: keep them in host memory, layer by layer on the device: slower, less memory.
        negative: instruction of the unconditional branch; None: the model's own.
    """

    height: int
    width: int
    steps: int = 50
    guidance: float = 2.5
    image_guidance: float = 1.6
    seed: int = 0
    shift: float | None = None
    separate: bool = False
    cache: bool = True
    offload_cache: bool = False
    negative: str | None = None


class Painter:
    """A model, its autoencoder and its processor, ready to draw."""

    def __init__(self, model: Model[Any], vae: VAE, processor: Processor[Any]) -> None:
        self.model = model
        self.vae = vae
        self.processor = processor

    @property
    def token_side(self) -> int:
        """Pixels per side of one token."""
        return self.processor.token_side

    def generate(
        self,
        instruction: str,
        images: Sequence[Image.Image] = (),
        *,
        height: int,
        width: int,
        max_input: int | None = None,
        **options: Any,
    ) -> Image.Image:
        """Draw one picture.

        Args:
            instruction: one without any placeholder gets those of the images put in front.
            images: cropped around their centre to the picture's size, or see `max_input`.
            height, width: of the picture in pixels.
            max_input: keep the input images' own aspect, no side longer than this (`pixels.fit`).
            options: the others of `Options`.

        Raises:
            X2IError: sizes that are no multiples of a token, or placeholders that do not match the images.
        """
        wanted = Options(height, width, **options)
        self.check(wanted)
        if max_input is None:
            arrays = tuple(centre_crop(image, height, width) for image in images)
        else:
            arrays = tuple(fit(image, max_input, self.token_side) for image in images)
        return self.paint([Request(with_placeholders(instruction, len(arrays)), arrays)], wanted)[0]

    def check(self, options: Options) -> None:
        """Raise X2IError if these sizes or steps cannot be drawn."""
        self.processor.check_size(options.height, options.width)
        if options.offload_cache and "offload" not in inspect.signature(self.model.condition).parameters:
            raise X2IError(f"{type(self.model).__name__} cannot keep its cache in host memory: leave offload_cache out")
        if options.steps < 1:
            raise X2IError(f"steps {options.steps}: must be at least 1")
        for name in ("guidance", "image_guidance"):
            if not math.isfinite(value := getattr(options, name)):
                raise X2IError(f"{name} {value}: must be a number")

    def paint(
        self, requests: Sequence[Request], options: Options, noise_BCHW: Tensor | None = None
    ) -> list[Image.Image]:
        """Draw one picture per request, all in one batch. Arguments and errors as `draw`."""
        return to_images(self.draw(requests, options, noise_BCHW))

    @torch.no_grad()
    def draw(self, requests: Sequence[Request], options: Options, noise_BCHW: Tensor | None = None) -> Tensor:
        """As `paint`, but pixels: float32 [B, 3, height, width], about [-1, 1], not clipped.

        Args:
            requests: what to draw.
            options: how.
            noise_BCHW: where to start from, instead of noise from the seed: float [B, C, H, W] of latents.

        Raises:
            X2IError: sizes or steps that cannot be drawn, placeholders that do not match the images, noise of
                another shape.
        """
        self.check(options)
        if not requests:
            raise X2IError("nothing to draw: no request was given")
        noise = self._noise(len(requests), options) if noise_BCHW is None else noise_BCHW
        if tuple(noise.shape) != (len(requests), *self.latent_shape(options)):
            expected = [len(requests), *self.latent_shape(options)]
            raise X2IError(f"noise of shape {list(noise.shape)}: expected {expected} for these requests and options")
        training = self.model.training
        self.model.eval()
        try:
            latents = self._integrate(requests, options, noise.float())
        finally:
            self.model.train(training)
        return self.vae.decode(latents).float()

    def latent_shape(self, options: Options) -> tuple[int, int, int]:
        """Channels, height and width of the latents of one picture."""
        return self.vae.channels, options.height // self.vae.shrink, options.width // self.vae.shrink

    def _integrate(self, requests: Sequence[Request], options: Options, noise_BCHW: Tensor) -> Tensor:
        parameter = next(self.model.parameters())
        device, dtype = parameter.device, parameter.dtype
        branches = self.processor.branches(
            requests,
            height=options.height,
            width=options.width,
            guidance=options.guidance,
            image_guidance=options.image_guidance,
            separate=options.separate,
            negative=options.negative,
        )
        target = (noise_BCHW.shape[-2], noise_BCHW.shape[-1])
        aside = {"offload": True} if options.cache and options.offload_cache else {}
        parts = []
        for branch in branches:
            condition = self.model.condition(branch.inputs.to(device), cache=options.cache, target=target, **aside)
            parts.append((condition, branch.rows_R.to(device), branch.weights_R.to(device).float()))

        def velocity(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
            total = torch.zeros_like(x_BCHW)
            for condition, rows_R, weights_R in parts:
                each = self.model.velocity(x_BCHW[rows_R].to(dtype), t_B[rows_R], condition)
                total.index_add_(0, rows_R, each.float() * weights_R[:, None, None, None])
            return total

        own = self.processor.shift(options.height, options.width)
        return flow.euler(
            velocity, noise_BCHW.to(device), options.steps, own if options.shift is None else options.shift
        )

    def _noise(self, count: int, options: Options) -> Tensor:
        shape = self.latent_shape(options)
        generators = (torch.Generator().manual_seed(options.seed + 1_000_003 * i) for i in range(count))
        return torch.stack([torch.randn(shape, generator=g) for g in generators])
