"""The dataset card: a README.md with the front matter that dataset hubs read."""

from typing import Any


def card(info: dict[str, Any]) -> str:
    """Render the card of a corpus from its `corpus.json`."""
    counts = info["counts"]
    tasks = "\n".join(f"| {name} | {task['made']:,} |" for name, task in info["tasks"].items() if task["made"])
    fell = "\n".join(f"| {f['stage']} | {f['reason']} | {f['rows']:,} |" for f in info["funnel"])
    sources = "\n".join(f"- `{s['name']}` ({s['kind']})" for s in info["sources"])
    annotators = "\n".join(
        f"- `{a['name']}` version {a['version']}, fingerprint `{a['fingerprint'][:16]}`"
        + (f", on rows where `{' '.join(a['where'].split())}`" if a.get("where") else "")
        + "".join(f", weights `{spec}` (SHA-256 `{sha[:16]}…`)" for spec, sha in a["weights"].items())
        for a in info["annotators"]
    )
    shards = f"shards/{{{_number(info['shards'][0])}..{_number(info['shards'][-1])}}}.tar" if info["shards"] else "none"
    return f"""---
license: {info["license"]}
task_categories: [text-to-image, image-to-image]
tags: [webdataset, x2i]
configs:
- config_name: default
  data_files: shards/*.tar
---
# {info["name"]}

{info["description"] or "An X2I (anything-to-image) corpus."}

{counts["samples"]:,} samples in {counts["shards"]:,} WebDataset shards ({counts["bytes"] / 1e6:,.1f} MB), made of
{counts["rows_out"]:,} of {counts["rows_in"]:,} rows. Digest `{info["digest"]}`.

| task | samples |
|---|---|
{tasks}

## Where it comes from
{sources}

## Which rows fell, and why
{counts["rows_in"]:,} rows in = {counts["rows_out"]:,} rows out + {counts["rows_in"] - counts["rows_out"]:,} that fell:

| stage | reason | rows |
|---|---|---|
{fell}

## What judged them
{annotators}

## How to read it
Each sample is `KEY.json` (`task_type`, `instruction` with `<img><|image_1|></img>` placeholders, `input_images`,
`output_image`, `provenance`), `KEY.input_1.…` and `KEY.output.…`, one after the other in a tar:

```python
import webdataset as wds
for sample in wds.WebDataset("{shards}", shardshuffle=False).decode("pil"):
    ...
```
Within a shard the samples lie task by task: to train with a plain reader, shuffle with a buffer of a shard or more
(`.shuffle(2000)`). `manifest.parquet` has a row per sample (shard, offset, sizes, scores), `selection.parquet` a row per source row
(kept, or the reason for which it fell), `corpus.json` the recipe, the versions and the hashes. `x2i verify` checks
all of it, `x2i trace` tells where a sample comes from.
"""


def _number(shard: dict[str, Any]) -> str:
    return str(shard["name"]).removeprefix("shards/").removesuffix(".tar")
