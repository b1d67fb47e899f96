"""`x2i verify`: is a corpus whole?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from x2i.cli.console import bars, console, print_json, table

if TYPE_CHECKING:
    from x2i.corpus.verify import Report


def verify(
    corpus: Annotated[str, typer.Argument(help="The corpus: a folder or a URL.", show_default=False)],
    workers: Annotated[int | None, typer.Option(min=1, help="Threads, one shard each; default: one per CPU.")] = None,
    images: Annotated[bool, typer.Option(help="Decode every image to its last pixel.")] = True,
    webdataset: Annotated[
        bool, typer.Option("--webdataset", help="Read the shards with the webdataset library as well.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="Most faults to describe; the rest is counted.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Check every byte of a corpus: hashes, sizes, counts, offsets, images, rows in against rows out, the digest.

    Independent of the code that builds corpora. Exit code 0: whole; 1: something is wrong, and is said;
    2: there is no corpus.

    Example: x2i verify runs/quickstart/corpus
    """
    from x2i.corpus.verify import verify as check

    with bars(quiet=as_json) as progress:

        def on_shard(done: int, total: int) -> None:
            if done == 1:
                progress.start("verify", total, "shards")
            progress.advance()

        report = check(corpus, workers=workers, images=images, webdataset=webdataset, limit=limit, on_shard=on_shard)
    if as_json:
        from dataclasses import asdict

        print_json(asdict(report) | {"ok": report.ok})
    else:
        show(report)
    if not report.ok:
        raise typer.Exit(1)


def show(report: Report) -> None:
    """Print what was checked, and each fault with its place; remedies once each."""
    looked = table(f"Checked {report.corpus}", "what", "figure")
    looked.add_row("shards", f"{report.shards:,} ({report.bytes / 1e6:,.1f} MB)")
    looked.add_row("samples", f"{report.samples:,}")
    looked.add_row("images decoded", f"{report.images:,}")
    looked.add_row("rows", f"{report.rows_in:,} in, {report.rows_out:,} out")
    looked.add_row("seconds", f"{report.seconds:.1f}")
    looked.add_row("digest", report.digest or "cannot be computed")
    console.print(looked)
    if report.ok:
        console.print("[bold green]whole[/]: nothing is wrong")
        return
    count = len(report.faults) + report.more
    console.print(f"[bold red]{count:,} {'fault' if count == 1 else 'faults'}[/]")
    for fault in report.faults:
        console.print(f"- {fault}", markup=False, highlight=False, soft_wrap=True)
    if report.more:
        console.print(f"… and {report.more:,} more (--limit {count} shows them)")
    for remedy in dict.fromkeys(fault.remedy for fault in report.faults):
        console.print(f"What helps: {remedy}", markup=False, highlight=False, soft_wrap=True)
