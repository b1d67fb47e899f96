"""`x2i export`: a corpus in the layouts that others read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from x2i.cli.console import console, print_json, table


def export(
    corpus: Annotated[str, typer.Argument(help="The corpus: a folder or a URL.", show_default=False)],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="llava, sharegpt4v, ms-swift (understanding); omnigen (generation); multigen (maps and damages).",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write: a new one.", show_default=False)],
    task: Annotated[
        list[str] | None, typer.Option(help="Only this task type; may be given several times.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON on stdout.")] = False,
) -> None:
    """Write a corpus as records and pictures that other trainers read. The folder appears whole, or not at all.

    Example: x2i export runs/quickstart/corpus --format omnigen --out runs/x2i

    Dialogues for LLaVA: x2i export runs/offline/corpus --format llava --out runs/llava

    Captions and counting alone, for ms-swift:
    x2i export runs/offline/corpus --format ms-swift --task describe --task count --out runs/swift

    Control maps as MultiGen-20M: x2i export runs/quickstart/corpus --format multigen --out runs/multigen
    """
    from x2i.corpus.export import export as write

    told = write(corpus, format_, out, task or ())
    if as_json:
        counts = {"records": dict(sorted(told.records.items())), "left_out": dict(sorted(told.left_out.items()))}
        print_json(
            {"format": told.format, "out": str(told.out), **counts, "pictures": told.pictures, "bytes": told.bytes}
        )
        return
    shown = table(f"{told.out}: {told.format}", "task", "records")
    for name, count in sorted(told.records.items()):
        shown.add_row(Text(name), f"{count:,}")
    console.print(shown)
    console.print(f"{told.pictures:,} pictures, {told.bytes / 1e6:,.1f} MB")
    for what, count in sorted(told.left_out.items()):
        console.print(f"left out: {what} ({count:,})", markup=False)
