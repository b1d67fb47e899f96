"""Conversations in ChatML, as Qwen's models and both Ovis families write them: token ids, image places and labels.

    <|im_start|>user
    <image>
    What is it?<|im_end|>
    <|im_start|>assistant
    A cat.<|im_end|>

- text between `<image>` marks is tokenised piece by piece; each mark becomes one `IMAGE` id, for the caller to expand
- learned are the words of the assistant up to and with <|im_end|>; the newline after it is not
- Qwen3 writes an empty think block in front of every answer, which is not learned either

Sources: QwenConversationFormatter of AIDC-AI/Ovis (Ovis2: a default system message), Qwen3ConversationFormatter of the
published code of AIDC-AI/Ovis-U1-3B (no system message, the empty think block, no newline after the last answer).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from x2i.base.errors import X2IError
from x2i.model.base import Message
from x2i.model.placeholders import ControlWords

MARK = "<image>"
#: Id of the place of an image, and label of what is not learned.
IMAGE, IGNORE = -200, -100
START, END = "<|im_start|>", "<|im_end|>"
EMPTY_THINK = "<think>\n\n</think>\n\n"
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Formatted:
    """A conversation's ids, `IMAGE` at each image, and its labels, `IGNORE` where nothing is learned; equally long."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]


class ChatML:
    """Turns conversations into ids.

    Args:
        tokenizer: must know <|im_start|> and <|im_end|> (and <think>, </think> with a think block) as single tokens.
        system: message that a conversation without one begins with; None: it begins without.
        think: what stands in front of every answer: `EMPTY_THINK` for Qwen3.
        last_newline: whether the newline after the last answer is kept.

    Raises:
        X2IError: the tokenizer lacks a special token.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, system: str | None = None, think: str = "", last_newline: bool = True
    ) -> None:
        needed = (START, END, *(m for m in ("<think>", "</think>") if m in think))
        if missing := [t for t in needed if tokenizer.token_to_id(t) is None]:
            raise X2IError(f"the tokenizer lacks the special tokens {', '.join(missing)}: take one that has them")
        self.tokenizer = tokenizer
        self.control = ControlWords(tokenizer)
        self.system = system
        self.think = think
        self.last_newline = last_newline

    def learn(self, messages: Sequence[Message]) -> Formatted:
        """A whole conversation, its answers with labels.

        Raises:
            X2IError: no message, a role that is not known, or no turn of the assistant.
        """
        if not any(m.role == "assistant" for m in messages):
            raise X2IError("a conversation to be learned has no turn of the assistant: nothing in it is learned")
        whole = self._whole(messages)
        return self._join([self._turn(m, last=i == len(whole) - 1) for i, m in enumerate(whole)])

    def ask(self, messages: Sequence[Message], *, reply: bool = True) -> Formatted:
        """A conversation to be answered, without labels.

        Args:
            messages: up to the question.
            reply: end with the head of the assistant's turn, where the answer begins. Without it the conversation
                ends behind the last message, as prompts of pictures do.

        Raises:
            X2IError: no message, a role that is not known, or a last turn of the assistant where a reply is asked for.
        """
        if reply and messages and messages[-1].role == "assistant":
            raise X2IError("a conversation to be answered ends with a turn of the assistant: end it with the user's")
        turns = [self._turn(m, last=False) for m in self._whole(messages)]
        if reply:
            turns.append(self._encode(self._head("assistant"), 0, 0))
        both = self._join(turns)
        return Formatted(both.ids, (IGNORE,) * len(both.ids))

    def text(self, messages: Sequence[Message]) -> str:
        """The conversation as one string."""
        return "".join(self._head(m.role) + m.text + END + "\n" for m in self._whole(messages))

    def _whole(self, messages: Sequence[Message]) -> list[Message]:
        if not messages:
            raise X2IError("a conversation without messages: give at least one")
        if strange := {m.role for m in messages} - set(ROLES):
            raise X2IError(f"unknown role {', '.join(sorted(strange))} in a conversation; known: {', '.join(ROLES)}")
        if self.system is None or messages[0].role == "system":
            return list(self.control.in_messages(messages))
        return [Message("system", self.system), *self.control.in_messages(messages)]

    def _head(self, role: str) -> str:
        return f"{START}{role}\n{self.think if role == 'assistant' else ''}"

    def _turn(self, message: Message, last: bool) -> Formatted:
        head = self._head(message.role)
        body = head + message.text + END
        if message.role != "assistant":
            return self._encode(body + "\n", 0, 0)
        return self._encode(body + ("" if last and not self.last_newline else "\n"), len(head), len(body))

    def _encode(self, text: str, begin: int, end: int) -> Formatted:
        """Ids of a text; learned are the tokens that begin within its characters from `begin` to `end`."""
        ids: list[int] = []
        labels: list[int] = []
        at = 0
        for i, piece in enumerate(text.split(MARK)):
            if i:
                ids.append(IMAGE)
                labels.append(IGNORE)
                at += len(MARK)
            found = self.tokenizer.encode(piece, add_special_tokens=False)
            ids += found.ids
            for token, (first, _) in zip(found.ids, found.offsets, strict=True):
                labels.append(token if begin <= at + first < end else IGNORE)
            at += len(piece)
        return Formatted(tuple(ids), tuple(labels))

    @staticmethod
    def _join(parts: Sequence[Formatted]) -> Formatted:
        ids = tuple(i for part in parts for i in part.ids)
        return Formatted(ids, tuple(label for part in parts for label in part.labels))
