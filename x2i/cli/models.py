"""`x2i models`: the weights that annotators need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from x2i.cli.configs import config
from x2i.cli.console import console, print_json, table

app = typer.Typer(help="Weights of the models that annotate.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Weights of the models that annotate."""


@app.command()
def fetch(
    recipes: Annotated[list[Path] | None, typer.Argument(help="Recipes; default: the quickstart's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Fetch the weights that recipes need, check their hashes, and keep them in the cache.

    Run it ahead of time where builds run without a network. X2I_CACHE names another cache folder.

    Example: x2i models fetch configs/corpora/quickstart.yaml
    """
    from x2i.base.weights import digest_of
    from x2i.pipelines.recipe import load

    rows: list[dict[str, Any]] = []
    for path in recipes or [config("corpora/quickstart.yaml")]:
        for annotator in load(path).annotators:
            for weights in annotator.weights():
                where = weights.fetch()
                size = sum(f.stat().st_size for f in ([where] if where.is_file() else where.rglob("*")) if f.is_file())
                rows.append(
                    {
                        "annotator": annotator.name,
                        "weights": weights.spec,
                        "sha256": digest_of(where),
                        "bytes": size,
                        "path": str(where),
                    }
                )
    if as_json:
        print_json(rows)
        return
    shown = table("Weights", "annotator", "weights", "MB", "SHA-256", "path")
    for row in rows:
        shown.add_row(row["annotator"], row["weights"], f"{row['bytes'] / 1e6:.1f}", row["sha256"][:16], row["path"])
    console.print(shown)
