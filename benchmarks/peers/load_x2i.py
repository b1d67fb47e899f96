"""x2i's loader over the benchmark's corpus, as the trainer has it: in threads of one process, which holds PyTorch.

python load_x2i.py x2i DATA SIDE MODE THREADS WARM SAMPLES KEPT
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import loading
import numpy as np
import torch

from x2i import corpus
from x2i.trainer.config import Reading, Stage
from x2i.trainer.data import SampleReader
from x2i.trainer.loader import Loader
from x2i.trainer.mixture import plan_of
from x2i.trainer.speed import Undecoded
from x2i.trainer.table import SampleTable


def batches(data: Path, side: int, mode: str, threads: int) -> Iterator[tuple[list[str], Any]]:
    """The steps of a stage; nothing is kept from one epoch to the next."""
    content = {"name": "bench", "resolution": side, "steps": 1 << 20, "batch": loading.BATCH, "lr": 1.0}
    stage = Stage.model_validate(content | {"mixture": {"text_to_image": 1}})
    table = SampleTable([corpus.open(data / "corpus")], 0.0)
    reader = Undecoded(table) if mode == "none" else SampleReader(table, 0, mode)  # type: ignore[arg-type]
    reading = Reading(threads=threads, prefetch=2, prefetch_mib=32)  # two batches ahead, as the peers' workers have
    for examples in Loader(reader, plan_of(table, stage, 0), stage, 0, reading):
        keys = [e.key for e in examples]
        if mode == "none":
            yield keys, torch.tensor([len(e.instruction) for e in examples])
        else:
            yield keys, torch.from_numpy(np.stack([e.output for e in examples if e.output is not None]))


def main(_: str, data: str, side: str, mode: str, threads: str, warm: str, samples: str, kept: str) -> None:
    """Time it."""
    torch.set_num_threads(1)
    loading.measure(batches(Path(data), int(side), mode, int(threads)), int(warm), int(samples), kept)


if __name__ == "__main__":
    main(*sys.argv[1:])
