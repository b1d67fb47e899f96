"""`x2i bench-loader`: how fast a run's samples can be read, with and without decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from x2i.cli.console import console, print_json, table


def bench_loader(
    run: Annotated[Path, typer.Argument(help="The run, a YAML file.", show_default=False)],
    stage: Annotated[str | None, typer.Option(help="Which stage; default: the last.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="How many steps to read.")] = 200,
    step_seconds: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds of a training step: says how many times over the loader serves it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Read a run's samples in its order, as training would, and tell the speed.

    Nothing is kept in memory between samples, so that each is read and decoded.

    Example: x2i bench-loader configs/train/quickstart.yaml --steps 100
    """
    from x2i.trainer.speed import measure

    found = measure(run, stage, steps)
    if as_json:
        print_json([vars(f) for f in found])
        return
    columns = ["what", "samples/s", "MB/s read", "CPU ms a sample", "peak MB"]
    shown = table(f"Reading {found[0].samples:,} samples of {found[0].steps:,} steps", *columns)
    for f in found:
        shown.add_row(f.what, f"{f.rate:,.0f}", f"{f.megabytes:,.1f}", f"{f.cpu_ms:.2f}", f"{f.peak_mb:,.0f}")
    console.print(shown)
    if step_seconds:
        times = step_seconds / (found[0].seconds / found[0].steps)
        console.print(f"the loader serves a step of {step_seconds} s {times:,.1f} times over", highlight=False)
