"""How conversations are written for Mini-Gemini's language models, and which of their characters are learned.

    gemma       <start_of_turn>user ⏎ … <end_of_turn> ⏎ <start_of_turn>model ⏎ … <end_of_turn> ⏎ <eos>
    vicuna_v1   A chat between … questions. USER: … ASSISTANT: …</s>USER: …
    llama_3     headers and <|eot_id|>; the assistant's header says "system", as MGM's does
    plain       the images, then the caption and a newline: alignment of Vicuna

Learned are the assistant's words and what ends its turn. Source: dvlab-research/MGM, mgm/conversation.py and the
preprocess functions of mgm/train/train.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from x2i.base.errors import X2IError
from x2i.model.base import Message
from x2i.model.mini_gemini.config import TemplateName

MARK = "<image>"
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAMA_3 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True)
class Written:
    """A conversation as one string; `learned` are the ranges of its characters that are learned."""

    text: str
    learned: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Template:
    """Strings around the messages of a conversation.

    Attributes:
        system: default system message; `system_head` and `system_tail` stand around it.
        user, assistant: heads of turns; `user_tail` and `assistant_tail` end them.
        special: tokens that the tokenizer must know.
        stop: strings that end an answer where the tokenizer has one token for them.
        plain: of users' messages only the images are written.
    """

    user: str
    user_tail: str
    assistant: str
    assistant_tail: str
    system: str = ""
    system_head: str = ""
    system_tail: str = ""
    special: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    plain: bool = False

    def write(self, messages: Sequence[Message], reply: bool) -> Written:
        """Write a conversation; with `reply`, up to where the assistant's next answer begins.

        The images of a message stand in front of its words, each on a line of its own; where a conversation has
        several, they are numbered.

        Raises:
            X2IError: there is no message, or its roles are not system (first, or never), user, assistant, user …
        """
        system, turns = self._turns(messages, reply)
        text, learned, number = "", [], 0
        if system and not self.plain:
            text = self.system_head + system + self.system_tail
        several = sum(m.text.count(MARK) for m in turns) > 1
        for turn in turns:
            count = turn.text.count(MARK)
            words = turn.text.replace(MARK, "").strip() if count else turn.text
            places = [f"Image {number + i + 1}:{MARK}" if several else MARK for i in range(count)]
            number += count
            if turn.role == "user":
                body = "".join(places) if self.plain else "\n".join([*places, words] if words else places)
                text += self.user + body + self.user_tail
            else:
                start = len(text) + len(self._asks)
                text += self.assistant + turn.text + self.assistant_tail
                learned.append((start, len(text)))
        return Written(text + self._asks if reply else text, tuple(learned))

    @property
    def _asks(self) -> str:
        """Where an answer begins: a space before its first word is part of that word's token."""
        return self.assistant.rstrip(" ")

    def _turns(self, messages: Sequence[Message], reply: bool) -> tuple[str, Sequence[Message]]:
        first = bool(messages) and messages[0].role == "system"
        system, turns = (messages[0].text, messages[1:]) if first else (self.system, messages)
        wanted = [("user", "assistant")[i % 2] for i in range(len(turns))]
        if not turns or [m.role for m in turns] != wanted or (turns[-1].role == "user") != reply:
            given = ", ".join(m.role for m in messages) or "no message"
            end = "a user's message, to be answered" if reply else "an assistant's message"
            raise X2IError(f"a conversation must be user, assistant, user … and end with {end}; it is: {given}")
        if any(MARK in m.text for m in turns if m.role == "assistant"):
            raise X2IError(f"{MARK} in an assistant's message: images stand in users' messages")
        return system, turns


TEMPLATES: dict[TemplateName, Template] = {
    "gemma": Template(
        user="<start_of_turn>user\n",
        user_tail="<end_of_turn>\n",
        assistant="<start_of_turn>model\n",
        assistant_tail="<end_of_turn>\n<eos>",
        special=("<start_of_turn>", "<end_of_turn>", "<eos>"),
        stop=("<eos>", "<end_of_turn>"),
    ),
    "vicuna_v1": Template(
        system=_VICUNA,
        system_tail=" ",
        user="USER: ",
        user_tail=" ",
        assistant="ASSISTANT: ",
        assistant_tail="</s>",
        special=("</s>",),
        stop=("</s>",),
    ),
    "llama_3": Template(
        system=_LLAMA_3,
        system_head="<|start_header_id|>system<|end_header_id|>\n\n",
        system_tail="<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n",
        user_tail="<|eot_id|>",
        assistant="<|start_header_id|>system<|end_header_id|>\n\n",
        assistant_tail="<|eot_id|>",
        special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        stop=("<|eot_id|>", "<|end_of_text|>"),
    ),
}
#: Captions: the images, then the words and a newline.
PLAIN = Template(user="", user_tail="", assistant="", assistant_tail="\n", plain=True)
