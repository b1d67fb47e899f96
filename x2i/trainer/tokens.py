"""The tokenizer of a run: a given one, or a byte-level BPE trained on the corpus's own instructions."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from x2i.base.errors import RecipeError, X2IError
from x2i.base.weights import Weights
from x2i.model.base import Processor
from x2i.trainer.config import TokenizerSpec, TokenizerTraining
from x2i.trainer.data import DamagedSample, SampleReader

log = logging.getLogger(__name__)

FILE = "tokenizer.json"


def build(
    spec: TokenizerSpec, reader: SampleReader, processor: type[Processor[Any]], tasks: Collection[str]
) -> Tokenizer:
    """The run's tokenizer, given or trained on the texts of its tasks, with the chat around them.

    Raises:
        RecipeError: a given one lacks what the model's chat needs.
    """
    if spec.train is not None:
        texts = (processor.learned_text(text) for text in texts_of(reader, spec.train.samples, tasks))
        return train(texts, spec.train, processor.special_tokens, processor.begin)
    assert spec.path is not None
    tokenizer = load(spec.path)
    missing = [t for t in processor.needed_tokens if tokenizer.token_to_id(t) is None]
    if missing:
        raise RecipeError(f"tokenizer: {spec.path} lacks the special tokens {', '.join(missing)}")
    return tokenizer


def load(path: str | Path) -> Tokenizer:
    """Read tokenizer.json from a file, a folder or a hub id. Raises X2IError."""
    place = Path(path)
    file = place / FILE if place.is_dir() else place if place.is_file() else Weights(f"{path}:{FILE}").fetch()
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        raise X2IError(f"{file}: not a tokenizer of the tokenizers library ({error})") from None


def texts_of(reader: SampleReader, limit: int, tasks: Collection[str]) -> Iterable[str]:
    """At most `limit` instructions or conversations, evenly spaced over the samples of some tasks; no damaged ones.

    Of many, neighbours are taken together, so that a large manifest is read in a thousand places and not in more.
    """
    table = reader.table
    parts = [part[task] for part in (table.train, table.held_out) for task in table.tasks if task in tasks]
    ends = np.cumsum([len(part) for part in parts])
    total = int(ends[-1]) if parts else 0
    together = max(limit // 1024, 1) if limit < total else 1
    anchors = np.linspace(0, total - together, min(limit, total) // together).astype(int)
    damaged = 0
    for place in np.unique(np.add.outer(anchors, np.arange(together))):
        part = int(np.searchsorted(ends, place, "right"))
        sample = parts[part][int(place) - int(ends[part])]
        try:
            yield reader.text(sample)
        except DamagedSample as damage:
            damaged += 1
            ref, level = table[sample], logging.WARNING if damaged == 1 else logging.INFO
            log.log(level, "left out of the tokenizer's text: sample %s in %s: %s", ref.key, ref.shard, damage)
    if damaged > 1:
        log.warning("left out of the tokenizer's text: %d samples more", damaged - 1)


def train(
    texts: Iterable[str], options: TokenizerTraining, special: Sequence[str], begin: str | None = None
) -> Tokenizer:
    """A byte-level BPE over these texts: the same texts give the same tokenizer, and every text can be encoded.

    Args:
        texts: to learn from.
        options: how many tokens.
        special: single tokens with the first ids, in this order.
        begin: the one of them that every text begins with, if any.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if begin is not None:
        first = (begin, tokenizer.token_to_id(begin))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[first])
    return tokenizer
