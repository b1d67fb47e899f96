"""Tables beside images, in the form of Hugging Face's imagefolder (`metadata.{jsonl,csv,parquet}`) or of one's own."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from x2i.pipelines.sources._text import Malformed, jsonable, parse_object

NAMES = frozenset(["metadata.jsonl", "metadata.csv", "metadata.parquet"])

#: The column that names the image, relative to the metadata file's folder.
FILE_NAME = "file_name"


#: Endings of files that can be read as a table.
ENDINGS = ("jsonl", "csv", "tsv", "txt", "parquet")


def records(name: str, data: bytes, key: str = FILE_NAME) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield (line or row number from 1, record), or in the record's place the reason why it has none.

    Number 0 stands for the file as a whole. A record's values are JSON types; it has the column `key`, the image's name.
    """
    ending = name.rpartition(".")[2].lower()
    if ending == "jsonl":
        found = _jsonl(data)
    elif ending == "parquet":
        found = _parquet(data, key)
    else:
        found = _csv(data, key, "\t" if ending == "tsv" else ",")
    for number, record in found:
        if not isinstance(record, dict):
            yield number, record
        elif not isinstance(record.get(key), str) or not record[key].strip():
            yield number, f"no '{key}'"
        else:
            yield number, record


def _jsonl(data: bytes) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, parse_object(line)
        except Malformed as error:
            yield number, str(error)


def _csv(data: bytes, key: str, delimiter: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), delimiter=delimiter)
        header = reader.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as error:
        yield 0, f"not CSV in UTF-8: {error}"
        return
    if key not in header:
        yield 0, f"no column '{key}' in the header, which has {', '.join(header) or 'none'}"
        return
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.line_num, f"not CSV: {error}"
            continue
        extra = row.pop(None, None)
        yield reader.line_num, jsonable(row) if extra is None else f"{len(extra)} fields more than the header has"


def _parquet(data: bytes, key: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        yield 0, f"not Parquet: {error}"
        return
    if key not in table.column_names:
        yield 0, f"no column '{key}'; there are {', '.join(table.column_names)}"
        return
    number = 0
    for batch in table.to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            number += 1
            yield number, jsonable(row)
