"""What learns: the model, its optimiser, its averaged weights; one optimiser step, and the evaluation."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from x2i.base.errors import RecipeError, X2IError
from x2i.base.seeds import digest, generator
from x2i.model import flow
from x2i.model.base import Model
from x2i.trainer import losses
from x2i.trainer.batch import Batch, Batcher, ChatBatch, DrawBatch
from x2i.trainer.config import RunConfig, Stage
from x2i.trainer.data import Example

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowReport:
    """What one sample lost; `t` is a picture's timestep, `tokens` are those of a conversation that were learned."""

    example: Example
    loss: float
    t: float | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class StepReport:
    """What one step did: its samples, the gradient's norm before clipping, the learning rate."""

    rows: tuple[RowReport, ...]
    grad_norm: float
    lr: float

    @property
    def loss(self) -> float:
        """Mean over the samples."""
        return float(np.mean([r.loss for r in self.rows]))

    def mean(self, key: Callable[[RowReport], str | None]) -> dict[str, float]:
        """Mean loss of the rows by what `key` says of them; those of which it says None are left out."""
        groups: dict[str, list[float]] = {}
        for row in self.rows:
            name = key(row)
            if name is not None:
                groups.setdefault(name, []).append(row.loss)
        return {name: float(np.mean(losses)) for name, losses in sorted(groups.items())}


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss on held-out samples, and what the best constant answer would lose.

    Of pictures: squared error of the velocity, beside that of its mean. Of conversations: negative log-likelihood per
    token in nats, beside the entropy of the tokens' frequencies.
    """

    loss: float
    baseline: float
    samples: int


def learning_rate(stage: Stage, step: int) -> float:
    """The rate of step `step` (from 0) of a stage: linear warm-up, then the stage's schedule."""
    if step < stage.warmup:
        return stage.lr * (step + 1) / stage.warmup
    done = (step - stage.warmup) / max(stage.steps - stage.warmup, 1)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return stage.lr * shape[stage.schedule]


def learning(model: Model[Any], parts: Sequence[str] | None, where: str) -> list[str]:
    """Names of the parameters that a stage trains: those of the parts, or all that may learn at all.

    Raises:
        RecipeError: the model has no part of that name.
    """
    names = [n for n, _ in model.named_parameters()]
    if parts is None:
        return names
    if unknown := [p for p in parts if p not in model.parts]:
        raise RecipeError(
            f"{where}.train: no part {unknown[0]!r}; {model.config.architecture} has {', '.join(model.parts)}"
        )
    prefixes = tuple(prefix for part in parts for prefix in model.parts[part])
    return [n for n in names if n.startswith(prefixes)]


