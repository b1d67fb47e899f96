"""What `x2i.trainer.explain` tells of a run: plain figures, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from x2i.trainer.peak import peak


@dataclass(frozen=True)
class Devices:
    """What the run is to be estimated for: so many devices of that name, at this share of their peak (assumed)."""

    count: int = 8
    name: str = "h100"
    mfu: float = 0.45

    @property
    def flops(self) -> float | None:
        """FLOP/s of all of them; None if the peak is not known."""
        one = peak(self.name)
        return None if one is None else one * self.mfu * self.count


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. All but activations and `gathered` are float32, spread evenly over `ranks` devices.

    Attributes:
        ranks: devices that hold one copy together (`compute.shards`).
        weights, gradients: 4 bytes a parameter, and a trained one. `optimiser`: AdamW's two momenta.
        averaged: the averaged weights (EMA) of what any stage trains. `reference`: the frozen model of a preference.
        gathered: two of the largest repeated blocks, whole, in the type of the computation.
        activations: what a device's forward pass keeps for the backward pass; with `compute.checkpointing` the inputs of
            the blocks, and all of one block.
    """

    ranks: int
    weights: float
    gradients: float
    optimiser: float
    averaged: float
    reference: float
    gathered: float
    activations: float

    @property
    def total(self) -> float:
        """All of them."""
        return float(sum(asdict(self).values()) - self.ranks)


@dataclass(frozen=True)
class Drawn:
    """How much of something (a task, a corpus) a stage draws.

    Attributes:
        share: of the stage's samples. `samples`: that many.
        there: training samples that there are; `epochs`: how often each is seen. None where the corpora are missing.
    """

    share: float
    samples: float
    there: int | None = None
    epochs: float | None = None


@dataclass(frozen=True)
class StageTold:
    """One stage.

    Attributes:
        trains: names of the parts that learn, with their parameters. `trained`: parameters that learn, each once.
        resolution: as the run file has it. `steps`; `batch`: samples per step; `samples`, `images`, `tokens`: of the
            stage. Images are those that are drawn and those that come with the samples.
        tasks, corpora: what it draws.
        flops: that the stage needs; `seconds`: at the assumed speed, None where the devices' peak is not known.
        memory: per device.
    """

    name: str
    trains: Mapping[str, int]
    trained: int
    resolution: str
    steps: int
    batch: float
    samples: float
    images: float
    tokens: float
    tasks: Mapping[str, Drawn]
    corpora: Mapping[str, Drawn]
    flops: float
    seconds: float | None
    memory: Memory

    @property
    def flops_per_step(self) -> float:
        """FLOPs of one step."""
        return self.flops / self.steps


@dataclass(frozen=True)
class Explained:
    """A run: its stages, and what the figures rest on."""

    model: str
    parameters: int
    devices: Devices
    stages: Sequence[StageTold]
    notes: Sequence[str] = field(default=())

    def total(self, name: str) -> float | None:
        """Sum of a figure over the stages; None if one lacks it."""
        each = [getattr(stage, name) for stage in self.stages]
        return None if None in each else sum(each)

    def to_json(self) -> dict[str, Any]:
        """JSON types only."""
        out = asdict(self)
        for told, stage in zip(out["stages"], self.stages, strict=True):
            told["flops_per_step"] = stage.flops_per_step
            told["memory"]["total"] = stage.memory.total
        names = ("steps", "samples", "images", "tokens", "flops", "seconds")
        return out | {"total": {name: self.total(name) for name in names}}
