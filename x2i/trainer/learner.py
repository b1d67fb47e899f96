"""What learns: the model, its optimiser, its averaged weights; one optimiser step on all ranks."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from x2i.base.errors import ElsewhereError, RecipeError, X2IError
from x2i.base.seeds import digest
from x2i.model import flow, lora
from x2i.model.base import Model
from x2i.model.lora_config import LoRAConfig
from x2i.model.weights import tied_names
from x2i.trainer import losses, parallel
from x2i.trainer.batch import Batch, ChatBatch, DrawBatch, PackBatch
from x2i.trainer.config import RunConfig
from x2i.trainer.data import Example
from x2i.trainer.parts import Trained, fold, merged, part_of, trained
from x2i.trainer.reports import RowReport, StepReport, Totals, own_rows
from x2i.trainer.stage import Stage
from x2i.trainer.world import World

log = logging.getLogger(__name__)


def learning_rate(stage: Stage, step: int, peak: float | None = None) -> float:
    """The rate of step `step` (from 0) of a stage: linear warm-up to `peak` (default: the stage's), then its schedule."""
    peak = stage.lr if peak is None else peak
    if step < stage.warmup:
        return peak * (step + 1) / stage.warmup
    done = (step - stage.warmup) / max(stage.steps - stage.warmup, 1)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return peak * shape[stage.schedule]


class Learner:
    """The mutable state of a run. Everything else in a run is a pure function of its configuration and step.

    Attributes:
        model: as `x2i.trainer.parallel.prepare` leaves it.
        ema: the averaged weights by name, divided as the model's are; None if the run keeps none.
    """

    def __init__(
        self,
        run: RunConfig,
        model: Model[Any],
        device: torch.device,
        world: World | None = None,
        build: Callable[[], Model[Any]] | None = None,
    ) -> None:
        """Begin.

        Args:
            run: the run.
            model: on the CPU, with the weights to start from.
            device: where to compute.
            world: the ranks; default: this process alone.
            build: makes a model of the same numbers, whatever its weights; of ranks that keep a reference, or adapters.
        """
        self.run = run
        self.world = world or World(alone=True)
        self._build = build
        self.tied = tied_names(model)
        _check_tau(run, model)
        self._trained = [trained(model, s, f"stages.{i}") for i, s in enumerate(run.stages)]
        self.model = parallel.prepare(model, run, self.world, device)
        self.device = device
        self.optimizer: torch.optim.AdamW | None = None
        self.reference: Model[Any] | None = None  # of a preference stage: the model as it was when the stage began
        self._told: set[tuple[str, str]] = set()
        ever = {name for stage in self._trained for name in stage.changed}
        parameters = dict(model.named_parameters())
        self.ema = {n: parameters[n].detach().clone() for n in sorted(ever)} if run.ema else None

    def what(self, place: int) -> Trained:
        """What the stage at `place` trains."""
        return self._trained[place]

    def trained(self, place: int) -> list[str]:
        """Names of the parameters that the stage at `place` trains, its adapters' among them."""
        return sorted(self._trained[place].names)

    def start_stage(self, place: int) -> None:
        """A fresh optimiser over what the stage trains: stages share weights, nothing else. Adapters are put on."""
        stage, what = self.run.stages[place], self._trained[place]
        if what.adapted:
            self._reshape(what.adapted, ("stage", self.run.seed, stage.name))
        names = what.names
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in names)
        self.optimizer = torch.optim.AdamW(
            self._groups(stage), lr=stage.lr, betas=stage.betas, weight_decay=stage.weight_decay, fused=True
        )
        self.reference = None

    def end_stage(self) -> None:
        """Merge the stage's adapters, if it has any, into the weights, and take them away."""
        if self._stage_adapters():
            fold(self.model)
            self.optimizer = None
            self._reshape({}, ())

    def _reshape(self, adapted: Mapping[str, LoRAConfig], seed: tuple[Any, ...]) -> None:
        """Put these adapters on the model, or take all away. FSDP's modules are fixed: then the model is made anew."""
        if parallel.is_divided(self.model):
            self.model = self._twin(adapted, seed)
        elif adapted:
            lora.attach_to(self.model, adapted, *seed)
        else:
            lora.detach(self.model)

    def _twin(self, adapted: Mapping[str, LoRAConfig], seed: tuple[Any, ...]) -> Model[Any]:
        """A divided model of the same weights, with these adapters."""
        assert self._build is not None
        twin = self._build()
        if adapted:
            lora.attach_to(twin, adapted, *seed)
        twin = parallel.prepare(twin, self.run, self.world, self.device)
        mine = self.model.state_dict()
        with torch.no_grad():
            for name, tensor in twin.state_dict().items():
                if name in mine:
                    parallel.local(tensor).copy_(parallel.local(mine[name]))
        return twin

    def _groups(self, stage: Stage) -> list[dict[str, Any]]:
        """What learns, by its rate: `peak` is that after the warm-up, `part` the part that has it for its own."""
        if stage.train is None:
            return [{"params": self._learning(), "peak": stage.lr, "part": None}]
        groups: dict[str | None, dict[str, Any]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                part = part_of(self.model, stage.train, name)
                peak = stage.train[part].lr
                own = None if peak is None else part
                group = groups.setdefault(own, {"params": [], "peak": peak or stage.lr, "part": own})
                group["params"].append(parameter)
        return list(groups.values())

    def keep_reference(self) -> None:
        """Remember the model as it is now: what a preference stage compares with."""
        if not parallel.is_divided(self.model):
            self.reference = copy.deepcopy(self.model).requires_grad_(False).eval()
            return
        self.reference = self._twin({}, ()).requires_grad_(False).eval()

    def step(
        self,
        batches: Sequence[Batch],
        stage: Stage,
        stage_step: int,
        global_step: int,
        totals: Totals | None = None,
    ) -> StepReport:
        """One optimiser step over the batches of a step.

        Args:
            batches: this rank's; all ranks have as many of each kind.
            totals: of all ranks; default: of these batches.

        Raises:
            X2IError: the loss or the gradient is not finite; all ranks find it together, and the weights are as before.
        """
        assert self.optimizer is not None
        self.model.train()
        lr = learning_rate(stage, stage_step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(stage, stage_step, group["peak"])
        self._anneal(stage, stage_step)
        self.optimizer.zero_grad(set_to_none=True)
        totals = totals or Totals.of(batches)
        rows: list[RowReport] = []
        for batch in batches:
            with self._seeded(stage, stage_step, batch.examples[0].draw):
                loss, each, tokens = self._loss(batch, stage, totals)
                zero = parallel.touched(self.model)
            if not loss.requires_grad:
                some = ", ".join(sorted({e.task for e in batch.examples}))
                raise RecipeError(f"stages.{stage.name}.train: nothing that learns takes part in {some}: leave it out")
            # FSDP takes the mean of the ranks' gradients; the loss is a sum over them
            (loss * self.world.size + (0 if zero is None else zero)).backward()
            count = len(batch.examples)
            t = [] if isinstance(batch, ChatBatch) else batch.t.tolist()
            t += [None] * (count - len(t))
            learned = [] if tokens is None else tokens.tolist()
            learned = [None] * (count - len(learned)) + learned
            self._tell_of_nothing(stage, batch.examples, learned)
            values = each.detach().float().tolist()
            lengths = batch.lengths or [None] * count
            for own, e, *rest in zip(batch.own, batch.examples, values, t, learned, lengths, strict=True):
                if own:
                    rows.append(RowReport(e.draw, e.key, e.task, e.sample, e.replaced, *rest))
        for parameter in self._learning():
            if parameter.grad is None:  # with FSDP it is zero: the same update, whatever the number of ranks
                parameter.grad = torch.zeros_like(parameter)
        norm = float(parallel.full(torch.nn.utils.clip_grad_norm_(self._learning(), stage.clip)))
        packs = [b for b in batches if isinstance(b, PackBatch) and any(b.own)]
        told = rows, [e.key for b in packs for e in b.left_out], [b.tokens / b.length for b in packs]
        each, left, fills = (list(chain(*parts)) for parts in zip(*self.world.gather(told), strict=True))
        rows = sorted(each, key=lambda r: r.draw)
        if not math.isfinite(norm) or not all(math.isfinite(r.loss) for r in rows):
            self._refuse(rows, norm, stage, stage_step)
        self.optimizer.step()
        self._average(stage, global_step)
        rates = {group["part"]: group["lr"] for group in self.optimizer.param_groups if group["part"] is not None}
        return StepReport(tuple(rows), norm, lr, rates, tuple(left), float(np.mean(fills)) if fills else None)

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
    def _seeded(self, stage: Stage, step: int, draw: int) -> Iterator[None]:
        """Within the block what the network draws (dropout, visual words) depends on the step and the first row alone."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(int(digest("network/2", self.run.seed, stage.name, step, draw)[:15], 16))
            yield

    def _loss(self, batch: Batch, stage: Stage, totals: Totals) -> tuple[Tensor, Tensor, Tensor | None]:
        """This batch's part of the step's loss; the loss of each row [B]; tokens that each conversation learns.

        The step's loss is a mean over its samples: of pictures and preferences each its own; of conversations the mean
        over all their tokens in the step, whichever answer they belong to. So it does not depend on how the step was
        divided.
        """
        own_B = own_rows(batch)
        if stage.preference is not None and not isinstance(batch, DrawBatch):
            each, counts = self._preference_losses(batch, stage)
            return (each * own_B).sum() / totals.rows, each, counts
        if isinstance(batch, PackBatch):
            drawn, sums, counts = self.pack_losses(batch)
            own_G, own_K = own_B[: len(drawn)], own_B[len(drawn) :]
            part = (sums * own_K).sum() / max(totals.tokens, 1) * (totals.chats / totals.rows)
            loss = (drawn * own_G).sum() / totals.rows + stage.answer_weight * part
            return loss, torch.cat([drawn, sums / counts.clamp_min(1)]), counts
        if isinstance(batch, DrawBatch):
            each = self.velocity_losses(batch)
            return (each * own_B).sum() / totals.rows, each, None
        sums, counts = self._next_token(batch.inputs)
        part = (sums * own_B).sum() / max(totals.tokens, 1) * (totals.chats / totals.rows)
        return stage.answer_weight * part, sums / counts.clamp_min(1), counts

    def velocity_losses(self, batch: DrawBatch) -> Tensor:
        """Squared error of the velocity, weighted where the batch says so, per sample [B], float32."""
        noisy = flow.interpolate(batch.noise, batch.data, batch.t)
        with self.autocast():
            predicted = self.model(noisy, batch.t, batch.inputs)
        if batch.weights is None:
            return flow.squared_error(predicted, batch.noise, batch.data)
        return losses.weighted_squared_error(predicted, batch.noise, batch.data, batch.weights)

    def pack_losses(self, batch: PackBatch, model: Model[Any] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Squared error of each picture's velocity [G]; of each conversation the negative log-likelihood and tokens [K]."""
        noisy = [
            flow.interpolate(n[None], d[None], t)
            for n, d, t in zip(batch.noise, batch.data, batch.t[:, None], strict=True)
        ]
        with self.autocast():
            predicted, sums, counts = (model or self.model).packed(batch.inputs, [x[0] for x in noisy], batch.t)
        each = []
        for found, noise, data, weights in zip(predicted, batch.noise, batch.data, batch.weights, strict=True):
            pair = found[None], noise[None], data[None]
            exact = flow.squared_error(*pair)
            each.append(exact if weights is None else losses.weighted_squared_error(*pair, weights[None]))
        return (torch.cat(each) if each else sums.new_zeros(0)), sums, counts

    def _next_token(self, inputs: Any, model: Model[Any] | None = None) -> tuple[Tensor, Tensor]:
        with self.autocast():
            return (model or self.model).next_token(inputs)

    def next_token_sums(self, inputs: Any) -> tuple[float, int]:
        """Negative log-likelihood of all learned tokens of a batch, and their number."""
        sums, counts = self._next_token(inputs)
        return float(sums.sum()), int(counts.sum())

    def _preference_losses(self, batch: ChatBatch | PackBatch, stage: Stage) -> tuple[Tensor, Tensor]:
        assert stage.preference is not None and self.reference is not None
        chosen, rejected, counts = self._answers(batch, self.model)
        with torch.no_grad():
            before, worse, _ = self._answers(batch, self.reference)
        smoothing = stage.preference.label_smoothing
        each, _ = losses.dpo(-chosen, -rejected, -before, -worse, stage.preference.beta, smoothing)
        return each, counts

    def _answers(self, batch: ChatBatch | PackBatch, model: Model[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Negative log-likelihood of each sample's chosen and rejected answer, and tokens of the chosen one, [B] each."""
        if isinstance(batch, PackBatch):
            _, sums, counts = self.pack_losses(batch, model)
            return sums[::2], sums[1::2], counts[::2]
        chosen, counts = self._next_token(batch.inputs, model)
        return chosen, self._next_token(batch.rejected, model)[0], counts

    def _anneal(self, stage: Stage, step: int) -> None:
        """Set the temperature of the visual tokenizer, where there is one: linear from the first step to the last."""
        if stage.tau is None:
            return
        first, last = stage.tau
        tau = first + (last - first) * step / max(stage.steps - 1, 1)
        for module in _with_tau(self.model):
            module.tau = tau

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the model has its averaged weights, if the run keeps any."""
        if self.ema is None:
            yield
            return
        parameters = {n: parallel.local(p.detach()) for n, p in self.model.named_parameters() if n in self.ema}
        updates = {n: parallel.local(b.lora_B.weight.detach()) for n, b in self._stage_adapters().items()}
        parameters |= updates  # they are in the averages already
        kept = {n: p.clone() for n, p in parameters.items()}
        for name, parameter in parameters.items():
            if name in updates:
                parameter.zero_()
            else:
                parameter.copy_(parallel.local(self.ema[name]))
        try:
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])

    def _learning(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _average(self, stage: Stage, step: int) -> None:
        if self.ema is None or self.run.ema is None:
            return
        decay = min(stage.ema or self.run.ema, (1 + step) / (10 + step))  # the first weights are soon forgotten
        parameters = dict(self.model.named_parameters())
        adapted = {f"{name}.weight": layer for name, layer in self._stage_adapters().items()}
        names = [name for name in self.ema if name not in adapted]
        theirs = [parallel.local(parameters[n].detach()) for n in names]
        if names:
            torch._foreach_lerp_([parallel.local(self.ema[n]) for n in names], theirs, 1 - decay)
        with torch.no_grad():
            for name, layer in adapted.items():
                parallel.local(self.ema[name]).lerp_(merged(layer), 1 - decay)

    def _stage_adapters(self) -> dict[str, lora.LoRALinear]:
        """The adapters of the stage at hand, by layer: not those of a run that trains adapters alone."""
        return {} if self.run.model.lora is not None else lora.adapters(self.model)

    @torch.no_grad()
    def renew_averages(self) -> None:
        """The averages begin anew with the weights as they are."""
        parameters = dict(self.model.named_parameters())
        for name, tensor in (self.ema or {}).items():
            parallel.local(tensor).copy_(parallel.local(parameters[name]))

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        enabled = self.run.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _refuse(self, rows: Sequence[RowReport], norm: float, stage: Stage, step: int) -> None:
        if not self.world.first:
            raise ElsewhereError(f"stage {stage.name}, step {step}: the loss is not finite: rank 0 names the samples")
        bad = [f"{r.key} ({r.task})" for r in rows if not math.isfinite(r.loss)]
        keys = ", ".join(r.key for r in rows)
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
