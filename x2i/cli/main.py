"""`x2i`: registers the commands, and turns errors into messages and exit codes (2: bad recipe, 1: failed run)."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from x2i.base.errors import RecipeError, Stopped, X2IError
from x2i.cli.ask import ask
from x2i.cli.audit import audit
from x2i.cli.bench_loader import bench_loader
from x2i.cli.build import build
from x2i.cli.console import console, set_up_logging
from x2i.cli.convert import convert
from x2i.cli.demo import demo
from x2i.cli.diff import diff
from x2i.cli.export import export
from x2i.cli.forget import forget
from x2i.cli.ledger import ledger
from x2i.cli.models import app as models
from x2i.cli.plan import plan
from x2i.cli.replay import replay
from x2i.cli.sample import sample
from x2i.cli.trace import trace
from x2i.cli.train import train
from x2i.cli.verify import verify
from x2i.trainer.world import first_of_launch

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
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what happens, not only what goes wrong.")
    ] = False,
) -> None:
    """Annotate once, select many, assemble exactly, train on the plan."""
    set_up_logging(verbose)


for command in (
    plan,
    build,
    audit,
    verify,
    trace,
    diff,
    forget,
    export,
    train,
    ledger,
    replay,
    bench_loader,
    sample,
    ask,
    convert,
    demo,
):
    app.command()(command)
app.add_typer(models, name="models")


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
    raise Stopped(number)


def main() -> None:
    """The entry point of the command `x2i`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app()
    except RecipeError as error:
        if first_of_launch():  # the others would say the same
            _say(str(error))
        sys.exit(2)
    except X2IError as error:
        _say(str(error))
        sys.exit(1)
    except OSError as error:
        _say(f"{error}\nWhat is done is kept; mend the cause and run the same command again.")
        sys.exit(1)
    except Stopped as stopped:
        if first_of_launch():
            _say("stopped. What is done is kept: the same command goes on from here.")
        sys.exit(128 + stopped.args[0])
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # nothing is left that could be saved


def _say(text: str) -> None:
    rank = f" (rank {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    console.print(f"[bold red]x2i{rank}:[/] ", end="")
    console.print(text, markup=False, highlight=False, soft_wrap=True)
