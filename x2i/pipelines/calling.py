"""Calling an annotator: batches, halved where memory runs out or a row breaks it; a row per item comes back, whatever happens."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from x2i.base.errors import X2IError
from x2i.pipelines.annotators.base import Annotator, Batch, Item
from x2i.pipelines.sources.base import Problem

log = logging.getLogger(__name__)


@dataclass
class Called:
    """What an annotator gave for some items: a table of their values, and a problem per item that has none."""

    values: pa.Table
    problems: list[Problem | None]
    calls: list[tuple[int, float]] = field(default_factory=list)  # rows and seconds of each call that went well


def call(annotator: Annotator, items: Sequence[Item], columns: pa.Table) -> Called:
    """Values for each item, in order; nulls and the problem where there are none.

    Args:
        columns: a row per item of what the annotator reads.

    Raises:
        X2IError: what the annotator says of its own set-up (a server that is gone), not of a row.
        TypeError: it breaks its contract (another number of rows, other columns).
    """
    made: list[pa.Table] = []
    calls: list[tuple[int, float]] = []
    problems: list[Problem | None] = []
    at: list[int | None] = []
    count = 0
    for table, problem, seconds in _batches(annotator, Batch(items, columns)):
        if problem is None:
            made.append(_checked(annotator, table))
            calls.append((table.num_rows, seconds))
            at += range(count, count + table.num_rows)
            problems += [None] * table.num_rows
            count += table.num_rows
        else:
            at.append(None)
            problems.append(problem)
    schema = annotator.columns
    values = pa.concat_tables(made) if made else schema.empty_table()
    return Called(values.take(pa.array(at, pa.int64())), problems, calls)


def _batches(annotator: Annotator, batch: Batch) -> Iterator[tuple[pa.Table, Problem | None, float]]:
    """(table, None) for a run of items that went well, (anything, problem) for one that did not; in order."""
    start = 0
    while start < len(batch):
        size = min(annotator.config.batch_size, annotator.fits or annotator.config.batch_size)
        yield from _try(annotator, _part(batch, start, min(size, len(batch) - start)))
        start += size


def _try(annotator: Annotator, batch: Batch) -> Iterator[tuple[pa.Table, Problem | None, float]]:
    began = time.perf_counter()
    try:
        table = annotator(batch)
    except X2IError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever an annotator raises on an image is that image's problem
        full = out_of_memory(error)
        said = f"{annotator.name}: {type(error).__name__}: {error}"
        if len(batch) == 1:
            log.warning("%s failed on image %s: %s", annotator.name, batch[0].image_id, said)
            yield annotator.columns.empty_table(), Problem("out_of_memory" if full else "annotator_failed", said), 0.0
            return
        half = len(batch) // 2
        if full:
            log.warning("%s: a batch of %d does not fit into memory; trying %d", annotator.name, len(batch), half)
            annotator.fits = half
            _free()
        del error  # its traceback holds the batch's tensors
    else:
        if table.num_rows != len(batch):
            raise TypeError(f"annotator {annotator.name} gave {table.num_rows} rows for {len(batch)} items")
        yield table, None, time.perf_counter() - began
        return
    yield from _try(annotator, _part(batch, 0, half))
    yield from _try(annotator, _part(batch, half, len(batch) - half))


def _part(batch: Batch, start: int, size: int) -> Batch:
    return Batch(list.__getitem__(batch, slice(start, start + size)), batch.columns.slice(start, size))


def _checked(annotator: Annotator, table: pa.Table) -> pa.Table:
    missing = [n for n in annotator.columns.names if n not in table.column_names]
    if missing:
        raise TypeError(f"annotator {annotator.name} gave no column {', '.join(missing)}")
    return table.select(annotator.columns.names).cast(annotator.columns)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: Python's, torch's, or onnxruntime's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in text for words in ("out of memory", "failed to allocate memory", "can't allocate memory")
    )


def _free() -> None:
    import gc
    import sys

    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
