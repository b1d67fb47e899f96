"""OmniGen's token sequences: a chat string whose images become runs of patch tokens.

- drawing: one user's turn around the instruction, then the assistant's `<|diffusion|>`
- understanding: Phi-3's chat format; the assistant's turns, with the `<|end|>` that closes them, are learned

Text between images is tokenised piece by piece, and the beginning-of-sequence token is kept on the first piece only,
as the published processor does. Batches are padded on the left.

Tensor names carry their axes: B batch, L condition tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from x2i.base.errors import X2IError
from x2i.model.base import Chat
from x2i.model.placeholders import MARK, PLACEHOLDER, ControlWords, numbers_of

HEAD = "<|user|>\nGenerate an image according to the following instructions\n"
END = "<|end|>"
ASSISTANT = "<|assistant|>\n"
TAIL = f"{END}\n{ASSISTANT}<|diffusion|>"
#: The instruction of the unconditional branch: what training shows when it drops the condition.
UNCONDITIONAL = "<cfg>"
#: What begins every sequence; and the id of the published tokenizer's "</s>", with which its collator pads.
BEGIN, PAD = "<s>", 2
#: Label of what is not learned.
IGNORED = -100


@dataclass(frozen=True)
class Prompt:
    """A tokenised instruction or conversation. `ids` and `blocks` have one entry per token.

    `blocks` is 0 on text and k on the tokens of the k-th image in the order of the text; `images` says which input
    image (from 0) that is. `learned` marks the tokens of the assistant's turns; None where there are no labels.
    """

    ids: tuple[int, ...]
    blocks: tuple[int, ...]
    images: tuple[int, ...]
    learned: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class PromptBatch:
    """Prompts padded on the left, with the latents of their images.

    `images` lists latents [C, H, W] row by row, in the order in which their tokens stand in `ids_BL`. `labels_BL` has
    the ids of learned tokens, and `IGNORED` elsewhere.
    """

    ids_BL: Tensor
    valid_BL: Tensor
    blocks_BL: Tensor
    images: tuple[Tensor, ...] = ()
    labels_BL: Tensor | None = None

    def to(self, device: torch.device | str) -> PromptBatch:
        """The same batch on another device."""
        return PromptBatch(
            self.ids_BL.to(device),
            self.valid_BL.to(device),
            self.blocks_BL.to(device),
            tuple(image.to(device) for image in self.images),
            None if self.labels_BL is None else self.labels_BL.to(device),
        )


class PromptEncoder:
    """Turns instructions and conversations into `Prompt`s.

    Args:
        tokenizer: as OmniGen's: it knows the chat's special tokens, and puts `<s>` in front of a text (or nothing).
        max_text_tokens: texts are cut so that a prompt has at most this many text tokens; None for no limit.
    """

    def __init__(self, tokenizer: Tokenizer, max_text_tokens: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.control = ControlWords(tokenizer)
        self.max_text_tokens = max_text_tokens
        self._begin = tokenizer.token_to_id(BEGIN)
        self._tail = len(self._tokens(TAIL, first=False)[0])

    def encode(self, instruction: str, image_tokens: Sequence[int]) -> Prompt:
        """Tokenise one instruction.

        Args:
            instruction: with placeholders `<img><|image_1|></img>` … for every image.
            image_tokens: how many tokens each input image takes up.

        Raises:
            X2IError: the placeholders are not those of the images, 1 to their number.
        """
        numbers = numbers_of(instruction, len(image_tokens))
        pieces = PLACEHOLDER.split(HEAD + instruction + TAIL)[::2]
        texts = self._cut([self._tokens(piece, first=i == 0)[0] for i, piece in enumerate(pieces)])
        ids, blocks = list(texts[0]), [0] * len(texts[0])
        for place, (number, text) in enumerate(zip(numbers, texts[1:], strict=True), 1):
            count = image_tokens[number - 1]
            ids += [0] * count + text
            blocks += [place] * count + [0] * len(text)
        return Prompt(tuple(ids), tuple(blocks), tuple(n - 1 for n in numbers))

    def chat(self, chat: Chat, image_tokens: Sequence[int], labels: bool, plain: bool = False) -> Prompt:
        """Tokenise one conversation.

        Args:
            chat: `<image>` in a text stands for the next image.
            image_tokens: how many tokens each image takes up.
            labels: mark the assistant's turns as learned, and cut what is too long at its end. Without, the
                assistant's next turn is opened.
            plain: no chat: the images, then what the assistant says.

        Raises:
            X2IError: as many images are not marked; or with labels no turn is the assistant's, without labels the
                last one is.
        """
        chat = Chat(self.control.in_messages(chat.messages), chat.images)
        text, answers = _captioned(chat) if plain else _spoken(chat, labels)
        pieces = text.split(MARK)
        if len(pieces) - 1 != len(image_tokens):
            raise X2IError(f"a chat has {len(image_tokens)} images, but {len(pieces) - 1} marks {MARK} in its texts")
        ids: list[int] = []
        blocks: list[int] = []
        learned: list[bool] = []
        start, room = 0, self.max_text_tokens if labels else None
        for place, piece in enumerate(pieces):
            if place:
                count = image_tokens[place - 1]
                ids, blocks, learned = ids + [0] * count, blocks + [place] * count, learned + [False] * count
            tokens, spans = self._tokens(piece, first=place == 0)
            tokens, cut = tokens[:room], room is not None and len(tokens) >= room
            ids += tokens
            blocks += [0] * len(tokens)
            inside = [(start + a, start + b) for a, b in spans[: len(tokens)]]
            learned += [any(first <= a < b <= last for first, last in answers) for a, b in inside]
            if cut:
                break
            room = None if room is None else room - len(tokens)
            start += len(piece) + len(MARK)
        return Prompt(tuple(ids), tuple(blocks), tuple(range(max(blocks))), tuple(learned) if labels else None)

    def _tokens(self, text: str, first: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the span of characters that each stands for."""
        found = self.tokenizer.encode(text)
        begun = not first and self._begin is not None and found.ids[:1] == [self._begin]
        return found.ids[begun:], found.offsets[begun:]

    def _cut(self, texts: list[list[int]]) -> list[list[int]]:
        """Drop tokens from the end of the instruction, in front of the chat's fixed tail."""
        if self.max_text_tokens is None:
            return texts
        last = texts[-1]
        excess = min(sum(map(len, texts)) - self.max_text_tokens, len(last) - self._tail)
        if excess <= 0:
            return texts
        end = len(last) - self._tail
        return [*texts[:-1], last[: end - excess] + last[end:]]


