"""From decoded samples to what one training step needs: latents, noise, timesteps, prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from x2i.base.seeds import generator
from x2i.model.omnigen import OmniGen
from x2i.model.pixels import to_tensor
from x2i.model.prompt import UNCONDITIONAL, PromptBatch, PromptEncoder, collate
from x2i.model.vae import VAE
from x2i.trainer.config import Stage
from x2i.trainer.data import Example


@dataclass(frozen=True)
class Batch:
    """One step's tensors; row i belongs to `keys[i]` and `tasks[i]`."""

    keys: tuple[str, ...]
    tasks: tuple[str, ...]
    data: Tensor  # clean latents [B, C, H, W]
    noise: Tensor  # [B, C, H, W]
    t: Tensor  # [B]
    prompt: PromptBatch


class Batcher:
    """Encodes samples for a model. Noise, timestep and dropout of a sample depend on its draw alone."""

    def __init__(self, model: OmniGen, vae: VAE, encoder: PromptEncoder, device: torch.device) -> None:
        self._vae = vae
        self._encoder = encoder
        self._device = device
        self._patch = model.config.patch_size

    def training(self, examples: Sequence[Example], seed: int, stage: Stage) -> Batch:
        """A training batch: logit-normal timesteps, and some of the conditions dropped."""
        drawn = [generator("flow/1", seed, stage.name, e.draw, e.key) for e in examples]
        t = [1 / (1 + np.exp(-g.normal(stage.t_mean, stage.t_std))) for g in drawn]
        dropped = [g.random() < stage.condition_dropout for g in drawn]
        return self.encode(examples, drawn, t, dropped)

    def encode(
        self,
        examples: Sequence[Example],
        generators: Sequence[np.random.Generator],
        t: Sequence[float],
        dropped: Sequence[bool] | None = None,
    ) -> Batch:
        """A batch at given timesteps, with noise from one generator per sample."""
        dropped = dropped or [False] * len(examples)
        data = self._latents([e.output for e in examples], generators[0])
        inputs = [() if drop else e.inputs for e, drop in zip(examples, dropped, strict=True)]
        flat = self._latents([image for row in inputs for image in row], generators[0])
        images, position = [], 0
        for row in inputs:
            images.append(list(flat[position : position + len(row)]))
            position += len(row)
        prompts = [
            self._encoder.encode(
                UNCONDITIONAL if drop else e.instruction, [i.shape[-2] * i.shape[-1] // self._patch**2 for i in row]
            )
            for e, drop, row in zip(examples, dropped, images, strict=True)
        ]
        noise = np.stack([g.standard_normal(tuple(data.shape[1:]), dtype=np.float32) for g in generators])
        return Batch(
            keys=tuple(e.key for e in examples),
            tasks=tuple(e.task for e in examples),
            data=data,
            noise=torch.from_numpy(noise).to(self._device),
            t=torch.tensor(np.array(t), dtype=torch.float32, device=self._device),
            prompt=collate(prompts, images).to(self._device),
        )

    def _latents(self, images: Sequence[np.ndarray], seed: np.random.Generator) -> Tensor:
        posterior = torch.Generator(self._device).manual_seed(int(seed.integers(2**62)))
        if not images:
            return torch.empty(0)
        return self._vae.encode(to_tensor(images).to(self._device), posterior)
