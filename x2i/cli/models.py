"""`x2i models`: the weights that annotators need: which, where they are, whether they load; and models verified."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from x2i.cli.configs import config
from x2i.cli.console import bars, console, print_json, table
from x2i.cli.models_verify import verify

app = typer.Typer(help="Weights of the models that annotate; the models that are trained.", no_args_is_help=True)

Recipes = Annotated[
    list[Path] | None, typer.Argument(help="Recipes; default: every annotator, as it is without parameters.")
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


@app.callback()
def _group() -> None:
    """Weights of the models that annotate; the models that are trained, against what was published."""


@app.command("list")
def list_(recipes: Recipes = None, as_json: AsJSON = False) -> None:
    """List annotators and their weights: how large, under which licence, where they lie. Fetches nothing.

    Example: x2i models list configs/corpora/quickstart.yaml
    """
    from x2i.cli.model_rows import megabytes, place, places, rows, short, wanted

    found = rows(wanted(recipes))
    if as_json:
        print_json(found)
        return
    shown = table("Weights", "annotator", "weights", "MB", "licence", "where")
    for row in found:
        if row["weights"]:
            size, licence = megabytes(row["bytes"]), row["licence"] or "?"
            shown.add_row(row["annotator"], short(row["weights"]), size, licence, place(row["path"]))
        else:
            lacks = [f"{key}: {row[key]}" for key in ("needs", "broken") if row[key]]
            shown.add_row(row["annotator"], *(lacks or ["none"]), "", "", "")
    console.print(shown)
    used = {place(r["path"]) for r in found}
    for word, folder in places().items():
        if word in used:
            _note(f"{word}: {folder}")
    absent = {r["weights"]: r["bytes"] for r in found if r["weights"] and not r["path"]}
    if absent:
        _note(
            f"{len(absent)} not here ({sum(filter(None, absent.values())) / 1e6:,.0f} MB, where the size is known): "
            "`x2i models fetch RECIPE` fetches what a recipe needs"
        )


def _note(text: str) -> None:
    console.print(f"· {text}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def check(
    recipes: Recipes = None,
    fetch: Annotated[bool, typer.Option(help="Fetch what is not here, or check only what is.")] = True,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one annotator may take.")] = 600,
    as_json: AsJSON = False,
) -> None:
    """Load each annotator once and run it on a photograph; fetch what it needs if that can be had.

    Exit code 1 if weights that are here do not load, do not run, or have another hash. What is not here is
    told with what helps, and is no failure.

    Example: x2i models check configs/corpora/quickstart.yaml
    """
    from x2i.cli.model_check import check as check_one
    from x2i.cli.model_rows import wanted

    annotators = wanted(recipes)
    results = []
    with bars(quiet=as_json) as progress:
        progress.start("check", len(annotators), "annotators")
        for one in annotators:
            results.append(check_one(one, timeout, fetch))
            progress.advance()
    if as_json:
        print_json(results)
    else:
        _show_checks(results)
    if any(r["status"] == "failed" for r in results):
        raise typer.Exit(1)


def _show_checks(results: list[dict[str, Any]]) -> None:
    shown = table("Checked", "annotator", "status", "set up, s", "call, s", "peak MB")
    colour = {"works": "green", "loads": "green", "missing": "yellow", "failed": "bold red"}
    for r in results:
        seconds = r["seconds"] or {}
        figures = [seconds.get("setup"), seconds.get("call"), r["peak_mb"]]
        status = f"[{colour[r['status']]}]{r['status']}[/]"
        shown.add_row(r["annotator"], status, *("" if f is None else f"{f:,}" for f in figures))
    console.print(shown)
    for status in ("missing", "failed"):
        for r in (r for r in results if r["status"] == status):
            _note(f"{r['annotator']}, {status}: {r['reason']}")
    for remedy in dict.fromkeys(r["remedy"] for r in results if r["remedy"]):
        _note(f"What helps: {remedy}")


@app.command("fetch")
def fetch_(
    recipes: Annotated[list[Path] | None, typer.Argument(help="Recipes; default: the quickstart's.")] = None,
    as_json: AsJSON = False,
) -> None:
    """Fetch the weights that recipes need, check their hashes, and keep them in the cache.

    Run it ahead of time where builds run without a network. X2I_CACHE names another cache folder, HF_HOME
    another one for what comes from the model hub.

    Example: x2i models fetch configs/corpora/quickstart.yaml
    """
    from x2i.base.errors import X2IError
    from x2i.cli.model_rows import apart, described, megabytes, place, short, wanted

    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    remedies: list[str] = []
    for one in wanted(recipes or [config("corpora/quickstart.yaml")]):
        for weights in one.weights:
            try:
                weights.fetch()
                rows.append({"annotator": one.name, "sha256": weights.digest()} | described(weights))
            except X2IError as error:
                reason, remedy = apart(error, weights)
                failures.append(f"- {one.name}: {reason}")
                remedies += [f"What helps: {remedy}"] if remedy else []
    if as_json:
        print_json(rows)
    else:
        shown = table("Weights", "annotator", "weights", "MB", "SHA-256", "where")
        for r in rows:
            where = place(r["path"])
            shown.add_row(r["annotator"], short(r["weights"]), megabytes(r["bytes"]), r["sha256"][:16], where)
        console.print(shown)
    if failures:
        first = f"{len(failures)} of {len(rows) + len(failures)} weights cannot be had, or are not what they should be:"
        raise X2IError("\n".join([first, *failures, *dict.fromkeys(remedies)]))


app.command()(verify)
