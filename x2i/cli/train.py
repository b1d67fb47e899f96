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
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Set a key of the run, e.g. stages.high.steps=10 (a stage by name or number); repeatable.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Train on Ray, with so many workers: a GPU each where there are so many, else a CPU.",
            show_default=False,
            rich_help_panel="On Ray",
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="The cluster, `auto` or ray://host:10001; without, Ray is started here.",
            show_default=False,
            rich_help_panel="On Ray",
        ),
    ] = None,
    retries: Annotated[
        int,
        typer.Option(
            min=0, help="How often the workers are started anew after one was lost.", rich_help_panel="On Ray"
        ),
    ] = 3,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Train nothing: print what each stage would do, and what it would cost.",
            rich_help_panel="Before training",
        ),
    ] = False,
    devices: Annotated[
        int, typer.Option(min=1, help="With --explain: how many devices.", rich_help_panel="Before training")
    ] = 8,
    device_name: Annotated[
        str, typer.Option(help="With --explain: which, e.g. h100, a100, b200.", rich_help_panel="Before training")
    ] = "h100",
    mfu: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=1,
            help="With --explain: share of the devices' peak that is reached.",
            rich_help_panel="Before training",
        ),
    ] = 0.45,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Train a model on corpora, stage after stage, or go on where the run was stopped.

    A second call goes on from the newest checkpoint, with exactly the samples that were due, also on another number of
    devices. A finished run computes nothing. Ctrl-C finishes the step and writes a checkpoint.

    Example: x2i train configs/train/quickstart.yaml

    Example: x2i train configs/train/omnigen.yaml --explain --devices 104 --device-name a100

    Example: x2i train configs/train/omnigen.yaml --set scale=tiny --set output=runs/omnigen_tiny

    Example: torchrun --nproc-per-node 8 -m x2i train configs/train/omnigen.yaml

    Example: x2i train configs/train/omnigen.yaml --workers 16 --address auto
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

    progress = Silent() if as_json else Bar(console)
    options = {"fresh": fresh, "stage": stage, "reconcile": reconcile}
    if workers is not None:
        from x2i.trainer.launch import train_on_ray

        result = train_on_ray(config, workers, address, retries=retries, progress=progress, **options)
    else:
        result = run_train(config, progress=progress, **options)
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
