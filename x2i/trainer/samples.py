"""What the samples of a stage are like, before a model reads them: from the manifests, or assumed where there are none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from x2i.model.base import Model
from x2i.model.config import ModelConfig
from x2i.model.lengths import Lengths, lengths_of
from x2i.trainer.buckets import nearest
from x2i.trainer.capacity import Lot
from x2i.trainer.flops import StageFlops
from x2i.trainer.index import TRAIN
from x2i.trainer.lengths import COLUMNS, EARLIER, texts, tokens
from x2i.trainer.stage import Stage
from x2i.trainer.table import Cell, Samples, SampleTable

#: Row groups and samples of each task and corpus that are looked at.
_GROUPS, _SAMPLES = 8, 128

#: Of samples that cannot be looked at: tokens of an instruction, and of a conversation.
INSTRUCTION, CONVERSATION = 64, 128

#: Tasks that are conversations, as x2i's builders call them: what is drawn or answered only a manifest can tell.
CHATS = frozenset({"describe", "locate", "count", "read", "classify", "diagnose"})


@dataclass(frozen=True)
class Row:
    """One sample and its lengths: with its condition, and (of pictures) with the condition dropped."""

    lengths: Lengths
    dropped: Lengths | None
    images: int


@dataclass(frozen=True)
class Stratum:
    """Samples of one task in one corpus: their share of the stage's, how many there are, and some of them."""

    task: str
    corpus: str | None
    share: float
    there: int | None
    rows: Sequence[Row]
    dropout: float


@dataclass(frozen=True)
class Mean:
    """Of a stage's samples, the mean of images, tokens, FLOPs, and bytes that the backward pass needs."""

    images: float
    tokens: float
    flops: float
    kept: float

    @classmethod
    def of(cls, strata: Sequence[Stratum], flops: StageFlops) -> Mean:
        """Weighted by what the stage draws."""
        total = np.zeros(4)
        for stratum in strata:
            each = [_weighed(row, stratum.dropout, flops) for row in stratum.rows]
            total += stratum.share * np.mean(each, axis=0)
        return cls(*(float(v) for v in total))


def _weighed(row: Row, dropout: float, flops: StageFlops) -> np.ndarray:
    def one(lengths: Lengths) -> np.ndarray:
        passes = 2 if flops.preference and not lengths.drawn else 1  # with either answer
        count = passes * lengths.tokens
        return np.array([0.0, count, flops.sample(lengths), passes * flops.kept(lengths)])

    full = one(row.lengths)
    if row.dropped is not None:
        full = (1 - dropout) * full + dropout * one(row.dropped)
    full[0] = row.images
    return full


def lot_of(strata: Sequence[Stratum]) -> Lot:
    """A stage's samples as packing sees them."""
    rows = [(row, s.share / len(s.rows), s.dropout, n) for n, s in enumerate(strata) for row in s.rows]
    shown = np.array([r.lengths.sequence + r.lengths.drawn for r, *_ in rows])
    bare = np.array([(r.dropped or r.lengths).sequence + (r.dropped or r.lengths).drawn for r, *_ in rows])
    weight, dropout, kind = (np.array([row[place] for row in rows]) for place in (1, 2, 3))
    return Lot(shown, bare, dropout, weight, kind)


class Shapes:
    """From what a manifest tells to the lengths in a model."""

    def __init__(self, config: ModelConfig, shrink: int, max_text_tokens: int | None) -> None:
        self.config, self._shrink, self._most = config, shrink, max_text_tokens
        self._lengths = lengths_of(config)

    def drawn(self, text: int, inputs: int, size: tuple[int, int]) -> Row:
        """A sample to be drawn, height x width pixels."""
        text = min(text, self._most or text)
        full = self._lengths.drawing(self.config, text, inputs, size, self._shrink)
        return Row(full, self._lengths.drawing(self.config, 1, 0, size, self._shrink), 1 + inputs)

    def chat(self, text: int, sizes: Sequence[tuple[int, int]], shorter: int) -> Row:
        """A conversation about pictures of these sizes, scaled down to this shorter side; all its text is learned."""
        text = min(text, self._most or text)
        shown = [(max(int(h * s), 1), max(int(w * s), 1)) for h, w in sizes for s in (min(1.0, shorter / min(h, w)),)]
        return Row(self._lengths.chatting(self.config, text, text, shown), None, len(sizes))


