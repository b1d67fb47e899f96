"""The FLOPs that a training step needs, given what trains in its stage.

Counted are the multiplications and additions of matrix products, convolutions and attention (two FLOPs each), of the
forward pass and of the backward pass that the stage's trained parts ask for:

    needed = sum over samples of  forward + backward
    forward, backward = linear(lengths) + sum over attentions of  FLOPs a pair x pairs that the mask allows
    mfu = needed / (seconds x devices x peak)        (`x2i.trainer.peak`)

What autograd does not compute is not counted: weights' gradients of frozen parts, and gradients of what lies below the
first trained part. Attention counts the pairs that its mask allows, not the square. Not counted either: padding; what
activation checkpointing and flash attention compute twice (so PaLM, Chowdhery et al. 2204.02311, appendix B, defines
MFU); norms, softmax and other pointwise work; the optimiser; the frozen autoencoder, which is no part of the model.

For a language model of N parameters (embedding aside) that trains as a whole this is about 6 N FLOPs a token and
12 x layers x width FLOPs an allowed pair; where N is frozen and only small adapters train, about 4 N.

The numbers come from the model's own code: it is built on the meta device (no memory, no weights), and its real
forward and backward pass run there with a few short samples. All work but attention is a linear function of the lengths
(`x2i.model.lengths`), so that these samples tell it exactly; each attention is told apart by its queries and keys.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from x2i.base.errors import X2IError
from x2i.model import lora as adapters
from x2i.model import registry
from x2i.model.base import Model
from x2i.model.config import ModelConfig
from x2i.model.lengths import Attention, Lengths, lengths_of
from x2i.model.lora_config import LoRAConfig
from x2i.trainer.batch import Batch, ChatBatch, DrawBatch, PackBatch
from x2i.trainer.counting import Call, Known, latents_of, run

#: Shapes of operators' results: stages of one model have most of them in common.
_KNOWN: Known = {}


@dataclass(frozen=True)
class Pass:
    """FLOPs of a sample: `linear` times its lengths' features, and `pair` times the allowed pairs of each attention.

    `kept`, times the same features, is the memory in bytes that the backward pass needs of the forward pass.
    """

    linear: np.ndarray  # [2, features]: forward, backward
    pair: np.ndarray  # [2, attentions]
    kept: np.ndarray  # [features]


def on_meta(
    config: ModelConfig, lora: LoRAConfig | None = None, adapted: Mapping[str, LoRAConfig] | None = None
) -> Model[Any]:
    """The model without memory or weights, with its adapters, or those of a stage. Raises X2IError if they fit no layer."""
    with torch.device("meta"):
        model = registry.build(config)
        if lora is not None:
            adapters.attach(model, lora)
        if adapted:
            adapters.attach_to(model, adapted, 0)
    return model


class StageFlops:
    """What samples cost in a stage, given what of the model learns.

    Args:
        config: the model's numbers.
        learning: names of the parameters that the stage trains (`x2i.trainer.parts.trained`).
        lora: the run's adapters, if it has any.
        adapted: those of the stage, by layer.
        preference: each conversation is passed twice (chosen and rejected), and twice more through the frozen
            reference, forward only (DPO).
        dtype: of the computation; it decides the activations' memory alone.

    Raises:
        X2IError: the architecture does not say how long its sequences are, or there are no such targets for adapters.
    """

    def __init__(
        self,
        config: ModelConfig,
        learning: Collection[str],
        *,
        lora: LoRAConfig | None = None,
        adapted: Mapping[str, LoRAConfig] | None = None,
        preference: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self._config, self.preference = config, preference
        self._lengths = lengths_of(config)
        self.model = on_meta(config, lora, adapted).to(dtype).train()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in learning)
        self._passes: dict[bool, Pass] = {}

    def step(self, batches: Sequence[Batch]) -> float:
        """FLOPs of a rank's batches of a step; rows and packs that stand in for others' are not counted.

        Ask it before the batches go to a GPU, or pay with a wait: lengths are read off the inputs.
        """
        total = 0.0
        for batch in batches:
            if isinstance(batch, PackBatch):
                if any(batch.own):
                    forward, backward = self._packed(batch.inputs)
                    total += forward + backward + (forward if batch.preferred else 0.0)  # by the reference
            elif isinstance(batch, DrawBatch):
                tokens = batch.data.shape[-2] * batch.data.shape[-1] // latents_of(self._config)[1] ** 2
                total += sum(sum(self.both(row)) for row in self._own(batch.inputs, tokens, batch.own))
            else:
                total += sum(sum(self.both(row)) for row in self._own(batch.inputs, 0, batch.own))
                if batch.rejected is not None:
                    total += sum(sum(self.both(row)) for row in self._own(batch.rejected, 0, batch.own))
                    for inputs in (batch.inputs, batch.rejected):  # by the reference
                        total += sum(self.both(row)[0] for row in self._own(inputs, 0, batch.own))
        return total

    def lengths(self, batch: Batch) -> list[int]:
        """Tokens of each example of a batch, text and pictures, padding left out; of a preference those of both answers."""
        if isinstance(batch, PackBatch):
            lengths = batch.inputs.lengths
            return [a + b for a, b in zip(lengths[::2], lengths[1::2], strict=True)] if batch.preferred else [*lengths]
        if isinstance(batch, ChatBatch):
            both = [self._lengths.rows(self._config, i, 0) for i in (batch.inputs, batch.rejected) if i is not None]
            return [sum(row.sequence for row in rows) for rows in zip(*both, strict=True)]
        drawn = batch.data.shape[-2] * batch.data.shape[-1] // latents_of(self._config)[1] ** 2
        return [row.tokens for row in self._lengths.rows(self._config, batch.inputs, drawn)]

    def _own(self, inputs: Any, drawn: int, own: Sequence[bool]) -> list[Lengths]:
        rows = self._lengths.rows(self._config, inputs, drawn)
        return [row for row, counts in zip(rows, own, strict=True) if counts]

    def needed(self, rows: Sequence[Lengths]) -> float:
        """FLOPs of forward and backward pass of these samples. Raises X2IError if the model cannot do them."""
        return float(sum(self.sample(row) for row in rows))

    def sample(self, row: Lengths) -> float:
        """FLOPs of one sample."""
        forward, backward = self.both(row)
        if self.preference and not row.drawn:  # chosen and rejected, and the reference of both
            return 2 * (forward + backward) + 2 * forward
        return forward + backward

    def both(self, row: Lengths) -> tuple[float, float]:
        """FLOPs of one forward and of one backward pass."""
        found = self._pass(row.drawn > 0)
        pairs = np.array([a.pairs for a in self._lengths.attention(self._config, row)], float)
        total = found.linear @ np.array(row.features, float) + found.pair @ pairs
        return float(total[0]), float(total[1])

    def pair(self, row: Lengths) -> np.ndarray:
        """FLOPs of a pair, forward and backward [2, attentions], of each attention that a sample has."""
        return self._pass(row.drawn > 0).pair

    def kept(self, row: Lengths) -> float:
        """Bytes that one sample's forward pass keeps for the backward pass, without activation checkpointing."""
        return float(self._pass(row.drawn > 0).kept @ np.array(row.features, float))

    def pack(self, inputs: Any) -> float:
        """FLOPs of a pack, of `Processor.pack`. Raises X2IError if the model takes none."""
        return sum(self._packed(inputs))

    def _packed(self, inputs: Any) -> tuple[float, float]:
        """FLOPs of the forward and of the backward pass of a pack."""
        if not self.model.packs:
            raise X2IError(f"{self._config.architecture} takes no packs")
        rows, pairs = self._lengths.packed(self._config, inputs)
        if not rows:
            return 0.0, 0.0
        total = sum(self._pass(r.drawn > 0).linear @ np.array(r.features, float) for r in rows)
        one = max(rows, key=lambda row: row.drawn)  # drawn documents have all attentions that conversations have
        total = total + self.pair(one) @ np.array(pairs, float)
        return float(total[0]), float(total[1])

    def batch(self, inputs: Any, drawn: int = 0) -> float:
        """FLOPs of a batch of the model's inputs; of one to be drawn with so many noisy tokens a row."""
        return self.needed(self._lengths.rows(self._config, inputs, drawn))

    def _pass(self, drawn: bool) -> Pass:
        if drawn not in self._passes:
            able = self.model.draws if drawn else self.model.answers
            if not able:
                raise X2IError(f"{self._config.architecture} {'draws no pictures' if drawn else 'writes no text'}")
            self._passes[drawn] = self._measured(drawn)
        return self._passes[drawn]

    def _measured(self, drawn: bool) -> Pass:
        probes = self._lengths.probes(self._config, drawn)
        runs = [run(self.model, self._lengths.example(self._config, p, "meta"), p, _KNOWN) for p in probes]
        features = np.array([probe.features for probe in probes], float)
        features[:, 1:] *= features[:, 1:].std(axis=0) > 0  # what no probe varies has no part in the work
        linear = _solved(features, np.array([(r.forward, r.backward) for r in runs], float))
        kept = _solved(features, np.array([[r.kept] for r in runs], float))[0]
        kinds = self._lengths.attention(self._config, probes[0])
        return Pass(linear, _per_pair(runs[0].calls, kinds), kept)


def _solved(features: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Coefficients [values, features] of the smallest norm with `features @ coefficients = values`."""
    found = np.linalg.lstsq(features, values, rcond=None)[0].T
    if not np.allclose(features @ found.T, values, rtol=1e-6):
        raise X2IError("the work of this model is no linear function of its lengths: its `lengths` lack something")
    return np.asarray(found)


def _per_pair(calls: Sequence[Call], kinds: Sequence[Attention]) -> np.ndarray:
    """FLOPs of an allowed pair [2, kinds], over all calls of each kind. Raises X2IError if a call is of none or of two."""
    out = np.zeros((2, len(kinds)))
    for call in calls:
        fit = [i for i, k in enumerate(kinds) if (k.queries, k.keys) == (call.queries, call.keys)]
        if len(fit) != 1:
            raise X2IError(f"attention of {call.queries} x {call.keys}: {len(fit)} kinds of `lengths` fit it, not one")
        out[:, fit[0]] += call.forward, call.backward
    return out
