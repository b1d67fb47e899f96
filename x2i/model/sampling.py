"""Draw images with a trained model: prompts in, pictures out, with two-way guidance by text and by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from x2i.base.errors import X2IError
from x2i.model import flow
from x2i.model.omnigen import OmniGen
from x2i.model.pixels import centre_crop, to_images, to_tensor
from x2i.model.prompt import UNCONDITIONAL, Prompt, PromptEncoder, collate, image_only, with_placeholders
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
    """

    height: int
    width: int
    steps: int = 50
    guidance: float = 2.5
    image_guidance: float = 1.6
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """What to draw: an instruction, and its input images as uint8 [H, W, 3], in the order of the placeholders."""

    instruction: str
    images: tuple[np.ndarray, ...] = ()


class Painter:
    """A model, its autoencoder and its tokenizer, ready to draw."""

    def __init__(self, model: OmniGen, vae: VAE, encoder: PromptEncoder) -> None:
        self.model = model
        self.vae = vae
        self.encoder = encoder

    @property
    def token_side(self) -> int:
        """Pixels per side of one token."""
        return self.vae.shrink * self.model.config.patch_size

    def generate(
        self,
        instruction: str,
        images: Sequence[Image.Image] = (),
        *,
        height: int,
        width: int,
        seed: int = 0,
        steps: int = 50,
        guidance: float = 2.5,
        image_guidance: float = 1.6,
    ) -> Image.Image:
        """Draw one picture. Input images are cropped around their centre to the picture's size.

        Raises:
            X2IError: sizes that are no multiples of a token, or placeholders that do not match the images.
                An instruction without any placeholder gets them put in front.
        """
        options = Options(height, width, steps, guidance, image_guidance, seed)
        self.check(options)
        arrays = tuple(centre_crop(image, height, width) for image in images)
        return self.paint([Request(with_placeholders(instruction, len(arrays)), arrays)], options)[0]

    def check(self, options: Options) -> None:
        """Raise X2IError if these sizes or steps cannot be drawn."""
        side, limit = self.token_side, self.token_side * self.model.config.pos_embed_max_size
        for name, value in (("height", options.height), ("width", options.width)):
            if value % side or not 0 < value <= limit:
                raise X2IError(f"{name} {value}: must be a multiple of {side}, and at most {limit} pixels")
        if options.steps < 1:
            raise X2IError(f"steps {options.steps}: must be at least 1")

    @torch.no_grad()
    def paint(self, requests: Sequence[Request], options: Options) -> list[Image.Image]:
        """Draw one picture per request, all in one batch."""
        self.check(options)
        device = next(self.model.parameters()).device
        latents = [self._encode(r.images, device) for r in requests]
        branches = self._branches(requests, latents, options)
        batch = collate([b.prompt for b in branches], [b.images for b in branches]).to(device)
        rows = torch.tensor([b.row for b in branches], device=device)
        weights = torch.tensor([b.weight for b in branches], device=device)

        def velocity(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
            each = self.model(x_BCHW[rows], t_B[rows], batch)
            return torch.zeros_like(x_BCHW).index_add_(0, rows, each * weights[:, None, None, None])

        training = self.model.training
        self.model.eval()
        noise = self._noise(len(requests), options).to(device)
        drawn = self.vae.decode(flow.euler(velocity, noise, options.steps))
        self.model.train(training)
        return to_images(drawn)

    def _encode(self, images: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
        return [self.vae.encode(to_tensor([image]).to(device))[0] for image in images]

    def _noise(self, count: int, options: Options) -> Tensor:
        shape = (self.vae.channels, options.height // self.vae.shrink, options.width // self.vae.shrink)
        generators = (torch.Generator().manual_seed(options.seed + 1_000_003 * i) for i in range(count))
        return torch.stack([torch.randn(shape, generator=g) for g in generators])

    def _branches(
        self, requests: Sequence[Request], latents: Sequence[list[Tensor]], options: Options
    ) -> list[_Branch]:
        out = []
        for row, (request, images) in enumerate(zip(requests, latents, strict=True)):
            tokens = [i.shape[-2] * i.shape[-1] // self.model.config.patch_size**2 for i in images]
            weights = flow.guidance_weights(options.guidance, options.image_guidance, bool(images))
            texts = (request.instruction, image_only(len(images)), UNCONDITIONAL)
            for text, weight, shown in zip(texts, weights, (True, True, False), strict=True):
                if abs(weight) > 1e-9:
                    prompt = self.encoder.encode(text, tokens if shown else [])
                    out.append(_Branch(row, weight, prompt, images if shown else []))
        return out


@dataclass(frozen=True)
class _Branch:
    """One row of the network's batch: it adds `weight` times its velocity to picture `row`."""

    row: int
    weight: float
    prompt: Prompt
    images: list[Tensor]
