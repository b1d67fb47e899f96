"""x2i's loader beside its peers: photographs out of shards to crops, images per CPU-second of the whole process tree.

    python benchmarks/loader.py --samples 3000 --rounds 3

- x2i: `x2i.trainer.loader.Loader`, threads of one process, which gives NumPy arrays. It checks every sample's SHA-256 and
  reads its JSON; the peers do neither. x2i_torch: the same in a process that holds PyTorch, as the trainer's does, and as
  all of webdataset's and Energon's do.
- webdataset, Megatron-Energon, HF datasets (streaming): the same tar shards. LitData, Mosaic streaming: the same files in
  their own format, written beforehand.

The peers have an environment of their own (peers_loader.txt). Work, marks and shuffling: peers/loading.py, peers/load_peer.py.

`full`: the largest centred square, by Pillow, scaled by its bicubic filter. `reduced`: x2i's `decode: reduced`; of a peer,
Pillow's draft mode, which its user can have by one line, and the same filter. `none`: bytes as they are in the shards.

Interleaved rounds from a warm page cache, medians. Counts, keys and pixels are checked before a time is believed.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import environment
import meter
import numpy as np
import photographs
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from peers import loading
from rich.console import Console
from rich.table import Table

from x2i.base.errors import X2IError
from x2i.base.files import atomic, remove, write_text
from x2i.corpus.manifest import SCHEMA, ManifestWriter, corpus_digest
from x2i.corpus.sample import Picture, Sample
from x2i.corpus.shard import ShardWriter

HERE = Path(__file__).resolve().parent
BENCH = HERE.parent / "runs" / "bench"
PEERS = ("x2i", "x2i_torch", "webdataset", "energon", "litdata", "mosaic", "hf_datasets")

#: Those that read tars, and what is aimed at: so many times the best of them, within so many MiB.
TARS, AIM, MEMORY_AIM = ("webdataset", "energon", "hf_datasets"), 1.5, 600

#: Those that are run reduced, and at further sides, as well.
REDUCED = ("x2i", "x2i_torch", "webdataset", "energon")

#: Samples before the first mark, and files of a shard.
WARM, SHARD = 640, 250

#: Mean absolute difference (of 255) from the reference that is the same work, and the least PSNR (dB) of a reduced decode.
MOST, LEAST = 0.05, 30.0

BYTECODE = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(BENCH / "bytecode"), "OMP_NUM_THREADS": "1"}

console = Console()
if not console.is_terminal:
    console = Console(width=120)


@dataclass(frozen=True)
class Case:
    """One row: whose loader, how it decodes, to which side in pixels."""

    peer: str
    mode: str
    side: int

    @property
    def name(self) -> str:
        """For logs."""
        return f"{self.peer}-{self.mode}-{self.side}"


@dataclass(frozen=True)
class Round:
    """One run: between the marks images, seconds and CPU seconds of the tree; of the whole run its start's CPU and PSS.

    `difference`: mean absolute, of 255, from the reference; `psnr`: in dB, mean and least.
    """

    samples: int
    seconds: float
    cpu: float
    start_cpu: float
    pss: int
    difference: float
    psnr: tuple[float, float]


def main(
    images: Annotated[int, typer.Option(min=500, help="Photographs to make and read.")] = 2000,
    samples: Annotated[int, typer.Option(min=500, help="Images between the marks of a run.")] = 3000,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each case.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Workers of each peer, threads of x2i.")] = 2,
    sides: Annotated[str, typer.Option(help="Sides of the crop, with commas.")] = "256,512",
    only: Annotated[str, typer.Option(help="Peers to run, by name, with commas.")] = ",".join(PEERS),
) -> None:
    """Measure x2i's loader and its peers."""
    chosen = only.split(",")
    if unknown := set(chosen) - set(PEERS):
        raise typer.BadParameter(f"--only: no peer named {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    cases = [Case(p, m, int(s)) for s in sides.split(",") for m in ("full", "reduced") for p in chosen]
    first = cases[0].side
    cases = [c for c in cases if c.peer in REDUCED or (c.mode == "full" and c.side == first)]
    # what a loader costs without the pictures
    cases += [Case(p, "none", int(sides.split(",")[0])) for p in chosen]
    try:
        python = environment.python_of(BENCH / "loader-environment", HERE / "peers_loader.txt")
        data = _data(images, workers, python)
        known = _known(data)
        bares: list[dict[str, float]] = []
        runs: dict[Case, list[Round]] = {case: [] for case in cases}
        for number in range(rounds):
            bares.append(_bare())
            turn = number * 5 % len(cases)
            for case in cases[turn:] + cases[:turn]:
                done = _run(case, data, python, workers, samples, known)
                runs[case].append(done)
                console.print(f"· round {number + 1}, {case.name}: {done.samples / done.cpu:.0f} img/CPU-s")
            bare = {name: statistics.median(b[name] for b in bares) for name in bares[0]}
            _show(runs, workers, bare)
            result = BENCH / "loader.json"
            write_text(result, json.dumps(_record(runs, workers, bare), indent=1) + "\n")
            console.print(f"· figures of every round: {result}")
    except X2IError as error:
        console.print(f"[bold red]bench:[/] {error}")
        raise typer.Exit(1) from None


def _data(images: int, workers: int, python: Path) -> Path:
    """The folder with the corpus and the peers' copies, made once."""
    folder = BENCH / f"loader-{images}"
    source = BENCH / f"photographs-{images}"
    photographs.make(source, images, workers)
    if not (folder / "corpus/corpus.json").is_file():
        console.print(f"· writing the shards in {folder}")
        remove(folder)
        folder.mkdir(parents=True)
        _write(folder / "corpus", sorted(source.glob("*.jpg")))
    if not (folder / "converted").is_file():
        console.print("· converting them for LitData and Mosaic")
        for name in ("litdata", "mosaic", "energon"):
            remove(folder / name)
        log = BENCH / "logs" / "convert.log"
        log.parent.mkdir(exist_ok=True)
        cost, _ = meter.run([str(python), str(HERE / "peers/load_peer.py"), "convert", str(folder)], log, BYTECODE)
        if cost.code:
            raise X2IError(f"the peers' copies could not be made:\n{log.read_text(errors='replace')[-1500:]}")
        write_text(folder / "converted", "")
    return folder


def _write(folder: Path, files: list[Path]) -> None:
    """An x2i corpus of these photographs with their captions, as `x2i build` lays it out."""
    (folder / "shards").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    shards: list[dict[str, Any]] = []
    index = {r["name"]: r for r in pq.read_table(files[0].parent.with_suffix(".parquet")).to_pylist()}
    for start in range(0, len(files), SHARD):
        name = f"shards/{len(shards):05d}.tar"
        with ShardWriter(folder / name) as writer:
            for file in files[start : start + SHARD]:
                row = index[file.name]
                picture = Picture(file.read_bytes(), "jpg", row["width"], row["height"])
                sample = Sample(f"{row['sha256'][:12]}-{file.stem}", "text_to_image", row["caption"], (), picture)
                entry = writer.write(sample.key, sample.members())
                size = {"width": row["width"], "height": row["height"]}
                told = {"image_id": row["sha256"], "images": [row["sha256"]], "row_id": file.stem, "source": "bench"}
                told |= {"location": file.name, "scores": [], "input_sizes": [], "output_size": size}
                place = {"key": sample.key, "shard": name, "offset": entry.offset, "size": entry.size}
                members = [{"suffix": m.suffix, "offset": m.offset, "size": m.size} for m in entry.members]
                place |= {"sha256": entry.sha256, "members": members, "task_type": sample.task_type}
                rows.append({**place, **told, "instruction_chars": len(sample.instruction)})
        shards.append({"name": name, "size": writer.size, "samples": writer.samples, "sha256": writer.sha256})
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    with ManifestWriter(folder / "manifest.parquet") as manifest:
        manifest.write(table)
    info = {"format": 1, "digest": corpus_digest(shards, table.to_batches()), "shards": shards}
    with atomic(folder / "corpus.json") as temporary:
        temporary.write_text(json.dumps(info))


def _known(data: Path) -> dict[str, Path]:
    """The photograph of each key; and so their bytes, and the shards', are in the page cache."""
    for path in data.rglob("*"):
        if path.is_file():
            path.read_bytes()
    source = BENCH / f"photographs-{data.name.rpartition('-')[2]}"
    rows = pq.read_table(data / "corpus/manifest.parquet", columns=["key", "location"]).to_pylist()
    return {row["key"]: source / row["location"] for row in rows}


def _bare() -> dict[str, float]:
    """PSS in MiB of processes that have imported what they need, and read nothing."""
    found = {}
    for name, code in (("PyTorch", "import torch"), ("x2i's loader", "import x2i.trainer.loader")):
        command = [sys.executable, "-c", f"{code}; import time; time.sleep(2)"]
        found[name] = meter.run(command, BENCH / "logs" / "bare.log", BYTECODE)[0].pss / 2**20
    return found


def _run(case: Case, data: Path, python: Path, workers: int, samples: int, known: dict[str, Path]) -> Round:
    ours = case.peer.startswith("x2i")
    script = "load_x2i.py" if ours else "load_peer.py"
    kept = BENCH / "logs" / f"load-{case.name}.npz"
    log = kept.with_suffix(".log")
    command = [sys.executable if ours else str(python), str(HERE / "peers" / script), case.peer]
    command += [str(data), str(case.side), case.mode, str(workers), str(WARM), str(samples), str(kept)]
    cost, printed = meter.run(command, log, BYTECODE)
    if cost.code:
        raise X2IError(f"{case.name} ended with code {cost.code}:\n{log.read_text(errors='replace')[-2000:]}")
    told = json.loads(printed.strip().splitlines()[-1])
    difference, psnr = _check(case, kept, samples, known)
    return Round(told["samples"], told["seconds"], told["cpu"], told["start_cpu"], cost.pss, difference, psnr)


def _check(case: Case, kept: Path, samples: int, known: dict[str, Path]) -> tuple[float, tuple[float, float]]:
    """Difference and PSNR (mean and least) of the crops from the reference's. Raises X2IError where the work was not done."""
    with np.load(kept) as file:
        seen, keys, crops = file["seen"].tolist(), file["keys"].tolist(), file["crops"]
    if len(seen) < samples + WARM or set(seen) - known.keys():
        raise X2IError(f"{case.name}: {len(seen)} samples, {len(set(seen) - known.keys())} of them unknown")
    if len(set(seen)) < 0.9 * min(len(known), len(seen)):
        raise X2IError(f"{case.name}: of {len(seen)} samples only {len(set(seen))} are different ones")
    if case.mode == "none":
        return 0.0, (99.0, 99.0)
    reference = np.stack([loading.crop(known[key].read_bytes(), case.side, reduced=False) for key in keys])
    if reference.shape != crops.shape or len(crops) < loading.COMPARED:
        raise X2IError(f"{case.name}: crops {crops.shape}, the reference's are {reference.shape}")
    error = crops.astype(np.float64) - reference
    psnr = [min(10 * np.log10(255**2 / max(np.square(e).mean(), 1e-9)), 99.0) for e in error]
    difference = float(np.abs(error).mean())
    if (case.mode == "full" and difference > MOST) or min(psnr) < LEAST:
        raise X2IError(f"{case.name}: pixels differ by {difference:.2f} of 255 (at worst {min(psnr):.1f} dB)")
    return difference, (float(np.mean(psnr)), float(min(psnr)))


def _median(rounds: list[Round]) -> dict[str, float]:
    return {
        "images_per_cpu_s": statistics.median(r.samples / r.cpu for r in rounds),
        "images_per_s": statistics.median(r.samples / r.seconds for r in rounds),
        "peak_pss_mib": statistics.median(r.pss / 2**20 for r in rounds),
        "start_cpu_s": statistics.median(r.start_cpu for r in rounds),
        "difference": statistics.median(r.difference for r in rounds),
        "psnr": statistics.median(r.psnr[0] for r in rounds),
        "least_psnr": min(r.psnr[1] for r in rounds),
    }


def _show(runs: dict[Case, list[Round]], workers: int, bare: dict[str, float]) -> None:
    rounds = len(next(iter(runs.values())))
    table = Table(title=f"Loaders, {workers} workers, medians of {rounds}", title_justify="left", title_style="bold")
    for column in ("decode", "side", "loader"):
        table.add_column(column)
    columns = ("images per\nCPU-second", "x2i's\nto it", "x2i reduced\nto it", "images/s", "peak PSS\nMiB")
    for column in (*columns, "start\nCPU s", "difference\nof 255", "PSNR dB\n(least)"):
        table.add_column(column, justify="right")
    medians = {case: _median(rounds) for case, rounds in runs.items()}
    for case, m in medians.items():
        ratios = []
        for mode in (case.mode, "reduced"):
            ours = medians.get(Case("x2i", mode, case.side))
            here = (ours is not None and case.peer != "x2i" and case.mode != "none") or mode == case.mode == "none"
            here = here and ours is not None and case.peer != "x2i"
            ratios.append(f"{ours['images_per_cpu_s'] / m['images_per_cpu_s']:.2f}x" if here and ours else "")
        near = (
            ["", ""] if case.mode == "none" else [f"{m['difference']:.2f}", f"{m['psnr']:.1f} ({m['least_psnr']:.1f})"]
        )
        costs = [f"{m['images_per_s']:.0f}", f"{m['peak_pss_mib']:.0f}", f"{m['start_cpu_s']:.1f}"]
        side = "" if case.mode == "none" else str(case.side)
        table.add_row(case.mode, side, case.peer, f"{m['images_per_cpu_s']:.0f}", *ratios, *costs, *near)
    console.print(table)
    console.print(
        "  PSS of a process that has only imported: " + ", ".join(f"{n} {v:.0f} MiB" for n, v in bare.items())
    )
    for side in sorted({case.side for case in medians}):
        ours = medians.get(Case("x2i", "reduced", side))
        tars = {p: medians[Case(p, "full", side)]["images_per_cpu_s"] for p in TARS if Case(p, "full", side) in medians}
        if ours and tars:
            best = max(tars, key=lambda p: tars[p])
            ratio = ours["images_per_cpu_s"] / tars[best]
            held = ours["peak_pss_mib"]
            _told(ratio >= AIM, f"{side} px: reduced, {ratio:.2f} times {best} in full; aim: {AIM}")
            _told(held <= MEMORY_AIM, f"{side} px: {held:.0f} MiB; aim: {MEMORY_AIM}")


def _told(reached: bool, text: str) -> None:
    console.print(f"  {'[green]reached[/]' if reached else '[red]missed [/]'} {text}")


def _record(runs: dict[Case, list[Round]], workers: int, bare: dict[str, float]) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "workers": workers,
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
        "packages": {name: version(name) for name in ("torch", "pillow", "simplejpeg", "numpy")},
        "bare_pss_mib": bare,
        "medians": {case.name: _median(rounds) for case, rounds in runs.items()},
        "rounds": {case.name: [asdict(r) for r in rounds] for case, rounds in runs.items()},
    }


if __name__ == "__main__":
    typer.run(main)
