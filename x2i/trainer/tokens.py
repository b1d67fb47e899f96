"""The tokenizer of a run: a given one, or a byte-level BPE trained on the corpus's own instructions."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from x2i.base.errors import RecipeError, X2IError
from x2i.base.weights import Weights
from x2i.model.prompt import HEAD
from x2i.trainer.config import TokenizerSpec, TokenizerTraining
from x2i.trainer.data import DamagedSample, SampleReader

log = logging.getLogger(__name__)

FILE = "tokenizer.json"
#: Ids 0, 1 and 2 as in the published tokenizer; the chat's tokens after them.
SPECIAL = ("<unk>", "<s>", "</s>", "<|user|>", "<|end|>", "<|assistant|>", "<|diffusion|>", "<img>", "</img>", "<cfg>")


def build(spec: TokenizerSpec, reader: SampleReader) -> Tokenizer:
    """The run's tokenizer, given or trained. Raises RecipeError if a given one lacks the chat's tokens."""
    if spec.train is not None:
        texts = (HEAD + text for text in instructions(reader, spec.train.samples))  # the chat is learned too
        return train(texts, spec.train)
    assert spec.path is not None
    tokenizer = load(spec.path)
    missing = [t for t in SPECIAL[3:] if tokenizer.token_to_id(t) is None]
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


def instructions(reader: SampleReader, limit: int) -> Iterable[str]:
    """At most `limit` instructions, evenly spaced over the table; damaged samples are left out."""
    count = len(reader.table)
    for index in np.unique(np.linspace(0, count - 1, min(limit, count)).astype(int)):
        try:
            yield reader.instruction(int(index))
        except DamagedSample as damage:
            log.warning("left out of the tokenizer's text: %s", damage)


def train(texts: Iterable[str], options: TokenizerTraining) -> Tokenizer:
    """A byte-level BPE over these texts: the same texts give the same tokenizer, and every text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer
