"""One step of a run again: its samples, noise and timesteps, without running the steps before.

A step's batch is a pure function of the run's record and its corpora, so that nothing needs to have been kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from x2i import corpus
from x2i.base.config import parse_config
from x2i.base.errors import X2IError
from x2i.model import flow
from x2i.model.pixels import to_images
from x2i.trainer import checkpoint, record
from x2i.trainer.batch import Batch, ChatBatch
from x2i.trainer.config import RunConfig
from x2i.trainer.preview import Row
from x2i.trainer.setup import Setup


@dataclass(frozen=True)
class Replayed:
    """One sample of the step: `t` is a picture's timestep, `dropped` says that its condition was left out."""

    draw: int
    key: str
    task: str
    corpus: str
    t: float | None
    dropped: bool
    replaced: str | None


def open_run(output: Path, step: int | None = None) -> Setup:
    """The setup of a run, from the record in its folder; for `step`, on the corpora that this step was trained on.

    Raises:
        X2IError: there is no run, or no checkpoint yet, or these corpora have changed.
    """
    told = record.read(output)
    named = record.corpora_at(told, step)
    content = told["config"] | {"corpora": [c["path"] for c in named], "output": str(output)}
    run = parse_config(RunConfig, content, str(output / record.FILE))
    found = checkpoint.all_of(output)
    if not found:
        raise X2IError(f"{output}: no checkpoint yet, and so no tokenizer: let the run write one first")
    corpora = [corpus.open(path) for path in run.corpora]
    for opened, digest in zip(corpora, (c["digest"] for c in named), strict=True):
        if opened.digest != digest:
            when = (
                "since the run began"
                if named == told["corpora"]
                else f"since, and the run went on with others (--reconcile) after step {told['changes'][-1]['step']}"
            )
            raise X2IError(
                f"{opened.path}: the corpus has changed {when}: its digest was {digest[:12]}, now it is "
                f"{opened.digest[:12]}. With other samples the order is another; put the old corpus back to replay"
            )
    return Setup(run, corpora, found[-1])


def replay(setup: Setup, step: int) -> tuple[list[Batch], list[Replayed]]:
    """The batches of step `step` (from 1, over all stages), and what is in them.

    Raises:
        X2IError: the run has no such step, or it was trained on other corpora than those of the setup.
    """
    if not 1 <= step <= setup.run.total_steps:
        raise X2IError(f"step {step}: the run has steps 1 to {setup.run.total_steps}")
    at = [c["digest"] for c in record.corpora_at(record.read(setup.run.output), step)]
    if at != [c.digest for c in setup.table.corpora]:
        raise X2IError(
            f"step {step}: it was trained on the corpora as they were before they changed (--reconcile): open the run for "
            "this step"
        )
    place, number = setup.run.locate(step - 1)
    batches = setup.batches(place, number)
    rows = []
    for batch in batches:
        times: list[float | None] = [] if isinstance(batch, ChatBatch) else batch.t.tolist()
        dropped = () if isinstance(batch, ChatBatch) else batch.dropped
        for example, t, drop in zip_longest(batch.examples, times, dropped):
            where = str(setup.table[example.sample].corpus.path)
            rows.append(Replayed(example.draw, example.key, example.task, where, t, bool(drop), example.replaced))
    return batches, sorted(rows, key=lambda r: r.draw)


@torch.no_grad()
def picture_rows(setup: Setup, batches: list[Batch]) -> list[Row]:
    """What the model was shown, to be drawn by `preview.grid`: of pictures their noisy form beside the target."""
    rows: list[tuple[int, Row]] = []
    for batch in batches:
        pictures = [] if isinstance(batch, ChatBatch) else batch.examples[: len(batch.t)]
        for place, example in enumerate(pictures):
            assert not isinstance(batch, ChatBatch)
            t = batch.t[place : place + 1]
            noisy = flow.interpolate(batch.noise[place][None], batch.data[place][None], t)
            drop = batch.dropped[place]
            label = f"{example.task} · t = {float(t):.3f}" + (" · condition dropped" if drop else "")
            inputs = () if drop else example.inputs
            words = "" if drop else example.instruction
            shown = to_images(setup.vae.decode(noisy))[0]
            rows.append((example.draw, Row(label, words, inputs, shown, example.output, "noisy")))
        for example in batch.examples[len(pictures) :]:
            question = " ".join(m.text for m in example.messages[:-1]).replace("<image>", "").strip()
            answer = example.messages[-1].text
            rows.append((example.draw, Row(example.task, question, example.inputs, "", answer)))
    return [row for _, row in sorted(rows, key=lambda r: r[0])]


def as_dicts(rows: list[Replayed]) -> list[dict[str, Any]]:
    """JSON types only."""
    return [vars(row) for row in rows]
