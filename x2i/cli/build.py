"""`x2i build`: a recipe into a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from x2i.cli.console import Bars, bars, console, print_json, table

if TYPE_CHECKING:
    from x2i.pipelines.engine.build import Result
    from x2i.pipelines.recipe import Plan


def build(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    out: Annotated[str | None, typer.Option(help="Folder of the corpus, instead of the recipe's `out`.")] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Set a key of the recipe, e.g. sources.0.path=photos; repeatable."
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes; default: one per CPU.")] = None,
    address: Annotated[str | None, typer.Option(help="A Ray cluster: ray://host:10001, or `auto`.")] = None,
    retry: Annotated[
        bool,
        typer.Option("--retry", help="Annotate rows again that failed: out of memory, a server that did not answer."),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="As `x2i plan`: what is cached, what would run and cost; nothing is written."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Build a corpus: annotate what is missing, select, assemble, publish.

    A second run computes nothing that is there already; a killed run goes on where it stopped.

    Example: x2i build configs/corpora/quickstart.yaml --workers 4
    """
    from x2i.pipelines import recipe as recipes

    plan = recipes.load(recipe, change or (), out=out)
    if dry_run:
        from x2i.cli.plan import SAMPLE, show_plan

        show_plan(plan, SAMPLE, workers, as_json)
        return
    with bars(quiet=as_json) as progress:
        result = run(plan, workers, address, progress, retry)
    if as_json:
        from dataclasses import asdict

        print_json(asdict(result) | {"idle": result.idle})
    else:
        show(result)


def run(plan: Plan, workers: int | None, address: str | None, progress: Bars, retry: bool = False) -> Result:
    """Build, with progress bars."""
    from x2i.pipelines.engine.build import build as run_build

    return run_build(plan, workers, address, progress, retry)


def show(result: Result) -> None:
    """Print what a build did."""
    from x2i import corpus

    info = corpus.open(result.corpus).info
    funnel = table("What became of the rows", "stage", "reason", "rows")
    funnel.add_row("", "rows in", f"{result.rows_in:,}", style="bold")
    for step in info["funnel"]:
        funnel.add_row(step["stage"], step["reason"], f"-{step['rows']:,}")
    funnel.add_row("", "rows out", f"{result.rows_out:,}", style="bold")
    console.print(funnel)
    tasks = table("What was made of them", "task", "samples", "not made, because")
    for name, task in info["tasks"].items():
        tasks.add_row(name, f"{task['made']:,}", ", ".join(f"{r} ({n:,})" for r, n in task["skipped"].items()))
    console.print(tasks)
    done = table("The build", "what", "figure")
    if result.idle:
        done.add_row("computed", "nothing: all of it was there already")
    else:
        for name, count in result.computed.items():
            done.add_row(f"{name}, rows annotated", f"{count:,}")
        if not result.computed:
            done.add_row("annotated", "nothing: all of it was there already")
        done.add_row("images decoded to annotate", f"{result.decoded:,}, in passes over the images: {result.passes}")
        done.add_row("groups assembled", f"{result.groups_built:,}")
    done.add_row("seconds", ", ".join(f"{k} {v:.1f}" for k, v in result.seconds.items()))
    done.add_row("samples", f"{result.samples:,} in {result.shards:,} shards")
    done.add_row("digest", result.digest)
    done.add_row("corpus", result.corpus)
    console.print(done)
