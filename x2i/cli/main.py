"""`x2i`: registers the commands, and turns errors into messages and exit codes (2: bad recipe, 1: failed run)."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from x2i.base.errors import RecipeError, X2IError
from x2i.cli.build import build
from x2i.cli.console import console, set_up_logging

app = typer.Typer(
    name="x2i",
    help="Images and captions into X2I corpora; corpora into unified models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens, not only what goes wrong.")] = False,
) -> None:
    """Annotate once, select many, assemble exactly, train on the plan."""
    set_up_logging(verbose)


app.command()(build)


def main() -> None:
    """The entry point of the command `x2i`."""
    try:
        app()
    except RecipeError as error:
        _say(str(error))
        sys.exit(2)
    except X2IError as error:
        _say(str(error))
        sys.exit(1)
    except OSError as error:
        _say(f"{error}\nWhat is done is kept; mend the cause and run the same command again.")
        sys.exit(1)
    except KeyboardInterrupt:
        _say("stopped. What is done is kept: the same command goes on from here.")
        sys.stdout.flush()
        os._exit(130)  # Ray's threads would otherwise hold the process for seconds


def _say(text: str) -> None:
    console.print("[bold red]x2i:[/] ", end="")
    console.print(text, markup=False, highlight=False, soft_wrap=True)
