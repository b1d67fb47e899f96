"""Tokens of the texts that a stage draws, each counted by the run's own tokenizer, once: packs need no margin then.

The counts lie in the run's folder, some row groups to a file. Ranks begin at different files and take what others have
counted, so that they share the work, and a run that was killed goes on counting where it was. What is there is never
counted again: a text that cannot be read any more must not change the plan of a run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from x2i.base.errors import X2IError
from x2i.base.files import atomic, in_turn
from x2i.trainer.table import SampleTable
from x2i.trainer.world import turn

#: Rows of a file, about.
_ROWS = 4096

#: Seconds between two words about how far it has come.
_TELL = 15.0


def counted(
    table: SampleTable,
    tasks: Collection[str],
    count: Callable[[int], int | None],
    folder: Path | None,
    note: Callable[[str], None],
) -> np.ndarray:
    """Tokens of each sample's text, int32 [samples of the table]; -1 for other tasks, and where it cannot be read.

    Args:
        tasks: whose samples are counted, those that are held out too.
        count: tokens of the text of a sample (its number in the table); None if it cannot be read.
        folder: where to keep the counts, and to find them.
        note: is told how far it has come, now and then.

    Raises:
        X2IError: a file of counts is damaged.
    """
    codes = np.array([cell.task in tasks for cell in table.cells])
    ends = np.cumsum(table.sizes)
    parts = np.split(np.arange(len(ends)), np.flatnonzero(np.diff((ends - table.sizes) // _ROWS)) + 1)
    out, begun, told = np.full(len(table), -1, np.int32), time.monotonic(), 0.0
    first = int(turn() * len(parts))
    for done, place in enumerate([*range(first, len(parts)), *range(first)]):
        groups = parts[place].tolist()
        begin, end = table.first(groups[0]), int(ends[groups[-1]])
        file = None if folder is None else folder / f"{groups[0]:07d}.npy"
        if file is None or not file.is_file():
            kinds = np.concatenate([table.kinds(group) for group in groups])
            for row in np.flatnonzero(codes[kinds // 3]).tolist():
                found = count(begin + row)
                out[begin + row] = -1 if found is None else found
            if file is not None:
                _keep(file, out[begin:end])
        if file is not None:  # what was kept, which another rank may have written
            out[begin:end] = _read(file, end - begin)
        passed = time.monotonic() - begun
        if passed - told > _TELL:
            told = passed
            note(f"counting the tokens of texts, once: {done + 1} of {len(parts)} parts after {passed:.0f} s")
    return out


def _keep(file: Path, counts: np.ndarray) -> None:
    """Write a file, if there is none yet."""
    with in_turn(file.parent):
        if not file.is_file():
            with atomic(file) as temporary, temporary.open("wb") as opened:
                np.save(opened, counts)


def _read(file: Path, rows: int) -> np.ndarray:
    try:
        with file.open("rb") as opened:
            found = np.lib.format.read_array(opened, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise X2IError(f"{file}: cannot be read ({error}). Remove it to count its texts anew") from None
    if found.shape != (rows,) or found.dtype != np.int32:
        raise X2IError(
            f"{file}: has {found.shape} counts ({found.dtype}), and {rows} are wanted. Remove it to count its texts anew"
        )
    return np.asarray(found)
