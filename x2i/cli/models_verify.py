"""`x2i models verify`: the models against what was published of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from x2i.cli.console import bars, console, print_json, table

if TYPE_CHECKING:
    from x2i.model.verify import Names, Outputs, Report

GREEN, RED, YELLOW = "[green]{}[/]", "[bold red]{}[/]", "[yellow]{}[/]"


def verify(
    models: Annotated[
        list[str] | None, typer.Argument(help="Presets; default: all that have a public counterpart.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every part and list of names, and what trains in which stage, too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all rows as JSON on stdout.")] = False,
) -> None:
    """Count the models' parameters, run them beside the public implementations, match the names of checkpoints.

    Needs no weights: counts and names are taken without memory, outputs from small networks of the same code with
    equal random weights, in float32. Exit code 1 if something is not equal. A public implementation whose package is
    not here is named, and is no failure.

    Example: x2i models verify
    """
    from x2i.model import verify as checks

    with bars(quiet=as_json) as progress:
        progress.start("verify", checks.steps(models or ()), "comparisons")
        report = checks.verify(models or (), progress.advance)
    if as_json:
        print_json(_as_rows(report))
    else:
        _show(report, everything)
    if not report.ok:
        raise typer.Exit(1)


def _as_rows(report: Report) -> dict[str, Any]:
    rows: dict[str, Any] = {"ok": report.ok}
    rows["models"] = summary(report)
    rows["parameters"] = [asdict(row) | {"ok": row.ok} for row in report.parameters]
    rows["outputs"] = [asdict(row) | {"tolerance": row.tolerance, "ok": row.ok} for row in report.outputs]
    for row in (*rows["models"], *rows["outputs"]):  # JSON has no infinity
        row["difference"] = None if row["difference"] == math.inf else row["difference"]
    rows["names"] = [asdict(row) | {"ok": row.ok} for row in report.names]
    rows["trained"] = [asdict(row) for row in report.trained]
    return rows


def summary(report: Report) -> list[dict[str, Any]]:
    """One row per model: parameters, how many parts are as published, the largest difference, how many names are."""
    from x2i.model.verify import largest, published

    rows = []
    for model in dict.fromkeys(row.model for row in report.parameters):
        architecture = published()[model]
        parts = [row for row in report.parameters if row.model == model]
        names = [row for row in report.names if row.model == model and row.missing is None]
        outputs = [row for row in report.outputs if row.architecture == architecture]
        worst = largest(outputs)
        rows.append(
            {
                "model": model,
                "parameters": parts[0].counted,
                "published": parts[0].published,
                "parts": [
                    sum(r.ok for r in parts if r.published is not None),
                    sum(r.published is not None for r in parts),
                ],
                "difference": worst.difference if worst else None,
                "largest": worst.largest if worst else None,
                "names": _together(names),
                "ok": all(r.ok for rows_ in (parts, names, outputs) for r in rows_),
            }
        )
    return rows


def _together(rows: Sequence[Names]) -> list[tuple[int, int]]:
    """Equal and published names: of parts together, of whole states each by itself."""
    parts = [row for row in rows if row.part != "all"]
    both = [(sum(row.matched for row in parts), sum(row.published for row in parts))] if parts else []
    return both + [(row.matched, row.published) for row in rows if row.part == "all"]


def _show(report: Report, everything: bool) -> None:
    shown = table("Models", "model", "parameters", "published", "parts equal", "largest difference", "names equal")
    for row in summary(report):
        published = "" if row["published"] is None else f"{row['published']:,}"
        difference = _of(row["difference"], row["largest"])
        parts, names = ([f"{a:,} of {b:,}" for a, b in pairs] for pairs in ([row["parts"]], row["names"]))
        name = (GREEN if row["ok"] else RED).format(row["model"])
        shown.add_row(name, f"{row['parameters']:,}", published, parts[0], difference, ", ".join(names))
    console.print(shown)
    shown = table("Outputs, float32", "model", "what", "public implementation", "how", "difference", "allowed")
    for out in report.outputs:
        shown.add_row(out.architecture, out.what, out.public, *_measured(out))
    console.print(shown)
    _show_parts(report, everything)
    if everything:
        _show_stages(report)
    for note in _notes(report):
        console.print(f"· {note}", markup=False, highlight=False, soft_wrap=True)


def _measured(out: Outputs) -> tuple[str, str, str]:
    if out.missing:
        return out.how, YELLOW.format(f"{out.missing} is not here"), ""
    colour = GREEN if out.ok else RED
    return out.how, colour.format(_of(out.difference, out.largest)), f"{out.tolerance:.1e}"


def _of(difference: float | None, largest: float | None) -> str:
    if difference is None or largest is None:
        return ""
    return f"{difference:.1e} of {largest:.3g}" if difference else f"0 of {largest:.3g}"


def _show_parts(report: Report, everything: bool) -> None:
    """All parts and lists of names, or those that are not equal."""
    counts = [row for row in report.parameters if everything or not row.ok]
    if counts:
        shown = table("Parameters", "model", "part", "counted", "published", "by")
        for row in counts:
            published = "" if row.published is None else f"{row.published:,}"
            colour = GREEN if row.ok else RED
            shown.add_row(row.model, row.part, colour.format(f"{row.counted:,}"), published, row.source)
        console.print(shown)
    names = [row for row in report.names if everything or not row.ok]
    if names:
        shown = table("Names and shapes", "model", "part", "ours", "published", "equal", "by")
        for name in names:
            equal = YELLOW.format("") if name.missing else (GREEN if name.ok else RED).format(f"{name.matched:,}")
            shown.add_row(name.model, name.part, f"{name.ours:,}", f"{name.published:,}", equal, name.source)
        console.print(shown)


def _show_stages(report: Report) -> None:
    if not report.trained:
        return
    shown = table("Stages", "model", "stage", "trains", "parameters")
    for row in report.trained:
        shown.add_row(row.model, row.stage, ", ".join(row.parts), f"{row.counted:,}")
    console.print(shown)


def _notes(report: Report) -> list[str]:
    rows: Sequence[Any] = (*report.outputs, *report.names)
    missing = [row.missing for row in rows if row.missing]
    notes = [f"{name} is not here: what was to be compared with it was not" for name in dict.fromkeys(missing)]
    aside = dict.fromkeys((row.public.split()[-1], row.note) for row in report.outputs if row.note)
    return notes + [f"{public}: {note}" for public, note in aside]