def of_manifest(table: SampleTable, stage: Stage, shapes: Shapes, notes: list[str]) -> list[Stratum]:
    """A stage's samples as the corpora have them. What they lack is noted, and left out."""
    every = table.samples(TRAIN, stage.mixture_by)
    mixture = {name: weight for name, weight in stage.mixture.items() if len(every.get(name, ()))}
    if lacking := [name for name in stage.mixture if name not in mixture]:
        notes.append(
            f"stage {stage.name}: the corpora have no training samples of {', '.join(lacking)}, and training refuses that; "
            "shares are those of the rest"
        )
    if stage.mixture_unit == "tokens":
        mixture = {
            n: w / float(tokens(every[n].some([*COLUMNS, *EARLIER], _GROUPS), stage).mean()) for n, w in mixture.items()
        }
    whole, found = sum(mixture.values()), []
    for name, weight in mixture.items():
        kinds = sorted({(c.task, c.corpus) for c in table.cells if table.name(c, stage.mixture_by) == name})
        for task, place in kinds:
            samples = table.samples(TRAIN, stage.mixture_by, _only(task, place))[name]
            if len(samples):
                share = weight / whole * len(samples) / len(every[name])
                called = table.name(Cell(place, task, ""), "corpus")
                rows = [_row(r, stage, shapes) for r in _some(samples)]
                found.append(Stratum(task, called, share, len(samples), rows, stage.condition_dropout))
    return found


def _only(task: str, place: int) -> Callable[[Cell], bool]:
    return lambda cell: cell.task == task and cell.corpus == place


def _some(samples: Samples) -> list[dict[str, Any]]:
    """What the manifest says of some of them, evenly spaced over some row groups."""
    rows: pa.Table = samples.some([*COLUMNS, *EARLIER], _GROUPS)
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(_SAMPLES, len(rows))).astype(int))
    rows = rows.take(pa.array(chosen))
    return [r | {"text": max(round(n), 1)} for r, n in zip(rows.to_pylist(), texts(rows).tolist(), strict=True)]


def _row(row: dict[str, Any], stage: Stage, shapes: Shapes) -> Row:
    sizes = [(size["height"], size["width"]) for size in row["input_sizes"]]
    out = row["output_size"]
    if out is None:
        return shapes.chat(row["text"], sizes, stage.side(True))
    size = stage.resolution, stage.resolution
    if stage.buckets:
        place = nearest(np.array([float(out["width"])]), np.array([float(out["height"])]), stage.buckets)[0]
        size = stage.buckets[place][1], stage.buckets[place][0]
    return shapes.drawn(row["text"], len(sizes), size)


def assumed(stage: Stage, shapes: Shapes, model: Model[Any], notes: list[str]) -> list[Stratum]:
    """A stage's samples where they cannot be looked at, by the names of their tasks."""
    notes.append(
        f"assumed of samples: {INSTRUCTION} tokens of text, {CONVERSATION} in a conversation; one input picture, none "
        "for text_to_image, three for few_shot tasks; pictures of conversations are squares; every size of `buckets` as often"
    )
    if stage.mixture_unit == "tokens":
        notes.append(f"stage {stage.name}: its weights are taken as shares of samples, not of tokens")
    whole, side = sum(stage.mixture.values()), stage.side(True)
    found = []
    for name, weight in stage.mixture.items():
        if not model.draws or (model.answers and name in CHATS):
            rows = [shapes.chat(CONVERSATION, [(side, side)], side)]
        else:
            inputs = 0 if name == "text_to_image" else 3 if name.startswith("few_shot") else 1
            sizes = [(h, w) for w, h in stage.buckets] or [(stage.resolution, stage.resolution)]
            rows = [shapes.drawn(INSTRUCTION, inputs, size) for size in sizes]
        task = name if stage.mixture_by == "task" else f"{stage.mixture_by} {name}"
        found.append(Stratum(task, None, weight / whole, None, rows, stage.condition_dropout))
    return found
