"""`make bench`: the same ingestion by x2i and by its peers, side by side.

The work: read photographs and captions, decode, shrink the shorter side to 512 (area averaging), encode as
JPEG at 95 with 4:2:0, SHA-256 of the source, tar shards of 1,000 samples with JSON, a manifest in Parquet.

- x2i: `x2i build` of a recipe, as a user runs it, into a fresh lake and a fresh corpus.
- pool: a multiprocessing pool with webdataset's TarWriter, the least machinery that does it.
- ray_data: Ray Data, in the best shape that was found (peers/ray_data.py).
- img2dataset: over file:// URLs.

The peers have an environment of their own (peers.txt): img2dataset needs older packages, and webdataset
imports torch where there is one, which the pool and Ray Data should not have to pay for.

All on the same files from a warm page cache, one after the other, in an order that turns with each round;
medians count. CPU and memory are those of the whole process tree. Every output is checked.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import check
import environment
import meter
import photographs
import typer
import yaml
from rich.console import Console
from rich.table import Table

from x2i.base.errors import X2IError
from x2i.base.files import remove, write_text

HERE = Path(__file__).resolve().parent
BENCH = HERE.parent / "runs" / "bench"
PEERS = ("x2i", "pool", "ray_data", "img2dataset")

#: What the README promises: x2i's CPU per image at most so many times the pool's, its images per second at
#: least so many times the peer's (Ray's start left out, as it does not grow with the work), its memory in MB.
CPU_AIM, SPEED_AIMS, MEMORY_AIM = 1.25, {"ray_data": 1.25, "img2dataset": 1.5}, 700

#: Python compiles each module once, as it does on a machine of anybody's, even where a setting forbids that.
BYTECODE = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(BENCH / "bytecode")}

#: Photographs of the run before the first round that warms bytecode and libraries, and is not counted.
WARM = 100

console = Console()
if not console.is_terminal:  # a log: the table needs more than the 80 columns that are assumed
    console = Console(width=120)


@dataclass(frozen=True)
class Peer:
    """How a peer is run, and where it leaves its samples and its manifest."""

    name: str
    command: list[str]
    out: Path
    manifests: str


@dataclass(frozen=True)
class Round:
    """One run of one peer. Seconds; bytes; `difference` of the pixels from the reference, of 255."""

    wall: float
    start_ray: float
    cpu: float
    pss: int
    processes: list[meter.Process]
    difference: float
    seconds: dict[str, float]


def main(
    images: Annotated[int, typer.Option(min=100, help="Photographs to make and read.")] = 6000,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each peer.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes of each peer.")] = 2,
    source: Annotated[Path | None, typer.Option(help="A folder of one's own JPEGs, at most --images of them.")] = None,
    only: Annotated[str, typer.Option(help="Peers to run, by name, with commas.")] = ",".join(PEERS),
) -> None:
    """Measure ingestion by x2i and by its peers.

    Example: python benchmarks/ingest.py --images 2000 --rounds 1 --only x2i,pool
    """
    chosen = only.split(",")
    if unknown := set(chosen) - set(PEERS):
        raise typer.BadParameter(f"--only: no peer named {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    try:
        folder, index = _files(images, workers, source)
        _warm_up(chosen, workers)
        peers = [_peer(name, folder, index, workers) for name in chosen]
        runs = _measure(peers, rounds, folder, index)
    except X2IError as error:
        console.print(f"[bold red]bench:[/] {error}")
        raise typer.Exit(1) from None
    count = _count(index)
    _show(runs, count, workers)
    result = BENCH / f"ingest-{count}.json"
    write_text(result, json.dumps(_record(runs, count, workers), indent=1) + "\n")
    console.print(f"· figures of every round: {result}")


def _count(index: Path) -> int:
    """Photographs in the index."""
    import pyarrow.parquet as pq

    return int(pq.read_metadata(index).num_rows)


def _files(images: int, workers: int, source: Path | None) -> tuple[Path, Path]:
    if source is not None:
        folder = BENCH / "adopted"
        remove(folder)
        index = photographs.adopt(source, folder, images)
    else:
        folder = BENCH / f"photographs-{images}"
        if not folder.is_dir():
            console.print(f"· making {images:,} photographs in {folder}, once")
        index = photographs.make(folder, images, workers)
    size = sum(len(p.read_bytes()) for p in sorted(folder.iterdir()))  # and so the page cache is warm for all
    console.print(f"· {_count(index):,} photographs, {size / 1e6:,.0f} MB, {workers} workers")
    return folder, index


def _peer(name: str, folder: Path, index: Path, workers: int) -> Peer:
    work = BENCH / "work" / name
    out = work / "out"
    script = str(HERE / "peers" / f"run_{name}.py")  # img2dataset.py would hide the package
    arguments = [str(folder), str(out), str(workers)]
    if name == "x2i":
        recipe = BENCH / "x2i.yaml"
        write_text(recipe, yaml.safe_dump(_recipe(folder, work)))
        command = [str(Path(sys.executable).parent / "x2i"), "build", str(recipe), "--workers", str(workers), "--json"]
        return Peer(name, command, out, "manifest.parquet")
    python = str(_environment())
    if name == "img2dataset":
        return Peer(name, [python, script, str(index), str(out), str(workers)], out, "*.parquet")
    return Peer(name, [python, script, *arguments], out, "manifest.parquet" if name == "pool" else "manifest/*")


def _recipe(folder: Path, work: Path) -> dict[str, Any]:
    return {
        "name": "bench",
        "lake": str(work / "lake"),
        "out": str(work / "out"),
        "sources": [{"kind": "folder", "name": "photographs", "path": str(folder)}],
        "annotators": {"image": None},
        "tasks": {"text_to_image": None},
        "output": {"shorter_side": check.SHORTER_SIDE, "shard_samples": 1000, "jpeg_quality": 95},
    }


def _environment() -> Path:
    """The Python of the peers' own environment, made the first time. Raises X2IError."""
    folder, pins = BENCH / "environment", HERE / "peers.txt"
    if not environment.ready(folder, pins):
        console.print(f"· making the peers' environment in {folder}")
    return environment.python_of(folder, pins)


