"""`x2i diff`: what sets two corpora apart, and by which rule."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.text import Text

from x2i.cli.console import console, print_json, table


def diff(
    a: Annotated[
        str, typer.Argument(metavar="CORPUS_A", help="The old corpus: a folder or a URL.", show_default=False)
    ],
    b: Annotated[str, typer.Argument(metavar="CORPUS_B", help="The new corpus.", show_default=False)],
    limit: Annotated[int, typer.Option(min=0, help="Most examples in each list; the counts are of all.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print the difference as JSON on stdout.")] = False,
) -> None:
    """Compare two corpora: rows and samples that came, went and changed, and the rule or the change that did it.

    Example: x2i diff runs/monday/corpus runs/tuesday/corpus

    Only the reasons: x2i diff old/corpus new/corpus --json --limit 0 | jq .rows.went_by
    """
    from x2i.corpus.diff import diff as compare

    told = compare(a, b, limit)
    if as_json:
        print_json(told)
    else:
        show(told)


def show(told: dict[str, Any]) -> None:
    """Print a difference: counts, what was changed on purpose, then rows and samples with their reasons."""
    console.print(Text(f"A {told['a']['corpus']} ({told['a']['digest'][:12]})", style="bold"))
    console.print(Text(f"B {told['b']['corpus']} ({told['b']['digest'][:12]})", style="bold"))
    if told["same"]:
        console.print("[bold green]the same samples[/]: shards and manifests are equal")
    _figures(told)
    _changes(told)
    rows, samples = told["rows"], told["samples"]
    _reasons("Rows that went: kept in A, not in B", "what B says", "rows", rows["went_by"])
    _examples("Some of them", rows["went_examples"], rows["went"])
    _reasons("Rows that came: kept in B, not in A", "what A says", "rows", rows["came_by"])
    _examples("Some of them", rows["came_examples"], rows["came"])
    if rows["changed"]:
        out = table(f"Rows whose image or text changed: {rows['changed']:,}", "source", "location", "what")
        for row in rows["changed_examples"]:
            what = ", ".join(w for w in ("image", "text") if row[f"other_{w}"])
            out.add_row(Text(row["source"]), Text(row["location"]), what)
        console.print(out)
    if rows["fell_otherwise"]:
        out = table("Rows that are in neither, for another reason", "in A", "in B", "rows")
        for step in rows["fell_otherwise"]:
            names = (f"{step[f'stage_{side}']}: {step[f'reason_{side}']}" for side in "ab")
            out.add_row(*map(Text, names), f"{step['rows']:,}")
        console.print(out)
    tasks = table("Samples", "task", "A", "B", "went", "came", "changed")
    for task in [*samples["tasks"], {"task": "all of them", "a": None, "b": None, **samples}]:
        figures = (task[n] for n in ("a", "b", "went", "came", "changed"))
        tasks.add_row(Text(task["task"]), *("" if f is None else f"{f:,}" for f in figures))
    console.print(tasks)
    _reasons("Samples that went", "because", "samples", samples["went_by"])
    _reasons("Samples that came", "because (in A)", "samples", samples["came_by"])
    _reasons("Samples that changed", "how", "samples", samples["changed_by"])


def _figures(told: dict[str, Any]) -> None:
    out = table("Counts", "what", "A", "B", "B - A")
    steps = [(c["what"], c["a"] or 0, c["b"] or 0) for c in told["counts"]]
    steps += [(f"fell: {f['stage']}: {f['reason']}", f["a"], f["b"]) for f in told["funnel"]]
    for what, before, after in steps:
        change = f"{after - before:+,}" if after != before else ""
        out.add_row(Text(what), f"{before:,}", f"{after:,}", change)
    console.print(out)


def _changes(told: dict[str, Any]) -> None:
    """The recipe key by key, and what else may be the cause."""
    out = table("What was changed", "where", "A", "B")
    for leaf in told["recipe"]:
        out.add_row(Text(f"recipe: {leaf['key']}"), _value(leaf["a"]), _value(leaf["b"]))
    for source in told["sources"]:
        states = {"went": ("there", "-"), "came": ("-", "there"), "changed": ("", "other files or options")}
        out.add_row(Text(f"source: {source['name']}"), *states[source["what"]])
    for annotator in told["annotators"]:
        name = f"annotator: {annotator['name']}"
        if not annotator["changes"]:
            out.add_row(Text(name), *(("there", "-") if annotator["what"] == "went" else ("-", "there")))
        for leaf in annotator["changes"]:
            out.add_row(Text(f"{name}: {leaf['key']}"), _value(leaf["a"]), _value(leaf["b"]))
    for leaf in told["software"]:
        out.add_row(Text(f"software: {leaf['key']}"), _value(leaf["a"]), _value(leaf["b"]))
    if out.row_count:
        console.print(out)
    else:
        console.print("recipe, sources, annotators and software are the same")


def _value(value: Any) -> Text:
    if value is None:
        return Text("-", style="dim")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return Text(text[:16] if len(text) == 64 and text.isalnum() else text[:200])


def _reasons(title: str, heading: str, what: str, steps: list[dict[str, Any]]) -> None:
    if not steps:
        return
    title = f"{title}: {sum(s[what] for s in steps):,}"
    out = table(title, heading, what)
    out.min_width = len(title) + 1
    for step in steps:
        out.add_row(Text(": ".join(p for p in (step["stage"], step["reason"]) if p)), f"{step[what]:,}")
    console.print(out)


def _examples(title: str, rows: list[dict[str, Any]], total: int) -> None:
    if not rows:
        return
    out = table(f"{title} ({len(rows):,} of {total:,})", "row", "location", "reason", "what decided (in A, in B)")
    for row in rows:
        decided = [row["condition"]] if row.get("condition") else [row["detail"] or ""]
        decided += [f"{name} = {_short(v['a'])}, {_short(v['b'])}" for name, v in row["values"].items()]
        if other := row.get("survivor"):
            decided.append(f"stayed instead: {other.get('location', other.get('row_id'))}")
        reason = f"{row['stage']}: {row['reason']}"
        out.add_row(
            row["row_id"][:12], Text(f"{row['source']}: {row['location']}"), Text(reason), Text("\n".join(decided))
        )
    console.print(out)


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
