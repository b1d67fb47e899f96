"""`x2i plan`: what a build would do, and what it would cost."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from x2i.cli.console import console, print_json, table

if TYPE_CHECKING:
    from x2i.pipelines.engine.estimate import Estimate, Interval, Step
    from x2i.pipelines.recipe import Plan

SAMPLE = 16


def plan(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Set a key of the recipe, e.g. sources.0.path=photos; repeatable."
        ),
    ] = None,
    sample: Annotated[
        int, typer.Option(min=0, help="Rows to take all the way, for the estimate; 0: only say what is cached.")
    ] = SAMPLE,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes; default: one per CPU.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Show what is cached, what would run, which weights are missing; estimate yield, time and bytes.

    A few rows are taken through the recipe, on this machine and in a temporary folder: nothing is written to the
    lake or the corpus. Intervals are of 95 %.

    Example: x2i plan configs/corpora/quickstart.yaml --sample 32
    """
    from x2i.pipelines import recipe as recipes

    show_plan(recipes.load(recipe, change or ()), sample, workers, as_json)


def show_plan(plan: Plan, sample: int, workers: int | None, as_json: bool) -> None:
    """Estimate, and print it."""
    import os

    from x2i.base.errors import RecipeError
    from x2i.pipelines.engine.build import plan_units
    from x2i.pipelines.engine.estimate import estimate
    from x2i.pipelines.engine.progress import Quiet

    try:
        units, trouble = plan_units(plan, None, Quiet()), None
    except RecipeError as error:  # weights and costs can be told all the same
        units, trouble = [], error
    with console.status("looking at the lake" + (f", and taking {sample} rows all the way" if sample else "")):
        found = estimate(plan, units, sample)
    workers = workers or os.cpu_count() or 1
    if as_json:
        print_json(_json(found, workers))
    else:
        _show(plan, found, workers)
    if trouble is not None:
        raise trouble


def _json(found: Estimate, workers: int) -> dict[str, Any]:
    out = asdict(found)
    out["annotators"] = {s["name"]: s for s in out.pop("steps")}
    wall = found.seconds.times(1 / workers) if found.seconds else None
    totals = {"worker_seconds": found.seconds, "wall_seconds": wall, "gpu_seconds": found.gpu_seconds}
    return out | {k: asdict(v) if v else None for k, v in totals.items()}


def _show(plan: Plan, found: Estimate, workers: int) -> None:
    conditions = list(dict.fromkeys(s.where for s in found.steps if s.where))
    steps = table(
        f"What `x2i build {plan.where}` would do", "annotator", "sees", "cached", "to run", "ms a row", "in the lake"
    )
    for step in found.steps:
        sees = f"rows of \\[{conditions.index(step.where) + 1}]" if step.where else "all rows"
        if step.unavailable:
            steps.add_row(step.name, sees, "", "[red]cannot run[/]", "", "")
        else:
            cost = _spread(step.seconds_per_row, 1000) if step.seconds_per_row else ""
            steps.add_row(step.name, sees, f"{step.cached or 0:,}", _count(step.to_run), cost, _lake(step))
    console.print(steps)
    for number, condition in enumerate(conditions, 1):
        console.print(f"[{number}] {' '.join(condition.split())}", markup=False, highlight=False, soft_wrap=True)
    _unavailable(found)
    if not found.units:
        return
    rows = "an unknown number of" if found.rows is None else f"{found.rows:,}"
    console.print(f"· {rows} rows in {found.units:,} units, {found.units_to_read:,} of them not read yet")
    if found.sample:
        _costs(found, workers)
    elif all(s.to_run is not None and not s.to_run.value for s in found.steps if not s.unavailable):
        console.print("· nothing to annotate")


def _unavailable(found: Estimate) -> None:
    gone = [s for s in found.steps if s.unavailable]
    if not gone:
        return
    shown = table("What cannot run here", "annotator", "because")
    for step in gone:
        shown.add_row(step.name, step.unavailable)
    console.print(shown)
    for remedy in dict.fromkeys(s.remedy for s in gone if s.remedy):
        console.print(f"· {remedy}", markup=False, highlight=False, soft_wrap=True)
    rest = ", ".join(s.name for s in found.steps if not s.unavailable)
    console.print(f"· without them these would run: {rest}", markup=False, highlight=False)


def _costs(found: Estimate, workers: int) -> None:
    shown = table(f"Estimated from {found.sample} rows (95 % intervals)", "what", "estimate")
    if found.kept:
        left = f"; without {', '.join(found.not_judged)}" if found.not_judged else ""
        shown.add_row("rows that stay, before duplicates", f"{_range(found.kept, 100)} %{left}")
    if found.samples_per_row is not None:
        shown.add_row("samples of a row that stays", f"{found.samples_per_row:.2f}")
    if found.corpus_bytes:
        shown.add_row("the corpus, before duplicates", f"{_range(found.corpus_bytes, 1e-9)} GB")
    if found.seconds:
        shown.add_row("worker time", _time(found.seconds))
        shown.add_row(
            f"wall time with {workers} workers", f"{_time(found.seconds.times(1 / workers))}, and Ray's start"
        )
    if found.gpu_seconds:
        shown.add_row("GPU-hours, at the speed of this machine", _range(found.gpu_seconds, 1 / 3600))
    elif any(s.gpus and s.seconds_per_row for s in found.steps):
        shown.add_row("GPU-hours", "cannot be told from a machine without a GPU")
    shown.add_row("images decoded, a row", f"{found.decodes / found.sample:.2f}")
    console.print(shown)


def _count(interval: Interval | None) -> str:
    if interval is None:
        return "?"
    if interval.low == interval.high:
        return f"{interval.value:,.0f}"
    return f"~{interval.value:,.0f} ({interval.low:,.0f} to {interval.high:,.0f})"


def _range(interval: Interval, factor: float) -> str:
    value, low, high = (v * factor for v in (interval.value, interval.low, interval.high))
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def _spread(interval: Interval, factor: float) -> str:
    value, half = interval.value * factor, (interval.high - interval.low) / 2 * factor
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} ± {half:,.{digits}f}"


def _time(interval: Interval) -> str:
    unit, factor = ("h", 1 / 3600) if interval.value >= 5400 else ("min", 1 / 60) if interval.value >= 90 else ("s", 1)
    return f"{_range(interval, factor)} {unit}"


def _lake(step: Step) -> str:
    if step.bytes_per_row is None:
        return ""
    if step.to_run is None:
        return f"{step.bytes_per_row:,.0f} B a row"
    return f"{step.bytes_per_row * step.to_run.value / 1e6:,.1f} MB"