def _warm_up(chosen: list[str], workers: int) -> None:
    folder = BENCH / f"photographs-{WARM}"
    index = photographs.make(folder, WARM, workers)
    for name in chosen:
        _run(_peer(name, folder, index, workers), -1, folder, index)


def _measure(peers: list[Peer], rounds: int, folder: Path, index: Path) -> dict[str, list[Round]]:
    runs: dict[str, list[Round]] = {peer.name: [] for peer in peers}
    for number in range(rounds):
        turn = number % len(peers)
        for peer in peers[turn:] + peers[:turn]:
            done = _run(peer, number, folder, index)
            runs[peer.name].append(done)
            console.print(
                f"· round {number + 1}, {peer.name}: {done.wall:.1f} s, CPU {done.cpu:.1f} s, "
                f"{done.pss / 1e6:.0f} MB, {len(done.processes)} processes, pixels within {done.difference:.2f}"
            )
    return runs


def _run(peer: Peer, number: int, folder: Path, index: Path) -> Round:
    remove(peer.out.parent)
    peer.out.parent.mkdir(parents=True)
    os.sync()  # what the last one wrote is not this one's to wait for
    logged = BENCH / "logs" / f"{peer.name}-{number + 1}.log"
    logged.parent.mkdir(exist_ok=True)
    cost, printed = meter.run(peer.command, logged, BYTECODE)
    if cost.code:
        raise X2IError(f"{peer.name} ended with code {cost.code}:\n{logged.read_text(errors='replace')[-2000:]}")
    wrong, difference = check.check(peer.out, peer.manifests, folder, index)
    if wrong:
        raise X2IError(f"{peer.name} did other work than was asked: " + "; ".join(wrong[:5]))
    remove(peer.out.parent)
    seconds = json.loads(printed)["seconds"] if peer.name in ("x2i", "ray_data") else {}
    return Round(cost.wall, seconds.get("start_ray", 0.0), cost.cpu, cost.pss, cost.processes, difference, seconds)


