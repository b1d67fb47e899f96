"""One sitting of a run: from a checkpoint (or nothing) through the stages to the end, or to an interruption."""

from __future__ import annotations

import functools
import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from x2i.base.errors import ElsewhereError, RecipeError, Stopped, X2IError
from x2i.corpus.corpus import Corpus
from x2i.model import lora, weights
from x2i.trainer import changes, checkpoint
from x2i.trainer.batch import Batch, ChatBatch
from x2i.trainer.config import RunConfig
from x2i.trainer.course import Course, Origin
from x2i.trainer.data import Example
from x2i.trainer.flops import StageFlops
from x2i.trainer.learner import Learner
from x2i.trainer.ledger import Entry, Ledger
from x2i.trainer.loader import Loader
from x2i.trainer.meter import Logs, Meter, Work
from x2i.trainer.opening import announce
from x2i.trainer.peak import peak
from x2i.trainer.progress import Progress
from x2i.trainer.reports import StepReport, Totals
from x2i.trainer.run import Result, result_of
from x2i.trainer.saver import restore
from x2i.trainer.setup import Setup
from x2i.trainer.shares import Shares
from x2i.trainer.signals import Signals
from x2i.trainer.stage import Stage
from x2i.trainer.world import World
from x2i.trainer.writing import Writing

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
        share = world.share(run.compute.shards)
        try:
            self._check_world()
            with world.alike():
                self._setup = Setup(run, corpora, newest, world.device(run.device), share, progress.note)
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
        if share is not None:
            self._fill()
        self._shares = Shares(world.rank, world.size, self._setup.table.chats)
        if newest is not None:
            self._restore(newest.path)
        self._meter = Meter(world.size, peak(self._setup.device))
        self._writing = Writing(run, self._setup, self._learner, self._meter, progress, world)
        self._flops = functools.lru_cache(self._flops_of)
        self._signals = Signals(progress, ask)
        self._stop = 0  # the one on which all ranks have agreed

    def _fill(self) -> None:
        """Each rank reads what it holds of the weights. Raises X2IError, on all ranks together."""
        self._setup.model = self._learner.model
        fault: X2IError | OSError | None = None
        try:
            self._setup.fill()
        except (X2IError, OSError) as error:
            fault = error
        self._world.agree(fault)
        self._setup.begin()
        self._learner.renew_averages()

    def _check_world(self) -> None:
        run, size = self._run, self._world.size
        if run.compute.shards is not None and size % run.compute.shards:
            raise RecipeError(f"compute.shards: {run.compute.shards} does not divide the {size} ranks of this launch")

    def run(self) -> Result:
        """Train to the end. On SIGINT or SIGTERM: finish the step, write a checkpoint, raise Stopped."""
        began, made = time.monotonic(), 0
        announce(self._run, self._setup, self._learner, self._step, self._progress)
        self._logs = Logs(self._run, 0 if self._course.ahead else self._step) if self._world.first else None
        self._progress.start(self._run.total_steps, self._step)
        try:
            with self._signals.awaited():
                for place in self._course.places:
                    start = max(self._step - self._run.first(place), 0) if place == self._course.places[0] else 0
                    self._step = self._run.first(place) + start
                    self._stage(place, start)
                    self._held = self._step
                    made += self._step - self._run.first(place) - start
                    if self._stop:
                        break
                self._writing.saver.wait()
        finally:
            self._writing.saver.join()
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
            damaged=self._writing.damaged(),
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
        for number, (examples, fault) in enumerate(_arriving(loader), start):
            self._meter.lap("data")
            batches, totals, work = self._prepared(place, number, examples, fault)
            self._meter.lap("encoding")
            report = self._learner.step(batches, stage, number, self._step, totals)
            self._step += 1
            self._meter.lap("compute")
            self._note(stage, report, work)
            if self._world.size == 1:
                self._stop = self._signals.asked()
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

    def _prepared(
        self, place: int, number: int, examples: list[Example], unread: X2IError | OSError | None
    ) -> tuple[list[Batch], Totals, Work]:
        """This rank's batches of a step, and what all ranks have.

        Here the ranks agree: on going on at all, and on stopping after this step.

        Args:
            place: of the stage; `number`: of its step.
            examples: this rank's.
            unread: why it has none, if they could not be read.

        Raises:
            X2IError: a rank cannot read or prepare its samples, or the last checkpoint could not be written.
            OSError: this rank cannot read its samples.
        """
        stage = self._run.stages[place]
        draws = self._setup.plans[place].step(number)
        owned = self._shares.owned(draws)
        asked = self._signals.asked() if self._world.size > 1 else 0
        batches: list[Batch] = []
        fault, found, work = unread, Totals(0, 0, 0), Work(0, 0)
        filler = None
        while True:
            if not batches and unread is None:
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
            told = [found.rows, found.chats, found.tokens, asked > 0, fault is not None, self._writing.saver.failed]
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
            self._writing.saver.wait()
        if faults:
            raise fault or ElsewhereError("another rank cannot read or prepare its samples: its message says why")
        return batches, Totals(rows, chats, tokens), Work(*done)

    def _flops_of(self, place: int) -> StageFlops:
        run, stage = self._run, self._run.stages[place]
        config, learning = self._setup.processors[place].config, self._learner.trained(place)
        adapted, preference = self._learner.what(place).adapted, stage.preference is not None
        return StageFlops(config, learning, lora=run.model.lora, adapted=adapted, preference=preference)

    def _checkpoint(self, place: int, stage_step: int, full: bool) -> None:
        if self._ledger is not None:
            self._ledger.flush(self._step)
        self._newest = self._writing.checkpoint(place, stage_step, self._step, self._begun, full, self._logs)

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
            self._writing.saver.wait()
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
        with checkpoint.resuming(path):
            self._restore_averages(path)

    def _restore_averages(self, path: Path) -> None:
        ema = self._learner.ema
        if ema is not None and self._run.model.lora is None:
            weights.fill(ema, path / checkpoint.EMA)
        elif ema is not None:
            folder = path / checkpoint.EMA_ADAPTER
            weights.fill({lora.PREFIX + n: t for n, t in ema.items()}, folder / lora.WEIGHTS)

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


def _arriving(loader: Iterable[list[Example]]) -> Iterator[tuple[list[Example], X2IError | OSError | None]]:
    """What a rank has for each step; or why it has nothing, and then no more."""
    try:
        for examples in loader:
            yield examples, None
    except (X2IError, OSError) as error:
        yield [], error


def _shown(batches: Sequence[Batch]) -> Example | None:
    """A conversation that the model can be shown."""
    return next((b.examples[0] for b in batches if isinstance(b, ChatBatch)), None)
