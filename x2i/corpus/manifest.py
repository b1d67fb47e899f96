"""The manifest: one Parquet row per sample, all that a planner, an auditor or a reader needs.

Offsets are bytes from the start of the shard; `members[].offset` points at a file's content, past its
tar header. `scores` are the annotators' values that the selection saw, named `annotator.column`.

The file has four columns more. Two follow from the images' ids (`SPLIT`); `text_tokens` says about how long the sample's
text is, and `rejected_tokens` how long it is with the rejected answer (`x2i.corpus.text`). It has row groups of a fixed number of rows: so a reader can split the corpus and count its
parts by narrow columns, plan packs by lengths, and fetch rows by the group (`ManifestWriter`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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

#: Derived columns: no part of the digest, and absent from corpora of earlier builds.
SPLIT = pa.schema(
    [
        pa.field("split", pa.uint32(), nullable=False),  # `split_point` of image_id
        pa.field("split_others", pa.uint32()),  # the least over the other `images`; null if there are none
    ]
)

#: Follows from the sample's text: no part of the digest, absent or null in corpora of earlier builds.
TEXT = pa.field("text_tokens", pa.int32())
#: The same with the rejected answer in place of the last; null where there is none.
REJECTED = pa.field("rejected_tokens", pa.int32())

#: What assembly knows of a sample, and the file's columns.
MADE = pa.schema([*SCHEMA, TEXT, REJECTED])
STORED = pa.schema([*SCHEMA, *SPLIT, TEXT, REJECTED])

#: Rows of a row group: small enough to fetch one for a few samples, large enough for a short footer.
ROW_GROUP = 16_384

#: Columns whose values repeat. Dictionaries of hashes would only be in the way.
_REPEATING = [
    *("shard", "task_type", "source", "scores.key_value.key", "members.list.element.suffix"),
    *("input_sizes.list.element.width", "input_sizes.list.element.height", "output_size.width", "output_size.height"),
]


def split_point(image_id: str) -> int:
    """Where an image lies in [0, 2^32): from its id alone. Those below a share of it are held out."""
    return int(digest("held-out/1", image_id)[:8], 16)


def split_columns(image_ids: pa.Array | pa.ChunkedArray, images: pa.Array | pa.ChunkedArray | None) -> list[pa.Array]:
    """The columns of `SPLIT`. Without `images` (corpora of early builds) a sample holds the one image only."""
    own = [i or "" for i in image_ids.to_pylist()]
    held = [[i] for i in own] if images is None else images.to_pylist()
    point = {i: split_point(i) for i in {*own, *(i for each in held for i in each)}}
    least = (min((point[i] for i in each if i != mine), default=None) for mine, each in zip(own, held, strict=True))
    return [
        pa.array(np.fromiter((point[i] for i in own), np.uint32, len(own))),
        pa.array(list(least), pa.uint32()),
    ]


def stored(table: pa.Table) -> pa.Table:
    """The rows with all columns of the file. Raises X2IError if they do not say which images they hold."""
    refuse_older(table.column_names, "the manifest")
    if not set(SPLIT.names) <= set(table.column_names):
        for field, column in zip(SPLIT, split_columns(table["image_id"], table["images"]), strict=True):
            table = table.append_column(field, column)
    for field in (TEXT, REJECTED):
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table.select(STORED.names).cast(STORED)


class ManifestWriter:
    """Writes a manifest from tables of any length, in row groups of a fixed number of rows."""

    def __init__(self, path: str | Path, row_group: int = ROW_GROUP) -> None:
        told = ["shard", "task_type", "source", "size", "instruction_chars", "output_size.width", "output_size.height"]
        told += ["text_tokens"]
        self._file = pq.ParquetWriter(
            path, STORED, compression="zstd", use_dictionary=_REPEATING, write_statistics=told
        )
        self._row_group = row_group
        self._waiting: list[pa.Table] = []
        self._rows = 0

    def __enter__(self) -> ManifestWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._write(0)
        self._file.close()

    def write(self, table: pa.Table) -> None:
        """Append rows of `SCHEMA`, of `MADE` or of `STORED`."""
        if table.num_rows:
            self._waiting.append(stored(table))
            self._rows += table.num_rows
            self._write(self._row_group)

    def _write(self, least: int) -> None:
        """Write row groups as long as `least` rows wait, and any do."""
        if not self._rows or self._rows < least:
            return
        table = pa.concat_tables(self._waiting)
        done = self._rows - self._rows % self._row_group if least else self._rows
        for start in range(0, done, self._row_group):
            self._file.write_table(table.slice(start, min(self._row_group, done - start)).combine_chunks())
        self._waiting, self._rows = [table.slice(done)], self._rows - done


def renew(source: Path, target: Path) -> bool:
    """Write the manifest of an earlier build with the file's present columns and row groups.

    False, and nothing is written, if it has them, or does not say which images a sample holds.
    """
    with pq.ParquetFile(source) as file:
        there = set(file.schema_arrow.names)
        if "images" not in there or set(SPLIT.names) <= there:
            return False
        with ManifestWriter(target) as writer:
            for number in range(file.num_row_groups):
                writer.write(file.read_row_group(number))
    return True


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
        derived = [n for n in (*SPLIT.names, TEXT.name, REJECTED.name) if n in batch.schema.names]
        for row in batch.drop_columns(derived).to_pylist():
            row["scores"] = sorted(row["scores"])  # a map has no order of its own
            rows.update(canonical_json(row).encode() + b"\n")
    names = [[s["name"], s["size"], s["samples"], s["sha256"]] for s in shards]
    return digest("x2i-corpus/1", names, rows.hexdigest())