def _median(rounds: Sequence[Round], count: int) -> dict[str, float]:
    return {
        "images_per_s": statistics.median(count / r.wall for r in rounds),
        "images_per_s_without_start": statistics.median(count / (r.wall - r.start_ray) for r in rounds),
        "start_ray_s": statistics.median(r.start_ray for r in rounds),
        "cpu_ms_per_image": statistics.median(1000 * r.cpu / count for r in rounds),
        "peak_pss_mb": statistics.median(r.pss / 1e6 for r in rounds),
    }


def _show(runs: dict[str, list[Round]], count: int, workers: int) -> None:
    table = Table(title=f"{count:,} images, {workers} workers, medians", title_justify="left", title_style="bold")
    table.add_column("peer")
    columns = ("img/s", "img/s without\nRay's start", "Ray's\nstart, s", "CPU\nms/img", "peak PSS\nMB")
    for column in (*columns, "x2i's img/s\n(without start)", "x2i's CPU\nper img"):
        table.add_column(column, justify="right")
    medians = {name: _median(rounds, count) for name, rounds in runs.items()}
    ours = medians.get("x2i")
    for name, m in medians.items():
        ratios = ["", ""]
        if ours and name != "x2i":
            speed, bare = (ours[k] / m[k] for k in ("images_per_s", "images_per_s_without_start"))
            ratios = [f"{speed:.2f}x ({bare:.2f}x)", f"{ours['cpu_ms_per_image'] / m['cpu_ms_per_image']:.2f}x"]
        speeds = [f"{m['images_per_s']:.0f}", f"{m['images_per_s_without_start']:.0f}"]
        costs = [f"{m['start_ray_s']:.1f}", f"{m['cpu_ms_per_image']:.2f}", f"{m['peak_pss_mb']:.0f}"]
        table.add_row(name, *speeds, *costs, *ratios)
    console.print(table)
    if ours:
        for text, reached in _aims(medians):
            console.print(f"  {'[green]reached[/]' if reached else '[red]missed [/]'} {text}")


def _aims(medians: dict[str, dict[str, float]]) -> list[tuple[str, bool]]:
    ours = medians["x2i"]
    aims = [(f"memory: {ours['peak_pss_mb']:.0f} MB, aim: below {MEMORY_AIM}", ours["peak_pss_mb"] < MEMORY_AIM)]
    if "pool" in medians:
        ratio = ours["cpu_ms_per_image"] / medians["pool"]["cpu_ms_per_image"]
        aims.append((f"CPU per image: {ratio:.2f} times the pool's, aim: at most {CPU_AIM}", ratio <= CPU_AIM))
    for name, aim in SPEED_AIMS.items():
        if name in medians:
            ratio = ours["images_per_s_without_start"] / medians[name]["images_per_s_without_start"]
            aims.append((f"images per second: {ratio:.2f} times {name}'s, aim: at least {aim}", ratio >= aim))
    return aims


def _record(runs: dict[str, list[Round]], count: int, workers: int) -> dict[str, Any]:
    packages = ("ray", "numpy", "opencv-python-headless", "simplejpeg", "pyarrow", "webdataset")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "images": count,
        "workers": workers,
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
        "packages": {name: version(name) for name in packages},
        "medians": {name: _median(rounds, count) for name, rounds in runs.items()},
        "rounds": {name: [asdict(r) for r in rounds] for name, rounds in runs.items()},
    }


if __name__ == "__main__":
    typer.run(main)
