"""A plain multiprocessing pool: a task is a shard, written with webdataset's TarWriter. The floor to measure by.

python run_pool.py PHOTOGRAPHS OUT WORKERS
"""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import work


def write_shard(task: tuple[Path, Path, int, list[str]]) -> list[dict[str, Any]]:
    """One shard, from files to tar, in one process. Returns its rows of the manifest."""
    import webdataset

    folder, out, number, members = task
    rows = []
    with webdataset.TarWriter(str(out / f"{number:05d}.tar"), encoder=False) as writer:  # bytes go in as they are
        for name in members:
            sample, row = work.sample(folder, name)
            writer.write(sample)
            rows.append({"shard": f"{number:05d}.tar", **row})
    return rows


def main(folder: Path, out: Path, workers: int) -> None:
    """List, share out, collect the manifest."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    out.mkdir(parents=True)
    found = work.names(folder)
    tasks = [(folder, out, n, found[i : i + work.SHARD]) for n, i in enumerate(range(0, len(found), work.SHARD))]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        rows = [row for part in pool.imap(write_shard, tasks) for row in part]
    pq.write_table(pa.Table.from_pylist(rows), out / "manifest.parquet")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
