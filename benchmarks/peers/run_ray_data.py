"""Ray Data: files to pictures in `map_batches`, tars and manifest out of the same tasks.

    python run_ray_data.py PHOTOGRAPHS OUT WORKERS [map]

The default shape is the best that was found (see LOG.md): a block is a shard, its task writes the tar
itself, and what travels is the manifest, which Ray Data writes as Parquet. `map` is the shape of the
documentation, `map(…).write_webdataset(…)`, without a manifest.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import work

os.environ.setdefault("RAY_enable_metrics_collection", "0")


def write_shard(batch: dict[str, Any], folder: Path, out: Path) -> dict[str, list[Any]]:
    """A batch is a shard: `name` and `number` in, rows of the manifest out."""
    import webdataset

    rows = []
    shard = f"{int(batch['number'][0]):05d}.tar"
    with webdataset.TarWriter(str(out / shard), encoder=False) as writer:
        for name in batch["name"]:
            sample, row = work.sample(folder, str(name))
            writer.write(sample)
            rows.append({"shard": shard, **row})
    return {key: [row[key] for row in rows] for key in rows[0]}


def main(folder: Path, out: Path, workers: int, shape: str) -> None:
    """Start Ray, run the pipeline, print how long the start took."""
    import ray
    import ray.data

    began = time.perf_counter()
    # the store is capped as x2i's is; nothing large goes through it in either shape
    ray.init("local", num_cpus=workers, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
    started = time.perf_counter() - began
    ray.data.DataContext.get_current().enable_progress_bars = False
    out.mkdir(parents=True)
    found = work.names(folder)
    shards = -(-len(found) // work.SHARD)
    items = [{"name": name, "number": i // work.SHARD} for i, name in enumerate(found)]
    if shape == "map":
        dataset = ray.data.from_items(items, override_num_blocks=shards)
        dataset.map(lambda row: work.sample(folder, row["name"])[0]).write_webdataset(str(out), encoder=None)
    else:
        blocks = [items[i : i + work.SHARD] for i in range(0, len(items), work.SHARD)]
        dataset = ray.data.from_blocks([_table(block) for block in blocks])
        rows = dataset.map_batches(write_shard, batch_size=None, fn_kwargs={"folder": folder, "out": out})
        rows.write_parquet(str(out / "manifest"))
    print(json.dumps({"seconds": {"start_ray": started}}))


def _table(block: list[dict[str, Any]]) -> Any:
    import pyarrow as pa

    return pa.Table.from_pylist(block)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else "shards")
