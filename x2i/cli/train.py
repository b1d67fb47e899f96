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
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Set a key of the run, e.g. stages.high.steps=10 (a stage by name or number); repeatable.",
        ),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Train nothing: print what each stage would do, and what it would cost.")
    ] = False,
    devices: Annotated[int, typer.Option(min=1, help="With --explain: how many devices.", show_default=True)] = 8,
    device_name: Annotated[str, typer.Option(help="With --explain: which, e.g. h100, a100, b200.")] = "h100",
    mfu: Annotated[
        float, typer.Option(min=0.01, max=1, help="With --explain: share of the devices' peak that is reached.")
    ] = 0.45,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Train a model on corpora, stage after stage, or go on where the run was stopped.

    A second call goes on from the newest checkpoint, with exactly the samples that were due. A finished run
    computes nothing. Ctrl-C finishes the step and writes a checkpoint.

    Examples: x2i train configs/train/quickstart.yaml
              x2i train configs/train/omnigen.yaml --explain --devices 104 --device-name a100
              x2i train configs/train/omnigen.yaml --set scale=tiny --set output=runs/omnigen_tiny
    """
    from x2i.trainer.config import load_run

    config = load_run(run, change or ())
    if explain:
        from x2i.cli import explain as tables
        from x2i.trainer.explain import explain as explain_run
        from x2i.trainer.told import Devices

        told = explain_run(config, Devices(devices, device_name, mfu))
        if as_json:
            print_json(told.to_json())
        else:
            tables.show(told)
        return
    from x2i.trainer.progress import Bar, Silent
    from x2i.trainer.run import train as run_train
    from x2i.trainer.world import first_of_launch

    result = run_train(config, fresh=fresh, progress=Silent() if as_json else Bar(console))
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
