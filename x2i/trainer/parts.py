"""What a stage trains: parts of the model in full, or low-rank adapters on their layers.

Adapters are there for the length of the stage: put on when it begins, merged into the weights when it ends, so that the
checkpoint of its end holds plain weights. Their averages (EMA) are averages of the merged weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from x2i.base.errors import RecipeError, X2IError
from x2i.model import lora, weights
from x2i.model.base import Model
from x2i.model.lora_config import LoRAConfig
from x2i.trainer import parallel
from x2i.trainer.stage import Stage


@dataclass(frozen=True)
class Trained:
    """What a stage trains.

    Attributes:
        full: names of parameters that learn themselves.
        adapted: layers that learn by adapters, with the adapters' numbers.
        count: numbers that learn: of the parameters and of the adapters.
    """

    full: frozenset[str]
    adapted: Mapping[str, LoRAConfig]
    count: int

    @property
    def names(self) -> frozenset[str]:
        """The parameters that learn, once the adapters are there."""
        return self.full | {f"{layer}.lora_{which}.weight" for layer in self.adapted for which in "AB"}

    @property
    def changed(self) -> frozenset[str]:
        """The weights that the stage changes: what is averaged."""
        return self.full | {f"{layer}.weight" for layer in self.adapted}


def learning(model: Model[Any], parts: Iterable[str] | None, where: str) -> list[str]:
    """Names of the parameters of these parts, or of all that may learn at all.

    Raises:
        RecipeError: the model has no part of that name.
    """
    names = [n for n, _ in model.named_parameters()]
    if parts is None:
        return names
    parts = list(parts)
    if unknown := [p for p in parts if p not in model.parts]:
        raise RecipeError(
            f"{where}.train: no part {unknown[0]!r}; {model.config.architecture} has {', '.join(model.parts)}"
        )
    prefixes = tuple(prefix for part in parts for prefix in model.parts[part])
    return [n for n in names if n.startswith(prefixes)]


def part_of(model: Model[Any], parts: Iterable[str], name: str) -> str:
    """Which of these parts a parameter belongs to, or (an adapter) the layer that it stands beside.

    Parts may lie within each other, as the head within all: then it is the inner one.
    """
    lengths = {part: max((len(p) for p in model.parts[part] if name.startswith(p)), default=-1) for part in parts}
    return max(lengths, key=lambda part: lengths[part])


def trained(model: Model[Any], stage: Stage, where: str) -> Trained:
    """What a stage trains; the model has no adapters but those of the whole run (then they alone may learn).

    Raises:
        RecipeError: the model has no such part, or the part no such layers.
    """
    parameters = dict(model.named_parameters())
    full = {n for n in learning(model, stage.train, where) if parameters[n].requires_grad}
    adapted: dict[str, LoRAConfig] = {}
    rest = dict(stage.train or {})
    for part, spec in rest.items():
        if spec.lora is None:
            continue
        inside = {n for n in full if part_of(model, rest, n) == part}
        full -= inside
        try:
            layers = [n for n in lora.matching(model, spec.lora) if f"{n}.weight" in inside]
        except X2IError as error:
            raise RecipeError(f"{where}.train.{part}.{error}") from None
        if not layers:
            raise RecipeError(f"{where}.train.{part}.lora: no linear layer of this part is among its targets")
        adapted |= dict.fromkeys(layers, spec.lora)
    tied = weights.tied_names(model)
    shared = {*tied, *tied.values()}
    if both := [layer for layer in adapted if f"{layer}.weight" in shared]:
        raise RecipeError(
            f"{where}.train: {both[0]} shares its weight with another layer, which an adapter would change as well: leave "
            "it out of the targets"
        )
    if not full and not adapted and any(p.requires_grad for p in parameters.values()):
        raise RecipeError(f"{where}.train: none of these parts has a parameter that may learn")
    count = sum(parameters[n].numel() for n in full)
    for layer, config in adapted.items():
        count += config.rank * sum(parameters[f"{layer}.weight"].shape)
    return Trained(frozenset(full), adapted, count)


def merged(layer: lora.LoRALinear) -> Tensor:
    """This rank's part of an adapted weight with its update: as `LoRALinear.merged`. All ranks call this together."""
    update = parallel.local(layer.lora_B.weight).float() @ parallel.full(layer.lora_A.weight).float()
    weight = parallel.local(layer.weight)
    return (weight.float() + layer.config.scale * update).to(weight.dtype)


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """Add the updates to the weights; the adapters stay, and are worth nothing."""
    for layer in lora.adapters(model).values():
        parallel.local(layer.weight).copy_(merged(layer))
        parallel.local(layer.lora_B.weight).zero_()


def resumable(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint within a stage needs beside the merged weights: adapters, and the weights that they stand on."""
    found = {f"{name}.weight": layer.weight.detach() for name, layer in lora.adapters(model).items()}
    return found | lora.adapter_state(model)


@torch.no_grad()
def plain(model: nn.Module) -> dict[str, Tensor]:
    """Copies in host memory of this rank's parts of the adapted weights, with their updates. All ranks call it together."""
    out = {}
    for name, layer in lora.adapters(model).items():
        copy = layer.weight.detach().to("cpu", copy=True)
        parallel.local(copy).copy_(merged(layer))
        out[f"{name}.weight"] = copy
    return out
