"""What learns: the model, its optimiser, its averaged weights; one optimiser step, and the evaluation."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from x2i.base.errors import X2IError
from x2i.base.seeds import generator
from x2i.model import flow
from x2i.model.omnigen import OmniGen
from x2i.trainer.batch import Batch, Batcher
from x2i.trainer.config import RunConfig, Stage
from x2i.trainer.data import Example


@dataclass(frozen=True)
class StepReport:
    """What one step did: mean loss, mean loss by task, the gradient's norm before clipping, the learning rate."""

    loss: float
    by_task: dict[str, float]
    grad_norm: float
    lr: float


@dataclass(frozen=True)
class HeldOutLoss:
    """Velocity loss on held-out samples, and what predicting their mean velocity would lose."""

    loss: float
    mean_velocity: float
    samples: int


def learning_rate(stage: Stage, step: int) -> float:
    """The rate of step `step` (from 0) of a stage: linear warm-up, then the stage's schedule."""
    if step < stage.warmup:
        return stage.lr * (step + 1) / stage.warmup
    done = (step - stage.warmup) / max(stage.steps - stage.warmup, 1)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return stage.lr * shape[stage.schedule]


class Learner:
    """The mutable state of a run. Everything else in a run is a pure function of its configuration and step."""

    def __init__(self, run: RunConfig, model: OmniGen, device: torch.device) -> None:
        self.run = run
        self.model = model.to(device)
        self.device = device
        self.optimizer: torch.optim.AdamW | None = None
        self.ema = {n: p.detach().clone() for n, p in model.named_parameters()} if run.ema else None

    def start_stage(self, stage: Stage) -> None:
        """A fresh optimiser: stages share weights, nothing else."""
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=stage.lr, betas=stage.betas, weight_decay=stage.weight_decay, fused=True
        )

    def step(self, batch: Batch, stage: Stage, stage_step: int, global_step: int) -> StepReport:
        """One optimiser step.

        Raises:
            X2IError: the loss or the gradient is not finite; the weights are as before the step.
        """
        assert self.optimizer is not None
        self.model.train()
        lr = learning_rate(stage, stage_step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.losses(batch)
        losses.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), stage.clip)
        values = losses.detach().cpu().numpy()
        if not np.isfinite(values).all() or not torch.isfinite(norm):
            self._refuse(batch, values, float(norm), stage, stage_step)
        self.optimizer.step()
        self._average(global_step)
        return StepReport(float(values.mean()), mean_by_task(batch.tasks, values), float(norm), lr)

    def losses(self, batch: Batch) -> Tensor:
        """Squared error of the velocity, per sample [B], float32."""
        noisy = flow.interpolate(batch.noise, batch.data, batch.t)
        with self._autocast():
            predicted = self.model(noisy, batch.t, batch.prompt)
        return flow.squared_error(predicted, batch.noise, batch.data)

    @torch.no_grad()
    def held_out(self, batcher: Batcher, examples: Mapping[str, Sequence[Example]]) -> dict[str, HeldOutLoss]:
        """Loss by task, with fixed noise, at the quartiles' middles of the training distribution of t."""
        self.model.eval()
        times = 1 / (1 + np.exp(-np.array([-1.1503, -0.3186, 0.3186, 1.1503])))
        out = {}
        for task, some in examples.items():
            repeated = [e for e in some for _ in times]
            drawn = [generator("held-out/1", self.run.seed, e.key, i % len(times)) for i, e in enumerate(repeated)]
            losses, velocities = [], []
            for start in range(0, len(repeated), 32):
                part = slice(start, start + 32)
                t = [float(times[i % len(times)]) for i in range(len(repeated))[part]]
                batch = batcher.encode(repeated[part], drawn[part], t)
                losses.append(self.losses(batch).cpu())
                velocities.append((batch.data - batch.noise).float().cpu())
            velocity = torch.cat(velocities)
            spread = (velocity - velocity.mean(dim=(0, 2, 3), keepdim=True)).pow(2).mean()
            out[task] = HeldOutLoss(float(torch.cat(losses).mean()), float(spread), len(some))
        return out

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the model has its averaged weights, if the run keeps any."""
        if self.ema is None:
            yield
            return
        parameters = dict(self.model.named_parameters())
        kept = {n: p.detach().clone() for n, p in parameters.items()}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.ema[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(kept[name])

    def _average(self, step: int) -> None:
        if self.ema is None or self.run.ema is None:
            return
        decay = min(self.run.ema, (1 + step) / (10 + step))  # the first weights are soon forgotten
        averages = list(self.ema.values())
        torch._foreach_lerp_(averages, [p.detach() for p in self.model.parameters()], 1 - decay)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        enabled = self.run.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _refuse(self, batch: Batch, losses: np.ndarray, norm: float, stage: Stage, step: int) -> None:
        bad = [f"{k} ({t})" for k, t, v in zip(batch.keys, batch.tasks, losses, strict=True) if not np.isfinite(v)]
        which = ", ".join(bad) or f"none alone (gradient norm {norm}); the batch: {', '.join(batch.keys)}"
        raise X2IError(
            f"stage {stage.name}, step {step}: the loss is not finite; samples: {which}. The weights are untouched; "
            f"the last checkpoint is whole. A lower lr or a longer warm-up may help."
        )


def mean_by_task(tasks: Sequence[str], losses: np.ndarray) -> dict[str, float]:
    """Mean loss of each task that occurs."""
    names = np.array(tasks)
    return {str(t): float(losses[names == t].mean()) for t in np.unique(names)}
