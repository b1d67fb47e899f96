"""`python benchmarks/annotate.py FOLDER`: what annotators cost together, against one pass for each.

Two things are measured on the same photographs, through `x2i build` as a user runs it:

- together: one build with all the annotators, which decodes each image once;
- apart: a build per annotator into the same lake, each of which decodes every image again.

Ray's start is left out of both (it does not grow with the work). Then, with --recipe, a whole recipe is run once:
images per second, CPU time and the share of the cores that it kept busy, peak memory, the funnel.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import meter
import typer
import yaml
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
BENCH = HERE.parent / "runs" / "bench_annotate"
BYTECODE = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(BENCH / "bytecode")}

#: Annotators whose weights need no hub; cheap ones show what decoding costs, dear ones what it does not.
CHEAP = ("phash", "quality", "nsfw")
ALL = (*CHEAP, "nudenet", "classes", "faces")

console = Console(width=None if Console().is_terminal else 110)


def recipe(folder: Path, name: str, annotators: tuple[str, ...], lake: str) -> Path:
    """A recipe that annotates and assembles next to nothing."""
    content = {
        "name": name,
        "lake": str(BENCH / "lakes" / lake),
        "out": str(BENCH / name),
        "sources": [{"kind": "folder", "name": "photos", "path": str(folder), "unit_files": 64}],
        "annotators": dict.fromkeys(annotators),
        "select": {"require_text": False, "where": {"none": "image.width < 0"}},
        "tasks": {"text_to_image": None},
    }
    path = BENCH / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def build(path: Path, *options: str) -> tuple[dict[str, Any], meter.Cost]:
    """Run `x2i build --json`; its result and its cost."""
    command = [sys.executable, "-m", "x2i", "build", str(path), "--json", *options]
    cost, printed = meter.run(command, BENCH / f"{path.stem}.log", BYTECODE)
    if cost.code:
        raise SystemExit(f"{path}: exit code {cost.code}; see {BENCH / path.stem}.log")
    return json.loads(printed), cost


def annotating(result: dict[str, Any]) -> float:
    """Seconds of annotation, without Ray's start."""
    return float(result["seconds"]["annotate"] - result["seconds"].get("start_ray", 0))


def compare(folder: Path, names: tuple[str, ...], workers: int, label: str, table: Table) -> None:
    """Together against apart; a line of the table."""
    for lake in ("together", "apart"):
        shutil.rmtree(BENCH / "lakes" / lake, ignore_errors=True)
    at_once, cost = build(recipe(folder, "at_once", names, "together"), "--workers", str(workers))
    seconds, cpu, decoded = 0.0, 0.0, 0
    for name in names:
        alone, its = build(recipe(folder, f"only_{name}", (name,), "apart"), "--workers", str(workers))
        seconds, cpu, decoded = seconds + annotating(alone), cpu + its.cpu, decoded + alone["decoded"]
    images = at_once["rows_in"]
    table.add_row(
        label,
        f"{at_once['decoded'] / images:.2f}",
        f"{decoded / images:.2f}",
        f"{images / annotating(at_once):.0f}",
        f"{images / seconds:.0f}",
        f"{seconds / annotating(at_once):.2f}",
        f"{cpu / cost.cpu:.2f}",
    )


def whole(path: Path, folder: Path, workers: int) -> None:
    """Run a recipe once over the folder, and say what it cost."""
    for part in ("recipe_lake", "recipe_out"):
        shutil.rmtree(BENCH / part, ignore_errors=True)
    places = ["--set", f"sources.0.path={folder}", "--set", f"lake={BENCH / 'recipe_lake'}"]
    result, cost = build(path, *places, "--out", str(BENCH / "recipe_out"), "--workers", str(workers))
    images, seconds = result["rows_in"], annotating(result)
    shown = Table(title=f"{path.name} over {images:,} images, {workers} workers", title_justify="left")
    shown.add_column("what")
    shown.add_column("figure", justify="right")
    shown.add_row("images per second, annotation", f"{images / seconds:.2f}")
    shown.add_row("images per second, whole command", f"{images / cost.wall:.2f}")
    shown.add_row("CPU ms per image, whole process tree", f"{1000 * cost.cpu / images:.0f}")
    shown.add_row(f"share of {os.cpu_count()} cores kept busy", f"{cost.cpu / cost.wall / (os.cpu_count() or 1):.0%}")
    shown.add_row("peak PSS of the process tree, MB", f"{cost.pss / 1e6:,.0f}")
    shown.add_row("images decoded, per image", f"{result['decoded'] / images:.2f}")
    for name, rows in result["computed"].items():
        shown.add_row(f"rows that {name} saw", f"{rows:,}")
    info = json.loads((BENCH / "recipe_out" / "corpus.json").read_text())
    shown.add_row("rows in", f"{images:,}")
    for step in info["funnel"]:
        shown.add_row(f"  fell: {step['stage']}, {step['reason']}", f"-{step['rows']:,}")
    shown.add_row("rows out", f"{result['rows_out']:,}")
    console.print(shown)


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of photographs.")],
    recipe_path: Annotated[Path | None, typer.Option("--recipe", help="A recipe to run whole, too.")] = None,
    workers: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
    fused: Annotated[bool, typer.Option(help="Compare one pass with a pass each.")] = True,
) -> None:
    """Measure; figures for the log."""
    BENCH.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    build(recipe(folder, "warm", ("phash",), "warm"))  # bytecode, page cache
    if fused:
        columns = ("annotators", "decodes, together", "apart", "img/s, together", "apart", "ratio", "CPU ratio")
        table = Table(*columns, title="One pass against a pass each", title_justify="left")
        compare(folder, CHEAP, workers, ", ".join(CHEAP), table)
        compare(folder, ALL, workers, ", ".join(ALL), table)
        console.print(table)
    if recipe_path:
        whole(recipe_path, folder, workers)


if __name__ == "__main__":
    typer.run(main)
