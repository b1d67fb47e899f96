"""Start a run, or go on with it: what is there, what has changed, who else is at it. Light until it must train.

from x2i.trainer.run import train
result = train("configs/train/quickstart.yaml")
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from x2i import corpus
from x2i.base.errors import ElsewhereError, RecipeError, X2IError
from x2i.base.files import exclusive, remove, remove_leftovers, write_text
from x2i.corpus.corpus import Corpus
from x2i.trainer import checkpoint
from x2i.trainer.config import RunConfig, load_run
from x2i.trainer.progress import Progress, Silent
from x2i.trainer.world import World, is_lost_contact

log = logging.getLogger(__name__)

IDENTITY, LOGS, LEDGER = "run.json", "logs", "ledger"

#: Of run.json. 2: samples come in the order of `x2i.trainer.plan` by row groups. 3: the optimiser's state is divided.
FORMAT = 3


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


def train(run: str | Path | RunConfig, *, fresh: bool = False, progress: Progress | None = None) -> Result:
    """Train, or go on from the newest checkpoint of the run's output.

    Args:
        run: a run file, or its content.
        fresh: remove what an earlier run left in the output, and start over.
        progress: is told what happens; default: nobody.

    Raises:
        RecipeError: the run file is wrong, or the run or a corpus has changed since the first checkpoint.
        X2IError: another process trains here, or the run failed.
        Stopped: the run was asked to stop, and wrote a checkpoint.
    """
    config = run if isinstance(run, RunConfig) else load_run(run)
    world = World(config.compute.timeout_minutes)
    progress = (progress if world.first else None) or Silent()
    try:
        with contextlib.ExitStack() as held:
            newest, corpora = _entered(config, world, held, fresh)
            if newest is not None and newest.step >= config.total_steps:
                progress.note(f"{config.output}: finished already, at step {newest.step}; nothing to do")
                return result_of(config, newest)

            # threads that wait must not spin: beside another busy process, spinning makes small steps ten times slower
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            from x2i.trainer.session import Session  # torch and transformers from here on

            return Session(config, corpora, newest, progress, world).run()
    except RuntimeError as error:
        if world.size > 1 and is_lost_contact(error):
            raise ElsewhereError(
                f"{config.output}: rank {world.rank} has lost contact with another one, which has failed or hangs "
                f"({str(error).partition('. ')[0]}). The same command goes on from the last checkpoint"
            ) from None
        raise
    finally:
        world.close()


def _entered(
    config: RunConfig, world: World, held: contextlib.ExitStack, fresh: bool
) -> tuple[checkpoint.Checkpoint | None, list[Corpus]]:
    """Rank 0 takes the run's folder for itself and puts it in order; all get the checkpoint to go on from."""
    corpora = [corpus.open(path) for path in config.corpora]
    newest, fault = None, None
    if world.first:
        try:
            _check_wandb(config)
            held.enter_context(exclusive(config.output, "training"))
            remove_leftovers(config.output)
            if fresh:
                clear(config.output)
            found = checkpoint.all_of(config.output)
            newest = found[-1] if found else None
            _claim(config, corpora, new=newest is None)
        except (X2IError, OSError) as error:
            fault = error
    newest, failed = world.tell((newest, fault is not None))
    if failed:
        raise fault or ElsewhereError(f"{config.output}: rank 0 cannot begin: its message says why")
    return newest, corpora


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
    for name in (LOGS, LEDGER, IDENTITY, checkpoint.VAE_FOLDER):
        remove(output / name)


def _claim(config: RunConfig, corpora: list[Corpus], new: bool) -> None:
    """Write what this run is into its folder, or compare with what is there. Raises RecipeError if they differ.

    As long as there is no checkpoint the run is `new`, and may change at will.
    """
    now = {
        "format": FORMAT,
        "run": config.digest,
        "corpora": [{"path": str(c.path), "digest": c.digest} for c in corpora],
        "config": config.identity(),
    }
    path = config.output / IDENTITY
    if new:
        for name in (LOGS, checkpoint.VAE_FOLDER):
            remove(config.output / name)
        write_text(path, json.dumps(now, indent=2, ensure_ascii=False) + "\n")
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        form = before["format"]
        changes = _differences(before["config"], now["config"])
        was, are = [str(c["digest"]) for c in before["corpora"]], [c.digest for c in corpora]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"{path}: missing or damaged ({error}). Use --fresh to start over, or another `output`."
        ) from None
    if form != FORMAT:
        raise RecipeError(
            f"{config.output}: this run was begun by another x2i (format {form}, this one has {FORMAT}), which gave it its "
            "samples or its noise otherwise: it cannot go on exactly. Give another `output`, with `model: {weights: "
            f"{config.output}}}` to start from its newest checkpoint; or use --fresh to remove it and start over."
        )
    if was != are:
        changes.append(f"corpora: their digests were {_short(was)}, now they are {_short(are)}")
    if changes:
        listed = "\n".join(f"  {c}" for c in changes)
        raise RecipeError(
            f"{config.output}: this folder holds another run; since it began these have changed:\n{listed}\n"
            "Undo the changes to go on with it, give another `output`, or use --fresh to remove it and start over."
        )


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    """The leaves in which two configurations differ: `stages.0.lr: was 0.001, is 0.002`."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{where}.{k}" if where else str(k))]
    return [] if old == new else [f"{where}: was {json.dumps(old)}, is {json.dumps(new)}"]


def _short(digests: list[str]) -> str:
    return ", ".join(d[:12] for d in digests)
