"""Ovis's visual tokenizer and embedding table: an image as probabilities over visual words, and their mean embedding.

Architecture (paper arXiv 2405.20797; code AIDC-AI/Ovis and AIDC-AI/Ovis-U1-3B):
- the encoder's features of each block of S x S patches are put together
- head: Linear without bias to the words, LayerNorm; a softmax (or a hard choice) makes weights
- the last words of the table are indicators: marks around images. No image uses them, so their weights are 0
- the table takes an id (indicators) or weights over all words (images)

Tensor names carry their axes:
    N patches · M = N / S^2 blocks of patches · F values of a patch · V visual words · D width of the language model
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from x2i.base.errors import X2IError
from x2i.model import deferred, weights
from x2i.model.layers.aimv2 import AIMv2, Grid
from x2i.model.layers.config import VisualTokenizerConfig


class VisualTokenizer(nn.Module):
    """Images to probabilities over visual words.

    Attributes:
        tau: temperature of gumbel_argmax; training may lower it, see `annealed_tau`.
    """

    def __init__(self, config: VisualTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.tau = config.tau
        words = config.vocab_size - config.indicators
        self.backbone = AIMv2(config.encoder)
        width = config.encoder.hidden_size * config.encoder.hidden_stride**2
        self.head = nn.Sequential(nn.Linear(width, words, bias=False), nn.LayerNorm(words))

    def forward(self, patches_NF: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Weights of all visual words, [N / S^2, V]; those of the indicators are 0.

        Args:
            patches_NF: packed patches of all images in merge order, as `patchify` makes them.
            grids: rows and columns of patches of each image.

        Raises:
            X2IError: patches and grids do not agree.
        """
        # words are drawn in training only: the same question has the same answer
        drawn = self.config.tokenize == "gumbel_argmax" and not self.training
        how = "st_argmax" if drawn else self.config.tokenize
        weights_MV = tokenize(self.logits(patches_NF, grids), how, self.tau)
        return F.pad(weights_MV, (0, self.config.indicators))

    def logits(self, patches_NF: Tensor, grids: Sequence[Grid]) -> Tensor:
        """The head's output [N / S^2, V - indicators]."""
        features_ND = self.backbone(patches_NF, grids)
        # merge order: the patches of a block lie together
        return self.head(features_ND.reshape(len(features_ND) // self.config.encoder.hidden_stride**2, -1))


class VisualEmbedding(nn.Embedding):
    """The table of visual words: takes ids, or weights over all words."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Integers [...] -> [..., D]; floats [..., V] -> their weighted sums [..., D]."""
        if tokens.is_floating_point():
            return tokens.to(self.weight.dtype) @ self.weight
        return super().forward(tokens)


def tokenize(logits: Tensor, how: str, tau: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Weights of the words from their logits, in the logits' shape and dtype; each row sums to 1.

    Args:
        logits: [..., words].
        how: `softmax` (computed in float32); `gumbel_argmax`: one word drawn, gradients of the softmax at `tau`;
            `st_argmax`: the likeliest word, gradients passed straight to the logits. So AIDC-AI/Ovis has it;
            transformers' Ovis2 passes them through a softmax, which gives the same words and other gradients.
        tau: temperature of `gumbel_argmax`.
        generator: of its noise.

    Raises:
        X2IError: no such way.
    """
    if how == "softmax":
        return logits.softmax(dim=-1, dtype=torch.float32).to(logits.dtype)
    if how == "gumbel_argmax":
        noise = -torch.empty_like(logits).exponential_(generator=generator).log()
        return _straight_through(((logits + noise) / tau).softmax(dim=-1))
    if how == "st_argmax":
        return _straight_through(logits)
    raise X2IError(f"visual tokenizer: no way {how!r} to make tokens; known: softmax, gumbel_argmax, st_argmax")


def _straight_through(soft: Tensor) -> Tensor:
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(dim=-1, keepdim=True), 1.0)
    # the difference is exactly 0, so the row stays exactly one word in any dtype
    return hard + (soft - soft.detach())


def annealed_tau(step: int, steps: int, first: float = 5.0, last: float = 0.05) -> float:
    """Temperature of gumbel_argmax at `step` of `steps`, falling linearly from `first` (AIDC-AI/Ovis, v1 training).

    The last step, `steps` - 1, is still one step's share above `last`, as there.
    """
    return first - (first - last) * min(step, steps) / steps


def initialise_like(table: VisualEmbedding, words: Tensor) -> None:
    """Fill the table with normal numbers of the mean and standard deviation of a language model's embedding [V', D].

    Both may be divided among ranks: then all call this together. An embedding without numbers changes nothing.
    """
    if not deferred.readable(words):
        return
    with torch.no_grad():
        full = (words.full_tensor().cpu() if isinstance(words, DTensor) else words).detach().float()
        mean, std = full.mean().item(), full.std().item()
        if isinstance(table.weight, DTensor):
            weights.assign(table.weight, torch.empty(table.weight.shape).normal_(mean, std))
        else:
            nn.init.normal_(table.weight, mean=mean, std=std)
