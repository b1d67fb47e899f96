"""The manifest: one Parquet row per sample, all that a planner, an auditor or a reader needs.

Offsets are bytes from the start of the shard; `members[].offset` points at a file's content, past its
tar header. `scores` are the annotators' values that the selection saw, named `annotator.column`.
"""

import hashlib
from collections.abc import Container, Iterable
from typing import Any

import pyarrow as pa

from x2i.base.errors import X2IError
from x2i.base.seeds import canonical_json, digest

SIZE = pa.struct([("width", pa.int32()), ("height", pa.int32())])
MEMBER = pa.struct([("suffix", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),  # relative to the corpus, e.g. shards/00000.tar
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),  # of the range [offset, offset + size)
        pa.field("task_type", pa.string(), nullable=False),
        pa.field("instruction_chars", pa.int32(), nullable=False),
        pa.field("input_sizes", pa.list_(SIZE), nullable=False),  # as stored, in order of the placeholders
        pa.field("output_size", SIZE),  # null for understanding samples
        pa.field("image_id", pa.string(), nullable=False),  # SHA-256 of the original bytes
        pa.field(
            "images", pa.list_(pa.string()), nullable=False
        ),  # all originals in it, image_id first (see `originals`)
        pa.field("row_id", pa.string(), nullable=False),  # the lake's row, and the selection's
        pa.field("source", pa.string(), nullable=False),
        pa.field("location", pa.string(), nullable=False),
        pa.field("scores", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("members", pa.list_(MEMBER), nullable=False),
    ]
)


def originals(provenance: dict[str, Any]) -> list[str]:
    """SHA-256 of every original image that a sample derives from, the row's own first, each once."""
    others = [i for o in provenance.get("others", ()) for i in (o["image_id"], *o.get("input_ids", ()))]
    return list(dict.fromkeys([provenance["image_id"], *provenance.get("input_ids", ()), *others]))


def refuse_older(columns: Container[str], manifest: object) -> None:
    """Raise X2IError if a manifest with these columns was written before they said which images a sample holds."""
    if "images" not in columns:
        raise X2IError(
            f"{manifest}: does not say which images are in a sample: an earlier x2i built it. "
            "Run `x2i build` on its recipe, then this command again."
        )


def corpus_digest(shards: Iterable[dict[str, Any]], batches: Iterable[pa.RecordBatch]) -> str:
    """The corpus's identity: SHA-256 over the shards' names and hashes and every manifest row, in order.

    Args:
        shards: `name`, `size`, `samples`, `sha256` of each shard, in order.
        batches: the manifest's rows.
    """
    rows = hashlib.sha256()
    for batch in batches:
        for row in batch.to_pylist():
            row["scores"] = sorted(row["scores"])  # a map has no order of its own
            rows.update(canonical_json(row).encode() + b"\n")
    names = [[s["name"], s["size"], s["samples"], s["sha256"]] for s in shards]
    return digest("x2i-corpus/1", names, rows.hexdigest())