class Learner:
    """The mutable state of a run. Everything else in a run is a pure function of its configuration and step."""

    def __init__(self, run: RunConfig, model: Model[Any], device: torch.device) -> None:
        self.run = run
        self.model = model.to(device)
        self.device = device
        self.optimizer: torch.optim.AdamW | None = None
        self.reference: Model[Any] | None = None  # of a preference stage: the model as it was when the stage began
        self._told: set[tuple[str, str]] = set()
        _check_tau(run, model)
        self._may_learn = {n for n, p in model.named_parameters() if p.requires_grad}  # with adapters: they alone
        self._trained = [sorted(self._of(s, f"stages.{i}")) for i, s in enumerate(run.stages)]
        ever = {name for names in self._trained for name in names}
        parameters = dict(model.named_parameters())
        self.ema = {n: parameters[n].detach().clone() for n in sorted(ever)} if run.ema else None

    def _of(self, stage: Stage, where: str) -> set[str]:
        found = set(learning(self.model, stage.train, where)) & self._may_learn
        if not found and self._may_learn:
            raise RecipeError(f"{where}.train: none of these parts has a parameter that may learn")
        return found

    def trained(self, place: int) -> list[str]:
        """Names of the parameters that the stage at `place` trains."""
        return self._trained[place]

    def start_stage(self, place: int) -> None:
        """A fresh optimiser over what the stage trains: stages share weights, nothing else."""
        stage, names = self.run.stages[place], set(self._trained[place])
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in names)
        self.optimizer = torch.optim.AdamW(
            self._learning(), lr=stage.lr, betas=stage.betas, weight_decay=stage.weight_decay, fused=True
        )
        self.reference = None

    def keep_reference(self) -> None:
        """Remember the model as it is now: what a preference stage compares with."""
        self.reference = copy.deepcopy(self.model).requires_grad_(False).eval()

    def step(self, batches: Sequence[Batch], stage: Stage, stage_step: int, global_step: int) -> StepReport:
        """One optimiser step over the batches of a step.

        Raises:
            X2IError: the loss or the gradient is not finite; the weights are as before the step.
        """
        assert self.optimizer is not None
        self.model.train()
        lr = learning_rate(stage, stage_step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._anneal(stage, stage_step)
        self.optimizer.zero_grad(set_to_none=True)
        count = sum(len(b.examples) for b in batches)
        rows: list[RowReport] = []
        for batch in batches:
            with self._seeded(stage, stage_step):
                loss, each, tokens = self._loss(batch, stage)
            if not loss.requires_grad:
                some = ", ".join(sorted({e.task for e in batch.examples}))
                raise RecipeError(f"stages.{stage.name}.train: nothing that learns takes part in {some}: leave it out")
            (loss * (len(batch.examples) / count)).backward()
            t = batch.t.tolist() if isinstance(batch, DrawBatch) else [None] * len(batch.examples)
            learned = [None] * len(batch.examples) if tokens is None else tokens.tolist()
            self._tell_of_nothing(stage, batch.examples, learned)
            values = each.detach().float().tolist()
            rows += map(RowReport, batch.examples, values, t, learned)
        norm = float(torch.nn.utils.clip_grad_norm_(self._learning(), stage.clip))
        if not math.isfinite(norm) or not all(math.isfinite(r.loss) for r in rows):
            self._refuse(rows, norm, stage, stage_step)
        self.optimizer.step()
        self._average(global_step)
        return StepReport(tuple(rows), norm, lr)

    def _tell_of_nothing(self, stage: Stage, examples: Sequence[Example], learned: Sequence[int | None]) -> None:
        """Warn once a task that conversations teach nothing: their answers lie behind what is cut off."""
        for example, tokens in zip(examples, learned, strict=True):
            if tokens == 0 and (stage.name, example.task) not in self._told:
                self._told.add((stage.name, example.task))
                log.warning(
                    "stage %s: nothing is learned from sample %s (%s), and perhaps from others: its answer is empty, or "
                    "cut off by max_text_tokens or by the model's longest sequence",
                    *(stage.name, example.key, example.task),
                )

    @contextlib.contextmanager
    def _seeded(self, stage: Stage, step: int) -> Iterator[None]:
        """Within the block what the network draws (dropout, visual words) depends on the step alone, as after a resume."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(int(digest("network/1", self.run.seed, stage.name, step)[:15], 16))
            yield

    def _loss(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor, Tensor | None]:
        """What is learned from a batch, a mean over its rows; the loss of each row [B]; tokens that each learns [B]."""
        if isinstance(batch, DrawBatch):
            each = self.velocity_losses(batch)
            return each.mean(), each, None
        if batch.rejected is not None:
            return self._preference_loss(batch, stage)
        sums, counts = self._next_token(batch.inputs)
        # every token of the batch counts alike, whichever answer it belongs to
        return stage.answer_weight * sums.sum() / counts.sum().clamp_min(1), sums / counts.clamp_min(1), counts

    def velocity_losses(self, batch: DrawBatch) -> Tensor:
        """Squared error of the velocity, weighted where the batch says so, per sample [B], float32."""
        noisy = flow.interpolate(batch.noise, batch.data, batch.t)
        with self._autocast():
            predicted = self.model.velocity(noisy, batch.t, self.model.condition(batch.inputs, target=_size(noisy)))
        if batch.weights is None:
            return flow.squared_error(predicted, batch.noise, batch.data)
        return losses.weighted_squared_error(predicted, batch.noise, batch.data, batch.weights)

    def _next_token(self, inputs: Any, model: Model[Any] | None = None) -> tuple[Tensor, Tensor]:
        with self._autocast():
            return (model or self.model).next_token(inputs)

    def _preference_loss(self, batch: ChatBatch, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
        assert stage.preference is not None and self.reference is not None
        chosen, counts = self._next_token(batch.inputs)
        rejected, _ = self._next_token(batch.rejected)
        with torch.no_grad():
            before, worse = (-self._next_token(i, self.reference)[0] for i in (batch.inputs, batch.rejected))
        smoothing = stage.preference.label_smoothing
        each, _ = losses.dpo(-chosen, -rejected, before, worse, beta=stage.preference.beta, label_smoothing=smoothing)
        return each.mean(), each, counts

    def _anneal(self, stage: Stage, step: int) -> None:
        """Set the temperature of the visual tokenizer, where there is one: linear from the first step to the last."""
        if stage.tau is None:
            return
        first, last = stage.tau
        tau = first + (last - first) * step / max(stage.steps - 1, 1)
        for module in _with_tau(self.model):
            module.tau = tau

    @torch.no_grad()
    def held_out(
        self, batcher: Batcher, examples: Mapping[str, Sequence[Example]], stage: Stage | None = None
    ) -> dict[str, HeldOutLoss]:
        """Loss by task: of pictures with fixed noise, at the quartiles' middles of the training distribution of t."""
        self.model.eval()
        drawn = {t: some for t, some in examples.items() if some[0].output is not None}
        out = {task: self._held_out_pictures(batcher, some) for task, some in drawn.items()}
        rest = {task: some for task, some in examples.items() if task not in drawn}
        answered = {task: self._held_out_chats(batcher, some, stage) for task, some in rest.items()}
        return out | {task: loss for task, loss in answered.items() if loss is not None}

    def _held_out_pictures(self, batcher: Batcher, some: Sequence[Example]) -> HeldOutLoss:
        times = 1 / (1 + np.exp(-np.array([-1.1503, -0.3186, 0.3186, 1.1503])))
        repeated = [e for e in some for _ in times]
        drawn = [generator("held-out/1", self.run.seed, e.key, i % len(times)) for i, e in enumerate(repeated)]
        values, velocities = [], []
        for start in range(0, len(repeated), 32):
            part = slice(start, start + 32)
            t = [float(times[i % len(times)]) for i in range(len(repeated))[part]]
            batch = batcher.draw(repeated[part], drawn[part], t)
            values.append(self.velocity_losses(batch).cpu())
            velocities.append((batch.data - batch.noise).float().cpu())
        velocity = torch.cat(velocities)
        spread = (velocity - velocity.mean(dim=(0, 2, 3), keepdim=True)).pow(2).mean()
        return HeldOutLoss(float(torch.cat(values).mean()), float(spread), len(some))

    def _held_out_chats(self, batcher: Batcher, some: Sequence[Example], stage: Stage | None) -> HeldOutLoss | None:
        """None if no token of the answers is left to be judged by."""
        total, tokens = 0.0, 0
        plain = stage is not None and stage.plain_captions
        for start in range(0, len(some), 16):
            try:
                batch = batcher.chat(some[start : start + 16], plain)
            except X2IError as error:  # the model can be shown none of them
                log.warning("left out: %s", error)
                continue
            sums, counts = self._next_token(batch.inputs)
            total, tokens = total + float(sums.sum()), tokens + int(counts.sum())
        if not tokens:
            return None
        return HeldOutLoss(total / tokens, batcher.token_entropy(some), len(some))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the model has its averaged weights, if the run keeps any."""
        if self.ema is None:
            yield
            return
        parameters = {n: p for n, p in self.model.named_parameters() if n in self.ema}
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

    def _learning(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _average(self, step: int) -> None:
        if self.ema is None or self.run.ema is None:
            return
        decay = min(self.run.ema, (1 + step) / (10 + step))  # the first weights are soon forgotten
        parameters = dict(self.model.named_parameters())
        torch._foreach_lerp_(list(self.ema.values()), [parameters[n].detach() for n in self.ema], 1 - decay)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        enabled = self.run.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _refuse(self, rows: Sequence[RowReport], norm: float, stage: Stage, step: int) -> None:
        bad = [f"{r.example.key} ({r.example.task})" for r in rows if not math.isfinite(r.loss)]
        keys = ", ".join(r.example.key for r in rows)
        which = ", ".join(bad) or f"none alone (gradient norm {norm}); the batch: {keys}"
        raise X2IError(
            f"stage {stage.name}, step {step}: the loss is not finite; samples: {which}. The weights are untouched; "
            f"the last checkpoint is whole. A lower lr or a longer warm-up may help."
        )


def _with_tau(model: Model[Any]) -> list[Any]:
    """The visual tokenizers that draw words at a temperature."""
    return [m for m in model.modules() if hasattr(m, "tau") and m.config.tokenize == "gumbel_argmax"]


def _check_tau(run: RunConfig, model: Model[Any]) -> None:
    for place, stage in enumerate(run.stages):
        if stage.tau is not None and not _with_tau(model):
            raise RecipeError(
                f"stages.{place}.tau: this model has no tokenizer with a temperature; the visual tokenizer of an Ovis "
                "has one with model: {tokenizer: {tokenize: gumbel_argmax}}"
            )


def _size(x_BCHW: Tensor) -> tuple[int, int]:
    return x_BCHW.shape[-2], x_BCHW.shape[-1]
