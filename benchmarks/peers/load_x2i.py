"""x2i's loader over the benchmark's corpus: threads of one process. It imports no PyTorch; the trainer's process does.

python load_x2i.py x2i|x2i_torch DATA SIDE MODE THREADS WARM SAMPLES KEPT
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import loading
import numpy as np

from x2i import corpus
from x2i.trainer.config import Reading
from x2i.trainer.data import SampleReader
from x2i.trainer.loader import Loader
from x2i.trainer.mixture import plan_of
from x2i.trainer.speed import Undecoded
from x2i.trainer.stage import Stage
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
            made = np.array([len(e.instruction) for e in examples])
        else:
            made = np.stack([e.output for e in examples if e.output is not None])
        del examples  # as the peers' workers let go of the crops that they put together
        yield keys, made


def main(peer: str, data: str, side: str, mode: str, threads: str, warm: str, samples: str, kept: str) -> None:
    """Time it."""
    made = batches(Path(data), int(side), mode, int(threads))
    if peer == "x2i_torch":
        import torch

        torch.set_num_threads(1)
        made = ((keys, torch.from_numpy(pixels)) for keys, pixels in made)
    loading.measure(made, int(warm), int(samples), kept)
    if (peer == "x2i_torch") != ("torch" in sys.modules):
        raise RuntimeError("PyTorch was imported")


if __name__ == "__main__":
    main(*sys.argv[1:])
