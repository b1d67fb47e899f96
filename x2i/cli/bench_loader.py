"""`x2i bench-loader`: how fast a run's samples can be read, with and without decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from x2i.cli.console import console, print_json, table

_SHOWN = {"full": "decoded in full", "reduced": "decoded, reduced", "none": "bytes, checked"}


def bench_loader(
    run: Annotated[Path, typer.Argument(help="The run, a YAML file.", show_default=False)],
    stage: Annotated[str | None, typer.Option(help="Which stage; default: the last.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="How many steps to read.")] = 200,
    step_seconds: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Seconds of a training step: says how many times over the loader serves it. Default: as the run's logs "
            "have it, if it has trained.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Read a run's samples in its order, as training would, and tell the speed.

    Nothing is kept in memory between samples, so that each is read and decoded. This process reads whole steps; of several
    ranks each has its share.

    Example: x2i bench-loader configs/train/quickstart.yaml --steps 100
    """
    from x2i.trainer.speed import guessed, measure, trained

    found = measure(run, stage, steps)
    told = "given" if step_seconds else "by the run's logs"
    step_seconds = step_seconds or trained(run, stage)
    batch = found[0].samples / found[0].steps
    if as_json:
        rows = [vars(f) | {"headspace": f.rate * step_seconds / batch if step_seconds else None} for f in found]
        print_json({"step_seconds": step_seconds, "rows": rows})
        return
    columns = ["what", "samples/s", "CPU ms a sample", "MB/s read", "reads a sample", "peak PSS, MB"]
    shown = table(f"Reading {found[0].samples:,} samples of {found[0].steps:,} steps", *columns)
    if step_seconds:
        shown.add_column("times a step", justify="right")
    for f in found:
        cells = [f"{f.rate:,.0f}", f"{f.cpu_ms:.2f}", f"{f.megabytes:,.1f}", f"{f.reads:.2f}", f"{f.peak_mb:,.0f}"]
        times = [f"{f.rate * step_seconds / batch:,.1f}"] if step_seconds else []
        shown.add_row(_SHOWN[f.what], *cells, *times)
    console.print(shown)
    if step_seconds:
        told = f"a step takes {step_seconds:.3g} s ({told}) and {batch:g} samples"
    else:
        told = "the run has not trained: --step-seconds says how long a step takes"
    console.print(told, highlight=False)
    if guessed(run, stage):
        console.print(
            "the run has no checkpoint yet: how many samples a pack holds is guessed, a picture at a token for 16 x 16 pixels",
            highlight=False,
        )
