"""Conversations become the token ids and labels of the published formatters."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from x2i.base.errors import X2IError
from x2i.model.base import Message
from x2i.model.layers.chat import EMPTY_THINK, IGNORE, IMAGE, ChatML, Formatted

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
TALK = (
    Message("user", "<image>\nWhat is it?"),
    Message("assistant", "A cat, 猫."),
    Message("user", "And <image> this?"),
    Message("assistant", "A dog."),
)


def byte_tokenizer(special: tuple[str, ...] = SPECIAL) -> Tokenizer:
    """One token per byte, but for two newlines together; as Qwen's, it does not cut text at newlines beforehand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet, "ĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


def spoken(tokenizer: Tokenizer, ids: tuple[int, ...]) -> str:
    """The text of ids, with <image> in its places."""
    texts: list[list[int]] = [[]]
    for token in ids:
        if token == IMAGE:
            texts.append([])
        else:
            texts[-1].append(token)
    return "<image>".join(tokenizer.decode(part, skip_special_tokens=False) for part in texts)


def learned(tokenizer: Tokenizer, words: Formatted) -> list[str]:
    """The runs of learned tokens, as text."""
    runs: list[list[int]] = [[]]
    for token, label in zip(words.ids, words.labels, strict=True):
        assert label in (IGNORE, token)
        if label != IGNORE:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs if run]


def test_qwen3_as_ovis_u1_learns_it(tokenizer: Tokenizer) -> None:
    """Qwen3ConversationFormatter of AIDC-AI/Ovis-U1-3B: an empty think block, no newline at the very end."""
    words = ChatML(tokenizer, think=EMPTY_THINK, last_newline=False).learn(TALK)
    assert spoken(tokenizer, words.ids) == (
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nA cat, 猫.<|im_end|>\n"
        "<|im_start|>user\nAnd <image> this?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nA dog.<|im_end|>"
    )
    assert learned(tokenizer, words) == ["A cat, 猫.<|im_end|>", "A dog.<|im_end|>"]


def test_qwen2_as_ovis2_learns_it(tokenizer: Tokenizer) -> None:
    """QwenConversationFormatter of AIDC-AI/Ovis at Ovis2: a system message where there is none, all newlines."""
    words = ChatML(tokenizer, system="You are a helpful assistant.").learn(TALK[:2])
    assert spoken(tokenizer, words.ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\nA cat, 猫.<|im_end|>\n"
    )
    assert learned(tokenizer, words) == ["A cat, 猫.<|im_end|>"]
    given = ChatML(tokenizer, system="S").learn((Message("system", "Be brief."), *TALK[:2]))
    assert spoken(tokenizer, given.ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_a_question_ends_where_the_answer_begins(tokenizer: Tokenizer) -> None:
    chat = ChatML(tokenizer, think=EMPTY_THINK, last_newline=False)
    asked = chat.ask(TALK[:1])
    assert spoken(tokenizer, asked.ids) == (
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert set(asked.labels) == {IGNORE} and len(asked.labels) == len(asked.ids)
    assert chat.learn(TALK[:2]).ids[: len(asked.ids)] == asked.ids
    unanswered = chat.ask(TALK[:1], reply=False)
    assert spoken(tokenizer, unanswered.ids) == "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
    assert chat.text(TALK[:1]) == "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"


@pytest.mark.parametrize(
    ("answer", "runs"),
    [
        ("", ["<|im_end|>"]),
        ("\nyes", ["\nyes<|im_end|>"]),  # after the think block's two newlines, which are one token
        ("a<image>b", ["a", "b<|im_end|>"]),  # an image is never learned
        ("two\n\n", ["two\n\n<|im_end|>"]),
    ],
)
def test_where_learning_begins(tokenizer: Tokenizer, answer: str, runs: list[str]) -> None:
    for last_newline in (False, True):
        chat = ChatML(tokenizer, think=EMPTY_THINK, last_newline=last_newline)
        assert learned(tokenizer, chat.learn((TALK[0], Message("assistant", answer)))) == runs


def test_a_token_across_the_edge_is_not_learned(tokenizer: Tokenizer) -> None:
    """The newline of the head and one that begins the answer are one token here."""
    words = ChatML(tokenizer).learn((TALK[0], Message("assistant", "\nyes")))
    assert learned(tokenizer, words) == ["yes<|im_end|>"]


def test_spans_without_their_blanks(tokenizer: Tokenizer) -> None:
    """Some tokenizers leave the blanks out of a token's span."""
    trimming = byte_tokenizer()
    trimming.post_processor = processors.ByteLevel(trim_offsets=True)
    assert ChatML(trimming).learn(TALK) == ChatML(tokenizer).learn(TALK)


def test_a_token_in_front_of_every_text_is_left_out(tokenizer: Tokenizer) -> None:
    begun = byte_tokenizer()
    begun.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[(SPECIAL[0], 0)])
    assert ChatML(begun).learn(TALK) == ChatML(tokenizer).learn(TALK)


def test_what_cannot_be_formatted(tokenizer: Tokenizer) -> None:
    chat = ChatML(tokenizer)
    with pytest.raises(X2IError, match="without messages"):
        chat.ask(())
    with pytest.raises(X2IError, match="unknown role robot"):
        chat.ask((Message("robot", "x"),))
    with pytest.raises(X2IError, match="no turn of the assistant"):
        chat.learn(TALK[:1])
    with pytest.raises(X2IError, match="ends with a turn of the assistant"):
        chat.ask(TALK)
    with pytest.raises(X2IError, match="lacks the special tokens <think>, </think>"):
        ChatML(byte_tokenizer(SPECIAL[:3]), think=EMPTY_THINK)
