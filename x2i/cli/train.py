"""`x2i train`: a run file into checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from x2i.cli.console import console, print_json, table

if TYPE_CHECKING:
    from x2i.trainer.run import Result


def train(
    run: Annotated[Path, typer.Argument(help="The run, a YAML file.", show_default=False)],
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Remove the checkpoints that an earlier run left in the output; start over.")
    ] = False,
    stage: Annotated[
        str | None,
        typer.Option(
            help="Train this stage alone: from the end of the one that it follows, if that is there.",
            show_default=False,
        ),
    ] = None,
    reconcile: Annotated[
        bool,
        typer.Option("--reconcile", help="Go on though corpora have changed, with their samples as they are now."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Train a model on corpora, stage after stage, or go on where the run was stopped.

    A second call goes on from the newest checkpoint, with exactly the samples that were due. A finished run
    computes nothing. Ctrl-C finishes the step and writes a checkpoint.

    Example: x2i train configs/train/quickstart.yaml
    """
    from x2i.trainer.progress import Bar, Silent
    from x2i.trainer.run import train as run_train
    from x2i.trainer.world import first_of_launch

    result = run_train(
        run, fresh=fresh, stage=stage, reconcile=reconcile, progress=Silent() if as_json else Bar(console)
    )
    if not first_of_launch():
        return
    if as_json:
        print_json(result.to_json())
    else:
        show(result)


def show(result: Result) -> None:
    """Print what a run has made."""
    if result.held_out:
        losses = table(
            "Held-out loss: of the velocity, or per token", "task", "loss", "of a constant answer", "samples"
        )
        for task, loss in result.held_out.items():
            losses.add_row(task, f"{loss['loss']:.3f}", f"{loss['baseline']:.3f}", f"{loss['samples']:,}")
        console.print(losses)
    done = table("The run", "what", "figure")
    done.add_row("steps", f"{result.step:,} of {result.total_steps:,}, {result.steps_now:,} of them now")
    if result.steps_now:
        done.add_row("seconds", f"{result.seconds:.1f}")
    else:
        done.add_row("computed", "nothing: the run was finished already")
    if result.damaged:
        done.add_row("damaged samples replaced", f"{len(result.damaged):,} (see trainer.json)")
    done.add_row("checkpoint", str(result.checkpoint))
    done.add_row("preview", str(result.preview or "none"))
    done.add_row("TensorBoard", f"tensorboard --logdir {result.logs}")
    console.print(done)
