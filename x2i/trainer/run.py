"""Start a run, or go on with it: what is there, what has changed, who else is at it. Light until it must train.

from x2i.trainer.run import train
result = train("configs/train/quickstart.yaml")
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from x2i import corpus
from x2i.base.errors import ElsewhereError, RecipeError, X2IError
from x2i.base.files import exclusive, remove, remove_leftovers
from x2i.corpus.corpus import Corpus
from x2i.trainer import changes, checkpoint, record
from x2i.trainer.config import RunConfig, load_run
from x2i.trainer.course import Course, place_of, plot
from x2i.trainer.progress import Progress, Silent
from x2i.trainer.record import LOGS
from x2i.trainer.world import World, is_lost_contact, launched

log = logging.getLogger(__name__)

LEDGER = "ledger"


@dataclass(frozen=True)
class Result:
    """What a run has made.

    Attributes:
        output: the run's folder; `logs`: TensorBoard's files.
        checkpoint: the newest checkpoint; `preview`: its picture, if one was drawn.
        step: steps done; `total_steps`: steps of all stages; `steps_now`: those of this call.
        seconds: time of this call.
        train_loss: mean of the last steps, by task (empty if nothing was computed now).
        held_out: loss on held-out samples by task, beside that of the best constant answer.
        damaged: samples that were replaced by their spares, with the reason.
    """

    output: Path
    checkpoint: Path
    preview: Path | None
    logs: Path
    step: int
    total_steps: int
    steps_now: int = 0
    seconds: float = 0.0
    train_loss: dict[str, float] = field(default_factory=dict)
    held_out: dict[str, dict[str, float]] = field(default_factory=dict)
    damaged: list[dict[str, str]] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether all stages are done."""
        return self.step >= self.total_steps

    def to_json(self) -> dict[str, Any]:
        """JSON types only."""
        paths = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}
        return {**paths, "finished": self.finished}


def train(
    run: str | Path | RunConfig,
    *,
    fresh: bool = False,
    stage: str | None = None,
    reconcile: bool = False,
    progress: Progress | None = None,
    ask: Callable[[], int] = int,
) -> Result:
    """Train, or go on from the newest checkpoint of the run's output.

    Args:
        run: a run file, or its content.
        fresh: remove what an earlier run left in the output, and start over.
        stage: train this stage alone: from the end of the one that it follows if that is there, else from the run's own
            beginning. Steps are numbered as in the whole run, and trained one by one in order the stages end as in it.
        reconcile: go on though corpora have changed: from this step on the samples are those that the corpora as they
            are now would have given it; run.json notes the step. What was held out stays so, by its image's id.
        progress: is told what happens; default: nobody.
        ask: called at each step where signals do not come: the one by which the run is to stop, or 0.

    Raises:
        RecipeError: the run file is wrong, or the run or a corpus has changed since the first checkpoint.
        X2IError: another process trains here, or the run failed.
        Stopped: the run was asked to stop, and wrote a checkpoint.
    """
    config = run if isinstance(run, RunConfig) else load_run(run)
    world: World | None = None
    try:
        world = World(config.compute.timeout_minutes)
        progress = (progress if world.first else None) or Silent()
        with contextlib.ExitStack() as held:
            course, corpora = _entered(config, world, held, fresh, stage, reconcile, progress)
            if not course.places:
                assert course.newest is not None
                what = f"stage {stage} is" if stage else "all is"
                progress.note(f"{config.output}: {what} finished already, at step {course.step}; nothing to do")
                return result_of(config, course.newest)

            # threads that wait must not spin: beside another busy process, spinning makes small steps ten times slower
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            from x2i.trainer.session import Session  # torch and transformers from here on

            return Session(config, corpora, course, progress, world, ask).run()
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's: it is imported where it is used
            raise X2IError(
                f"{config.output}: out of memory ({str(error).partition('. ')[0]}). A smaller stages.N.micro_batch (of "
                "packs: fewer pack.tokens), compute.checkpointing: true or more devices need less; the same command goes "
                "on from the last checkpoint"
            ) from None
        if launched() and is_lost_contact(error):
            raise ElsewhereError(
                f"{config.output}: rank {os.environ['RANK']} has lost contact with another one, which has failed or hangs "
                f"({str(error).partition('. ')[0]}). The same command goes on from the last checkpoint"
            ) from None
        raise
    finally:
        if world is not None:
            world.close()


def _entered(
    config: RunConfig,
    world: World,
    held: contextlib.ExitStack,
    fresh: bool,
    stage: str | None,
    reconcile: bool,
    progress: Progress,
) -> tuple[Course, list[Corpus]]:
    """Rank 0 takes the run's folder for itself and puts it in order; all get to know what is to be done."""
    corpora: list[Corpus] = []
    course: Course | None = None
    fault: X2IError | OSError | None = None
    try:
        corpora = [corpus.open(path) for path in config.corpora]
    except X2IError as error:
        fault = error
    world.agree(fault)
    if world.first:
        try:
            _check_wandb(config)
            if stage is not None:
                place_of(config, stage)
            held.enter_context(exclusive(config.output, "training"))
            remove_leftovers(config.output)
            if fresh:
                clear(config.output)
            found = checkpoint.all_of(config.output)
            altered = record.claim(config, corpora, found, reconcile, stage)
            course = plot(config, found, stage)
            for line in (
                [f"the run goes on with what has changed after step {course.step}:", *altered] if altered else ()
            ):
                progress.note(line)
        except (X2IError, OSError) as error:
            fault = error
    course, failed = world.tell((course, fault is not None))
    if failed:
        raise fault or ElsewhereError(f"{config.output}: rank 0 cannot begin: its message says why")
    return course, corpora


def _check_wandb(config: RunConfig) -> None:
    if config.wandb is None:
        return
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise RecipeError(
            "wandb: the library is not installed: `pip install 'x2i[wandb]'`, or leave the section out (TensorBoard's "
            "files are written in any case)"
        ) from None


def result_of(config: RunConfig, newest: checkpoint.Checkpoint, **now: Any) -> Result:
    """The result that a checkpoint stands for; `now` adds what this call did."""
    return Result(
        output=config.output,
        checkpoint=newest.path,
        preview=newest.preview,
        logs=config.output / LOGS,
        step=newest.step,
        total_steps=config.total_steps,
        held_out=newest.info["held_out"],
        **now,
    )


def clear(output: Path) -> None:
    """Remove a run's checkpoints, logs and identity from its folder; other files stay."""
    for found in checkpoint.all_of(output):
        remove(found.path)
    for name in (LOGS, LEDGER, record.FILE, changes.FILE, checkpoint.VAE_FOLDER, "lengths.json", "lengths", "ray"):
        remove(output / name)
    for kept in output.glob("samples-until-*.parquet"):
        remove(kept)
