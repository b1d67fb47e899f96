"""`x2i replay`: one step of a training run again, as rows and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from x2i.cli.console import console, print_json, table


def replay(
    run: Annotated[Path, typer.Argument(help="A run's output folder.", show_default=False)],
    step: Annotated[int, typer.Option(min=1, help="Which step, from 1 over all stages.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("step.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Show what a training step saw: samples, timesteps, noise, dropped conditions.

    The step is computed anew from the run's record and its corpora; no step before it is run.

    Example: x2i replay runs/quickstart/train --step 1200 --out step.png
    """
    from x2i.base.files import atomic
    from x2i.trainer import preview
    from x2i.trainer import replay as replaying

    setup = replaying.open_run(run, step)
    batches, rows = replaying.replay(setup, step)
    with atomic(out) as temporary:
        preview.grid(replaying.picture_rows(setup, batches)).save(temporary, "PNG")
    if as_json:
        print_json({"step": step, "out": str(out), "samples": replaying.as_dicts(rows)})
        return
    shown = table(f"Step {step}", "draw", "task", "key", "t", "")
    for row in rows:
        notes = ["condition dropped"] * row.dropped + [f"in place of {row.replaced}"] * (row.replaced is not None)
        shown.add_row(f"{row.draw:,}", row.task, row.key, "" if row.t is None else f"{row.t:.4f}", "; ".join(notes))
    console.print(shown)
    console.print(f"{out}: what the model was shown", markup=False, highlight=False)
