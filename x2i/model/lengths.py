"""How many tokens a sample has in each part of a model: from it follow the FLOPs that the sample needs.

What depends on the architecture is the module `lengths` of its package:

    drawing(config, text, inputs, size, shrink)    lengths of a sample to be drawn, from what a manifest tells
    chatting(config, text, learned, sizes)         the same of a conversation
    probes(config, drawn)                          lengths that tell all that matters apart; the first has some of each
    example(config, lengths, device)               a batch of one row of these lengths, without content
    attention(config, lengths)                     its attentions, each with the pairs that its mask allows
    rows(config, inputs, drawn)                    lengths of each row of a batch of the model's inputs
    packed(config, inputs)                         the same of a pack, and its pairs; in models that take packs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from x2i.base.errors import X2IError
from x2i.model import registry
from x2i.model.config import ModelConfig


@dataclass(frozen=True)
class Lengths:
    """One sample. Padding is counted nowhere.

    Attributes:
        text: tokens of the language model that are words or marks.
        read: its tokens of each picture, or tile of one, that it reads.
        drawn: noisy tokens; 0 in a conversation.
        sources: tokens of clean latents beside the noisy ones, of each source image, in models that have such.
        learned: words of a conversation whose prediction is learned.
    """

    text: int
    read: tuple[int, ...] = ()
    drawn: int = 0
    sources: tuple[int, ...] = ()
    learned: int = 0

    @property
    def sequence(self) -> int:
        """Tokens of the language model without the noisy ones."""
        return self.text + sum(self.read)

    @property
    def tokens(self) -> int:
        """All its tokens: what it takes of a pack, but for marks such as a timestep's."""
        return self.sequence + self.drawn + sum(self.sources)

    @property
    def features(self) -> tuple[float, ...]:
        """What all work but attention is a linear function of."""
        read, sources = self.read, self.sources
        return (1, self.text, sum(read), len(read), self.drawn, sum(sources), len(sources), self.learned)


@dataclass(frozen=True)
class Attention:
    """One kind of attention of a sample: all calls with so many queries and keys, and the pairs that its mask allows.

    `pairs` is the sum over what is called together, as the tiles of a picture.
    """

    queries: int
    keys: int
    pairs: float


class LengthsOf(Protocol):
    """The module `lengths` of an architecture. Pictures' sizes are height and width in pixels."""

    def drawing(self, config: Any, text: int, inputs: int, size: tuple[int, int], shrink: int) -> Lengths:
        """A sample with `inputs` pictures of the size that is drawn; `shrink` pixels make a latent's side."""
        ...

    def chatting(self, config: Any, text: int, learned: int, sizes: Sequence[tuple[int, int]]) -> Lengths:
        """A conversation of `text` tokens, `learned` of which are the assistant's, about pictures of these sizes."""
        ...

    def probes(self, config: Any, drawn: bool) -> list[Lengths]: ...

    def example(self, config: Any, lengths: Lengths, device: str) -> Any: ...

    def attention(self, config: Any, lengths: Lengths) -> list[Attention]: ...

    def rows(self, config: Any, inputs: Any, drawn: int) -> list[Lengths]:
        """Of a batch; `drawn` noisy tokens go with each row."""
        ...

    def packed(self, config: Any, inputs: Any) -> tuple[list[Lengths], list[float]]:
        """Of a pack: the lengths of each document, and the pairs of each attention of all of them together."""
        ...


def lengths_of(config: ModelConfig) -> LengthsOf:
    """The module of an architecture. Raises X2IError if it has none."""
    found: LengthsOf | None = registry.module(config.architecture, "lengths")
    if found is None:
        raise X2IError(f"{config.architecture} does not say how long its sequences are: it has no module `lengths`")
    return found


def of_documents(lengths: Sequence[int], places: Tensor) -> list[int]:
    """How many of these places in a pack lie in each of its documents of so many tokens."""
    ends = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
    found: list[int] = torch.bincount(torch.bucketize(places.cpu(), ends, right=True), minlength=len(lengths)).tolist()
    return found


def causal(length: int) -> float:
    """Pairs of a causal sequence."""
    return length * (length + 1) / 2
