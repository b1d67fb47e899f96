"""How long a run takes to begin on a large corpus, and what it costs to draw: a manifest of made-up rows, no shard.

python benchmarks/plan.py --rows 100_000_000 --folder plan

The manifest has all columns, with hashes that do not compress; 20 tasks of uneven size and 12 sources that follow one
another, a tenth of the samples with a second image. It is written once (180 bytes a row), and kept with --keep. What is
measured runs in a process of its own: seconds and CPU seconds until the first draw can be asked for, then the draws of
1,000 steps, the same with every sample looked up in the manifest (as readers do, in threads), and a jump to step
1,000,000. Memory is the peak of the resident set after each (Linux only). With --pack the samples are packed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from x2i import corpus
from x2i.corpus.manifest import MEMBER, ROW_GROUP, SIZE, STORED, ManifestWriter
from x2i.trainer.mixture import plan_of, table_of
from x2i.trainer.stage import Pack, Stage

_TASKS, _SOURCES, _POOL = 20, 12, 16
_BUCKETS = ((512, 512), (576, 448), (448, 576), (640, 384), (384, 640), (704, 352), (352, 704))


def main() -> None:
    """Write the manifest, if it is not there, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "x2i-plan")
    parser.add_argument("--batch", type=int, default=256, help="draws per step")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--by", choices=["task", "source"], default="task")
    parser.add_argument("--buckets", action="store_true", help="seven sizes, told apart by the pass")
    parser.add_argument("--pack", type=int, default=0, metavar="TOKENS", help="packs of so many tokens, 16 in a step")
    parser.add_argument("--cold", action="store_true", help="ask the system to drop the file from its cache first")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options)))
        return
    file = options.folder / "manifest.parquet"
    began = time.perf_counter()
    if not file.is_file() or pq.read_metadata(file).num_rows != options.rows:
        shutil.rmtree(options.folder, ignore_errors=True)
        options.folder.mkdir(parents=True)
        (options.folder / "corpus.json").write_text(json.dumps({"format": 1, "digest": "0", "name": "made-up"}))
        write(file, options.rows)
        print(f"written in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    if options.cold:
        drop(file)
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--measure"], capture_output=True, check=False)
    if done.returncode:
        sys.exit(done.stderr.decode())
    told = json.loads(done.stdout)
    print(f"{options.rows:,} rows, {file.stat().st_size / 1e9:.2f} GB, {told.pop('row_groups'):,} row groups")
    for name, figures in told.items():
        print(f"{name:34} {figures['seconds']:8.2f} s   CPU {figures['cpu']:8.2f} s   peak {figures['peak']:6.0f} MB")
    if not options.keep:
        shutil.rmtree(options.folder)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds, CPU seconds and peak memory of each phase."""
    out: dict[str, Any] = {}

    def note(name: str, began: tuple[float, float]) -> None:
        seconds, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
        status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent's memory too
        peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
        out[name] = {"seconds": seconds, "cpu": cpu, "peak": peak}

    def now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    began = now()
    note("imports", began)
    began = now()
    buckets = _BUCKETS if options.buckets else ()
    names = [f"task_{i:02d}" for i in range(_TASKS)] if options.by == "task" else _sources()
    stage = Stage(
        name="one",
        resolution=512,
        steps=1,
        batch=None if options.pack else options.batch,
        pack=Pack(tokens=options.pack, packs=16) if options.pack else None,
        lr=1,
        buckets=buckets,
        mixture={name: 1.0 + place % 3 for place, name in enumerate(names)},
        mixture_by=options.by,
    )
    table = table_of([corpus.open(options.folder)], [stage], 0.01)
    plan = plan_of(table, stage, 0)
    note("start", began)
    began = now()
    plan.step(0)
    note("first step's draws", began)
    began = now()
    for step in range(options.steps):
        plan.step(step)
    note(f"draws of {options.steps} steps", began)
    began = now()
    plan.step(1_000_000)
    note("draws of step 1,000,000", began)
    with ThreadPoolExecutor(4) as pool:
        for name, steps in {
            "look-ups of the first step": range(1),
            f"look-ups of {options.steps} steps": range(options.steps),
        }.items():
            began = now()
            for step in steps:
                list(pool.map(table.__getitem__, [draw.sample for draw in plan.step(step)]))
            note(name, began)
    return {"row_groups": len(table.sizes), **out}


def write(file: Path, rows: int) -> None:
    """A manifest of so many rows."""
    random = np.random.default_rng(0)
    pool = [texts(random) for _ in range(_POOL)]
    tasks = pa.array([f"task_{i:02d}" for i in range(_TASKS)])
    weights = 1 / np.arange(1, _TASKS + 1)
    with ManifestWriter(file) as writer:
        for start in range(0, rows, ROW_GROUP):
            drawn = random.choice(_TASKS, ROW_GROUP, p=weights / weights.sum())
            columns = pool[start // ROW_GROUP % _POOL] | {
                "shard": pa.array([f"shards/{start // ROW_GROUP * 16 + i:06d}.tar" for i in range(16)]).take(
                    pa.array(np.arange(ROW_GROUP) * 16 // ROW_GROUP)
                ),
                "task_type": tasks.take(pa.array(drawn)),
                "source": pa.array([_sources()[start * _SOURCES // rows]] * ROW_GROUP),
                "output_size": pa.array(random.integers(256, 1024, ROW_GROUP), pa.int32()),
                "heights": pa.array(random.integers(256, 1024, ROW_GROUP), pa.int32()),
                "split": pa.array(random.integers(0, 2**32, ROW_GROUP, dtype=np.uint32)),
                "text_tokens": pa.array(np.clip(random.lognormal(3.7, 0.5, ROW_GROUP), 8, 400), pa.int32(), safe=False),
                "rejected_tokens": pa.nulls(ROW_GROUP, pa.int32()),
                "split_others": pa.array(
                    random.integers(0, 2**32, ROW_GROUP, dtype=np.uint32), mask=random.random(ROW_GROUP) > 0.1
                ),
            }
            columns["output_size"] = pa.StructArray.from_arrays(
                [columns["output_size"], columns["heights"]], fields=list(SIZE), mask=pa.array(drawn % 5 == 4)
            )
            writer.write(pa.table([columns[n] for n in STORED.names], schema=STORED).slice(0, rows - start))


def _sources() -> list[str]:
    return [f"source_{i:02d}" for i in range(_SOURCES)]


def texts(random: np.random.Generator) -> dict[str, pa.Array]:
    """The columns that no plan looks at, and those that are looked up."""

    def hashes() -> pa.Array:
        text = random.bytes(32 * ROW_GROUP).hex()
        return pa.array([text[i : i + 64] for i in range(0, len(text), 64)])

    def lists(values: pa.Array, of: int) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(np.arange(ROW_GROUP + 1) * of, pa.int32()), values)

    image, offsets = hashes(), np.arange(ROW_GROUP) * 300_000
    sizes = pa.array(random.integers(200_000, 300_000, 3 * ROW_GROUP))
    places = pa.array(np.repeat(offsets, 3) + np.tile([512, 1536, 150_000], ROW_GROUP))
    suffixes = pa.array(["json", "input_1.jpg", "output.jpg"] * ROW_GROUP)
    side = pa.array(random.integers(256, 1024, ROW_GROUP), pa.int32())
    none = pa.array(np.zeros(ROW_GROUP + 1), pa.int32())
    return {
        "key": pa.array([f"{i[:12]}-deblur" for i in image.to_pylist()]),
        "offset": pa.array(offsets),
        "size": pa.array(random.integers(200_000, 300_000, ROW_GROUP)),
        "sha256": hashes(),
        "instruction_chars": pa.array(random.integers(20, 200, ROW_GROUP), pa.int32()),
        "input_sizes": lists(pa.StructArray.from_arrays([side, side], fields=list(SIZE)), 1),
        "image_id": image,
        "images": lists(image, 1),
        "row_id": hashes(),
        "location": pa.array([f"folder/{i[:10]}.jpg" for i in image.to_pylist()]),
        "scores": pa.MapArray.from_arrays(none, pa.array([], pa.string()), pa.array([], pa.float64())),
        "members": lists(pa.StructArray.from_arrays([suffixes, places, sizes], fields=list(MEMBER)), 3),
    }


def drop(file: Path) -> None:
    """Ask the system to forget what it has cached of a file."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


if __name__ == "__main__":
    main()
