"""`x2i audit`: one HTML report of a corpus."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from x2i.cli.console import console, print_json, table

if TYPE_CHECKING:
    from x2i.corpus.audit import Written


def audit(
    corpus: Annotated[str, typer.Argument(help="A corpus: its folder, or an fsspec URL.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file; default: CORPUS-report.html beside the corpus.")
    ] = None,
    per_task: Annotated[int, typer.Option(min=1, max=48, help="Samples shown of each task.")] = 6,
    nearest: Annotated[int, typer.Option(min=1, max=48, help="Rows shown on either side of each threshold.")] = 6,
    pictures: Annotated[
        bool,
        typer.Option("--pictures/--no-pictures", help="Read rows that fell from their sources again, to show them."),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Write a report to look at: funnel, galleries, thresholds, scores, what annotators saw, duplicates, quarantine.

    One HTML file that loads nothing from elsewhere: it can be mailed, archived, opened on a phone.

    Example: x2i audit runs/quickstart/corpus
    """
    from x2i.corpus.audit import Limits

    written = write(corpus, out, Limits(per_task=per_task, nearest=nearest), pictures, quiet=as_json)
    if as_json:
        print_json(asdict(written))
    else:
        show(written)


def write(
    corpus: str | Path, out: Path | None, limits: Any = None, pictures: bool = True, quiet: bool = False
) -> Written:
    """Write the report, with a line that says what is being done."""
    from x2i.corpus import open as open_corpus
    from x2i.corpus.audit import Limits
    from x2i.corpus.audit import audit as write_report

    limits = limits or Limits()
    info = open_corpus(corpus).info

    def from_sources(rows: list[dict[str, Any]]) -> dict[str, bytes]:
        from x2i.pipelines.thumbnails import thumbnails

        return thumbnails(info, rows, limits.side)

    with console.status("audit") as status:
        if quiet:
            status.stop()
        return write_report(
            corpus, out, from_sources if pictures else None, limits, lambda text: status.update(f"audit: {text}")
        )


def show(written: Written) -> None:
    """Print where the report lies."""
    done = table("The report", "what", "figure")
    done.add_row("report", written.report)
    done.add_row("size", f"{written.bytes / 1e6:.1f} MB, {written.pictures:,} pictures")
    if written.unreachable:
        done.add_row("not shown", f"{written.unreachable:,} pictures whose sources could not be read again")
    done.add_row(
        "the figures", "add up" if written.sound else "DO NOT ADD UP: see the top of the report, and run `x2i verify`"
    )
    console.print(done)
