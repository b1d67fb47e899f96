"""One sitting of a run: from a checkpoint (or nothing) through the stages to the end, or to an interruption."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from x2i import __version__
from x2i.base.errors import ElsewhereError, RecipeError, Stopped, X2IError
from x2i.corpus.corpus import Corpus
from x2i.model import lora, weights
from x2i.model.config import ModelFile
from x2i.model.sampling import Painter
from x2i.trainer import changes, checkpoint, parallel, parts, preview, tokens
from x2i.trainer.batch import Batch, ChatBatch
from x2i.trainer.capacity import words
from x2i.trainer.checkpoint import Checkpoint
from x2i.trainer.config import RunConfig
from x2i.trainer.course import Course, Origin
from x2i.trainer.data import Example
from x2i.trainer.evaluation import HeldOutLoss, held_out
from x2i.trainer.flops import StageFlops
from x2i.trainer.learner import Learner
from x2i.trainer.ledger import Entry, Ledger
from x2i.trainer.loader import Loader
from x2i.trainer.meter import Logs, Meter, Work
from x2i.trainer.packing import PackPlan
from x2i.trainer.peak import peak
from x2i.trainer.progress import Progress
from x2i.trainer.reports import StepReport, Totals
from x2i.trainer.run import Result, result_of
from x2i.trainer.saver import Saver, restore, state_of
from x2i.trainer.setup import Setup
from x2i.trainer.shares import Shares
from x2i.trainer.stage import Stage
from x2i.trainer.world import World

log = logging.getLogger(__name__)


class Session:
    """Builds everything that a run needs, then runs it. All random choices derive from the run's seed."""

    def __init__(
        self,
        run: RunConfig,
        corpora: list[Corpus],
        course: Course,
        progress: Progress,
        world: World,
        ask: Callable[[], int] = int,
    ) -> None:
        self._run = run
        self._progress = progress
        self._world = world
        self._course, newest = course, course.newest
        fault: X2IError | OSError | None = None
        try:
            self._setup = Setup(run, corpora, newest, world.device(run.device), progress.note)
            self._check_world()
            for origin in course.origins.values():
                if isinstance(origin, str):
                    checkpoint.fetched(origin)  # now, and not when its stage begins
        except (X2IError, OSError) as error:
            fault = error
        world.agree(fault)
        if world.first:
            changes.remember(run.output, self._setup.table)
        self._newest = newest
        self._step = course.step
        self._held: Origin = newest.step if newest else 0  # the step whose weights the model has, between stages
        self._begun: Origin = 0  # what the stage at hand has begun with
        self._learner = Learner(run, self._setup.model, self._setup.device, world, self._setup.build_like)
        self._shares = Shares(world.rank, world.size, self._setup.table.chats)
        self._saver = Saver(world)
        if newest is not None:
            self._restore(newest.path)
        self._meter = Meter(world.size, peak(self._setup.device))
        self._flops = functools.lru_cache(self._flops_of)
        self._signalled = 0  # the signal by which this rank was asked to stop
        self._ask = ask  # is asked for one, too
        self._stop = 0  # the one on which all ranks have agreed

    def _check_world(self) -> None:
        run, size = self._run, self._world.size
        if run.compute.shards is not None and size % run.compute.shards:
            raise RecipeError(f"compute.shards: {run.compute.shards} does not divide the {size} ranks of this launch")

    def run(self) -> Result:
        """Train to the end. On SIGINT or SIGTERM: finish the step, write a checkpoint, raise Stopped."""
        began, made = time.monotonic(), 0
        self._announce()
        self._logs = Logs(self._run, 0 if self._course.ahead else self._step) if self._world.first else None
        self._progress.start(self._run.total_steps, self._step)
        try:
            with self._interruptible():
                for place in self._course.places:
                    start = max(self._step - self._run.first(place), 0) if place == self._course.places[0] else 0
                    self._step = self._run.first(place) + start
                    self._stage(place, start)
                    self._held = self._step
                    made += self._step - self._run.first(place) - start
                    if self._stop:
                        break
                self._saver.wait()
        finally:
            self._saver.join()
            self._progress.close()
            if self._logs is not None:
                self._logs.close()
            self._setup.reader.close()
        assert self._newest is not None
        if self._stop:
            self._progress.note(f"stopped at step {self._step}; the same command goes on from {self._newest.path}")
            raise Stopped(self._stop)
        whole = len(self._course.origins) == len(self._run.stages)
        return result_of(
            self._run,
            checkpoint.all_of(self._run.output)[-1] if whole else self._newest,
            steps_now=made,
            seconds=time.monotonic() - began,
            train_loss={t: round(v, 6) for t, v in sorted(self._meter.smoothed.items()) if t},
            damaged=self._damaged(),
        )

    def _stage(self, place: int, start: int) -> None:
        """Train one stage from step `start` of it to its end, with checkpoints on the way."""
        run, stage, plan = self._run, self._run.stages[place], self._setup.plans[place]
        self._ledger = Ledger(run.output, self._step, run.end(place)) if self._world.first else None
        if start == 0:
            self._load_origin(self._course.origins[place])
            self._begin(place)
            self._meter.smoothed = {}
        loader = Loader(self._setup.reader, plan, stage, start, run.reading, self._shares.take)
        self._meter.start()
        for number, examples in enumerate(loader, start):
            self._meter.lap("data")
            batches, totals, work = self._prepared(place, number, examples)
            self._meter.lap("encoding")
            report = self._learner.step(batches, stage, number, self._step, totals)
            self._step += 1
            self._meter.lap("compute")
            self._note(stage, report, work)
            if self._world.size == 1:
                self._stop = self._asked()
            last = number + 1 == stage.steps
            if last:
                self._learner.end_stage()
                self._setup.model = self._learner.model
            if last or self._step % run.checkpoint_every == 0:
                self._checkpoint(place, number + 1, full=True)
            elif self._stop:
                self._checkpoint(place, number + 1, full=False)
            if self._stop:
                return

    def _prepared(self, place: int, number: int, examples: list[Example]) -> tuple[list[Batch], Totals, Work]:
        """This rank's batches of a step, and what all ranks have.

        Here the ranks agree: on going on at all, and on stopping after this step.

        Raises:
            X2IError: a rank cannot prepare its batches, or the last checkpoint could not be written.
        """
        stage = self._run.stages[place]
        draws = self._setup.plans[place].step(number)
        owned = self._shares.owned(draws)
        asked = self._asked() if self._world.size > 1 else 0
        batches: list[Batch] = []
        fault, filler = None, None
        while True:
            if not batches:
                try:
                    batches = self._setup.batchers[place].training(
                        *(examples, self._run.seed, stage, owned, {d.index: d for d in draws}, filler)
                    )
                    fault, found, flops = None, Totals.of(batches), self._flops(place)
                    batches = [replace(batch, lengths=tuple(flops.lengths(batch))) for batch in batches]
                    owned_tokens = sum(n for b in batches for n, own in zip(b.lengths, b.own, strict=True) if own)
                    work = Work(flops.step(batches), owned_tokens)
                except X2IError as error:
                    fault, found, work = error, Totals(0, 0, 0), Work(0, 0)
            told = [found.rows, found.chats, found.tokens, asked > 0, fault is not None, self._saver.failed]
            totals = self._world.sum([*told, work.flops, work.tokens])
            rows, chats, tokens, stop, faults, unwritten, *done = totals
            if not faults or filler is not None:
                break
            # one that has no conversation to show computes another's, which does not count there
            filler = next(filter(None, self._world.gather(_shown(batches))), None)
            if filler is None:
                break
        if stop:
            self._stop = asked or signal.SIGTERM
        if unwritten:
            self._saver.wait()
        if faults:
            raise fault or ElsewhereError("another rank cannot prepare its samples: its message says why")
        return batches, Totals(rows, chats, tokens), Work(*done)

    def _asked(self) -> int:
        return self._signalled or self._ask()

    def _flops_of(self, place: int) -> StageFlops:
        run, stage = self._run, self._run.stages[place]
        config, learning = self._setup.processors[place].config, self._learner.trained(place)
        adapted, preference = self._learner.what(place).adapted, stage.preference is not None
        return StageFlops(config, learning, lora=run.model.lora, adapted=adapted, preference=preference)

    def _checkpoint(self, place: int, stage_step: int, full: bool) -> None:
        """Begin to write a checkpoint; a full one has held-out losses and a preview. All ranks do it together."""
        run, stage, learner = self._run, self._run.stages[place], self._learner
        self._meter.start()
        losses: dict[str, HeldOutLoss] = {}
        files: dict[str, Any] = {}
        if full:
            with learner.averaged():
                losses = held_out(learner, self._setup.batchers[place], self._setup.held_out(stage), stage)
                self._meter.lap("evaluation")
                with parallel.whole(learner.model), learner.autocast():
                    picture = self._preview(place)
                self._meter.lap("preview")
            if picture is not None:
                files[checkpoint.PREVIEW] = picture
        files |= self._weights() | {
            checkpoint.CONFIG: ModelFile(
                architecture=self._setup.model.config.architecture,
                model=self._setup.processors[place].config.model_dump(mode="json"),
                vae=self._setup.vae_config if self._setup.model.draws else None,
                max_text_tokens=run.max_text_tokens,
                resolution=stage.resolution,
                chat_resolution=stage.chat_resolution,
                base=None if run.model.lora is None else self._setup.weights,
            ).model_dump(mode="json"),
            tokens.FILE: self._setup.tokenizer.to_str(pretty=True).encode(),
            checkpoint.TRAINER: {
                "format": 1,
                "step": self._step,
                "stage": stage.name,
                "stage_step": stage_step,
                "begun": self._begun,
                "seed": run.seed,
                "run": run.digest,
                "ranks": self._world.size,
                "weights": self._setup.weights,
                "corpora": [{"path": str(c.path), "digest": c.digest} for c in self._setup.table.corpora],
                "held_out": {task: asdict(loss) for task, loss in losses.items()},
                "damaged": self._damaged(),
                "versions": {"x2i": __version__, "torch": torch.__version__},
            },
        }
        optimizer = None
        if stage_step < stage.steps:
            assert learner.optimizer is not None
            optimizer = state_of(learner.model, learner.optimizer)
        if self._ledger is not None:
            self._ledger.flush(self._step)
        target = checkpoint.folder(run.output, self._step)
        self._newest = written = Checkpoint(target, self._step)
        self._saver.save(target, files, optimizer, lambda: self._written(written, losses))
        if self._logs is not None:
            self._logs.held_out(losses, self._step)
        self._meter.lap("checkpoint")

    def _written(self, written: Checkpoint, losses: dict[str, HeldOutLoss]) -> None:
        """A checkpoint is there: say so, and remove those that are not kept."""
        shown = "  ".join(f"{t} {v.loss:.3f} ({v.baseline:.3f})" for t, v in losses.items())
        told = f"; held-out loss (of a constant answer): {shown}" if shown else ""
        self._progress.note(f"checkpoint {written.path}{told}")
        ends = {self._run.end(place) for place in range(len(self._run.stages))}
        checkpoint.prune(self._run.output, self._run.keep, ends, until=written.step)

    def _damaged(self) -> list[dict[str, Any]]:
        """What could not be used, on all ranks."""
        each = self._world.gather({n: vars(d) for n, d in self._setup.reader.damaged.items()})
        return [damage for _, damage in sorted({n: d for part in each for n, d in part.items()}.items())]

    def _weights(self) -> dict[str, Any]:
        """The files of the weights: all of them, or the adapters alone. What they hold is a copy in host memory."""
        ema, model, first = self._learner.ema, self._learner.model, self._world.first
        lora_only = self._run.model.lora is not None
        state = lora.adapter_state(model) if lora_only else model.state_dict()
        copied = parallel.gathered(state, self._learner.tied, first)
        of_stage = {} if lora_only else lora.adapters(model)
        beside = {name: copied[name] for name in parts.resumable(model)} if of_stage and first else None
        if of_stage and first:
            copied = parts.plain(copied, {name: layer.config for name, layer in of_stage.items()})
        averaged = None if ema is None else copied | parallel.gathered(ema, {}, first)
        if not lora_only:
            found = {checkpoint.MODEL: copied, checkpoint.EMA: averaged, checkpoint.ADAPTED: beside}
            return {name: functools.partial(weights.save, held) for name, held in found.items() if held is not None}
        found = {checkpoint.ADAPTER: copied, checkpoint.EMA_ADAPTER: averaged}
        config, base = self._run.model.lora, self._setup.weights
        assert config is not None
        return {
            name: functools.partial(lora.write_adapter, held, config, base=base)
            for name, held in found.items()
            if held is not None
        }

    def _begin(self, place: int) -> None:
        """Begin a stage, now or (after a resume) with the weights that it began with already at hand."""
        self._learner.start_stage(place)
        self._setup.model = self._learner.model
        if self._run.stages[place].preference is not None:
            self._learner.keep_reference()

    def _load_origin(self, origin: Origin) -> None:
        """What a stage begins with, unless the model has it: with its averaged weights, if it is a stage of this run."""
        self._begun = origin
        if isinstance(origin, str):
            self._begun = self._world.tell(checkpoint.pinned(origin) if self._world.first else None)
            self._setup.load_origin(self._begun)
            self._learner.renew_averages()
        elif origin != self._held:
            self._saver.wait()
            self._setup.load_origin(origin)
            self._restore_averages(checkpoint.folder(self._run.output, origin))

    def _restore(self, path: Path) -> None:
        """The optimiser, the averaged weights and the reference of a checkpoint; the weights are read already."""
        place, start = self._course.places[0], self._step - self._run.first(self._course.places[0])
        if start:
            self._begun = self._course.origins[place]
            if self._run.stages[place].preference is not None:
                self._setup.load_origin(self._begun)
            self._begin(place)
            if self._run.stages[place].preference is not None or self._learner.what(place).adapted:
                self._setup.load(path)  # over those of the beginning, and into the adapters
            assert self._learner.optimizer is not None
            restore(self._learner.model, self._learner.optimizer, path)
        self._restore_averages(path)

    def _restore_averages(self, path: Path) -> None:
        ema = self._learner.ema
        if ema is not None and self._run.model.lora is None:
            weights.fill(ema, path / checkpoint.EMA)
        elif ema is not None:
            folder = path / checkpoint.EMA_ADAPTER
            weights.fill({lora.PREFIX + n: t for n, t in ema.items()}, folder / lora.WEIGHTS)

    def _preview(self, place: int) -> bytes | None:
        stage, processor = self._run.stages[place], self._setup.processors[place]
        options, side = self._run.preview, stage.resolution
        chosen = preview.choose(self._setup.reader, stage, options.per_task)
        painter = Painter(self._setup.model, self._setup.vae, processor) if self._setup.model.draws else None
        rows = preview.rows_of(painter, chosen, options, side) if painter else []
        rows += preview.answers_of(self._setup.model, processor, chosen, options, plain=stage.plain_captions)
        if not rows:
            return None
        picture = preview.grid(rows)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", optimize=True)
        if self._logs is not None:
            self._logs.picture("preview", picture, self._step)
        return buffer.getvalue()

    def _note(self, stage: Stage, report: StepReport, work: Work) -> None:
        """Tell the ledger, the logs and the console of a step."""
        scalars = self._meter.step(report, work)
        if report.left_out:
            log.info("step %d: no room was left in their packs for %s", self._step, ", ".join(report.left_out))
        if self._ledger is not None:
            self._ledger.add(self._entries(stage, report))
        if self._logs is not None:
            self._logs.step(scalars, self._step)
        by_task = {t: v for t, v in self._meter.smoothed.items() if t}
        self._progress.step(stage.name, self._step, self._meter.smoothed[""], by_task)
        self._progress.speed(self._meter.speed)

    def _entries(self, stage: Stage, report: StepReport) -> Iterator[Entry]:
        for row in report.rows:
            ref = self._setup.table[row.sample]
            yield Entry(
                *(self._step, stage.name, row.draw, ref.place, ref.key, ref.task, ref.source, ref.image_id),
                *(row.loss, row.t, row.tokens, row.length, row.replaced),
            )

    def _announce(self) -> None:
        parameters = sum(p.numel() for p in self._setup.model.parameters())
        training = sum(len(v) for v in self._setup.table.train.values())
        held = sum(len(v) for v in self._setup.table.held_out.values())
        where = f"goes on at step {self._step}" if self._step else "starts"
        self._progress.note(
            f"{self._run.output}: {where} on {self._setup.device}; {parameters / 1e6:.1f} million parameters, "
            f"{training} samples to train on, {held} held out"
        )
        if self._setup.table.apart:
            self._progress.note(
                f"{self._setup.table.apart} samples are on neither side: a held-out image is among their inputs"
            )
        for path in self._setup.table.derived:
            self._progress.note(
                f"{path}: an earlier x2i built it: its images' digests are computed at each start; `x2i build` on its "
                "recipe writes them into the manifest"
            )
        for place, stage in enumerate(self._run.stages):
            trained = self._learner.what(place).count
            if trained < parameters:
                what = "adapters" if self._run.model.lora else ", ".join(stage.train or ())
                self._progress.note(f"stage {stage.name} trains {trained:,} of {parameters:,} parameters: {what}")
            if long := getattr(self._setup.plans[place], "too_long", None):
                assert stage.pack is not None
                shown = ", ".join(f"{count:,} of {task}" for task, count in long.items())
                self._progress.note(
                    f"stage {stage.name} never draws samples that do not fit into a pack of {stage.pack.tokens:,} tokens: "
                    f"{shown}"
                )
            if stage.pack and isinstance(plan := self._setup.plans[place], PackPlan):
                for told in filter(None, [words(stage.name, stage.pack.tokens, plan.fill, plan.better())]):
                    self._progress.note(told)
        unused = sorted(set(self._setup.table.tasks) - self._setup.tasks)
        if unused:
            self._progress.note(f"tasks of the corpora that no stage trains: {', '.join(unused)}")

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Within the block the first SIGINT or SIGTERM asks for a checkpoint; the second one ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, frame: FrameType | None) -> None:
            self._signalled = number
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._progress.note("stopping after this step; once more to stop at once")

        for each in before:
            signal.signal(each, ask)
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def _shown(batches: Sequence[Batch]) -> Example | None:
    """A conversation that the model can be shown."""
    return next((b.examples[0] for b in batches if isinstance(b, ChatBatch)), None)
