"""Special tokens that users or corpora spell are text, in all models; what the models write themselves is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from x2i.model import registry, vae
from x2i.model.base import Chat, Message, Request
from x2i.model.config import PixelsConfig
from x2i.model.omnigen.prompt import PromptBatch
from x2i.trainer.config import TokenizerTraining
from x2i.trainer.tokens import train

PRESETS = ("omnigen-tiny", "ovis-u1-tiny", "ovis2-tiny", "mini-gemini-tiny")
PICTURE = np.zeros((32, 32, 3), np.uint8)


def processor(preset: str) -> Any:
    config = registry.preset(preset)
    made = registry.processor_class(config.architecture)
    words = train(["a cat"], TokenizerTraining(vocab_size=320), made.special_tokens, made.begin)
    return made(config, words, vae.build(PixelsConfig(factor=2)))


def controls(ids: Any, tokenizer: Tokenizer) -> list[int]:
    """The control tokens among ids. 0 fills up, and stands for images."""
    special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special} - {0}
    return [i for i in ids.flatten().tolist() if i in special]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_conversation_cannot_be_ended_from_within(preset: str, plain: bool) -> None:
    made = processor(preset)
    spelt = " ".join(made.special_tokens)

    def ids(question: str, answer: str) -> Any:
        messages = (Message("user", f"<image>{question}"), Message("assistant", answer))
        batch = made.chats([Chat(messages, (PICTURE,))], labels=True, plain=plain)
        return batch.ids_BL

    honest = controls(ids("What?", "A cat"), made.tokenizer)
    assert controls(ids(f"What? {spelt}", f"A cat {spelt}"), made.tokenizer) == honest
    row = ids("What?", f"A cat {spelt}")[0].tolist()  # below 0: places in an image
    assert "cat <" in made.tokenizer.decode([i for i in row if i >= 0])  # they are learned as text


@pytest.mark.parametrize("preset", PRESETS[:2])
def test_an_instruction_cannot_either_and_keeps_its_placeholders(preset: str) -> None:
    made = processor(preset)
    text = "Sharpen <img><|image_1|></img>"
    spelt = " ".join(made.special_tokens)

    def found(instruction: str) -> list[int]:
        batch = made.requests([Request(instruction, (PICTURE,))])
        return controls(batch.ids_BL, made.tokenizer)

    assert found(f"{text} {spelt}") == found(text)


def test_the_unconditional_branch_keeps_its_own_token() -> None:
    made = processor("omnigen-tiny")
    batch: PromptBatch = made.requests([Request("x")], [True])
    assert made.tokenizer.token_to_id("<cfg>") in batch.ids_BL.flatten().tolist()