def _spoken(chat: Chat, labels: bool) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as Phi-3 writes it, and the spans of characters of the assistant's turns with their `<|end|>`."""
    text, answers = "", []
    for message in chat.messages:
        text += f"<|{message.role}|>\n"
        start = len(text)
        text += message.text.strip().replace(MARK, f"<img>{MARK}</img>") + END
        if message.role == "assistant":
            answers.append((start, len(text)))
        text += "\n"
    if labels and not answers:
        raise X2IError("a chat to be learned has no turn of the assistant")
    if not labels and (not chat.messages or chat.messages[-1].role == "assistant"):
        raise X2IError("a chat to be answered must end with a turn of the user")
    return (text if labels else text + ASSISTANT), answers


def _captioned(chat: Chat) -> tuple[str, list[tuple[int, int]]]:
    """A conversation without its template: the images of all turns, then the assistant's words, all of them learned."""
    images = f"<img>{MARK}</img>" * sum(m.text.count(MARK) for m in chat.messages)
    said = " ".join(m.text.replace(MARK, "").strip() for m in chat.messages if m.role == "assistant")
    if not said:
        raise X2IError("a chat to be learned without its template has no words of the assistant")
    return images + said + END, [(len(images), len(images) + len(said) + len(END))]


def collate(prompts: Sequence[Prompt], images: Sequence[Sequence[Tensor]], pad: int = PAD) -> PromptBatch:
    """Pad prompts on the left into one batch; it has labels if all prompts have.

    Args:
        prompts: one per row.
        images: for each row, the latents [C, H, W] of its input images, as numbered in the instruction.
        pad: id that fills up; nothing looks at it.
    """
    length = max(len(p.ids) for p in prompts)
    ids = [[pad] * (length - len(p.ids)) + list(p.ids) for p in prompts]
    blocks = [[0] * (length - len(p.ids)) + list(p.blocks) for p in prompts]
    valid = [[False] * (length - len(p.ids)) + [True] * len(p.ids) for p in prompts]
    placed = tuple(row[i] for p, row in zip(prompts, images, strict=True) for i in p.images)
    labels = None
    marks = [p.learned for p in prompts if p.learned is not None]
    if len(marks) == len(prompts):
        learned = torch.tensor([[False] * (length - len(row)) + list(row) for row in marks])
        labels = torch.tensor(ids).masked_fill(~learned, IGNORED)
    return PromptBatch(torch.tensor(ids), torch.tensor(valid), torch.tensor(blocks), placed, labels)
