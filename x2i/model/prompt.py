"""OmniGen's prompt: a chat string whose image placeholders become runs of patch tokens.

Text between placeholders is tokenised piece by piece, and the beginning-of-sequence token is kept on the
first piece only, as the published processor does. Batches are padded on the left.

Tensor names carry their axes: B batch, L condition tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from x2i.base.errors import X2IError

HEAD = "<|user|>\nGenerate an image according to the following instructions\n"
TAIL = "<|end|>\n<|assistant|>\n<|diffusion|>"
#: The instruction of the unconditional branch: what training shows when it drops the condition.
UNCONDITIONAL = "<cfg>"
#: Ids that the published tokenizer gives to "<s>" and "</s>"; the collator pads with the latter.
BOS, PAD = 1, 2

_IMAGE = re.compile(r"<\|image_(\d+)\|>")


@dataclass(frozen=True)
class Prompt:
    """A tokenised instruction. `ids` and `blocks` have one entry per token.

    `blocks` is 0 on text and k on the tokens of the k-th placeholder; `images` says which input image
    (from 0) stands at each placeholder, in the order of the text.
    """

    ids: tuple[int, ...]
    blocks: tuple[int, ...]
    images: tuple[int, ...]


@dataclass(frozen=True)
class PromptBatch:
    """Prompts padded on the left, with the latents of their images.

    `images` lists latents [C, H, W] row by row, in the order in which their tokens stand in `ids_BL`.
    """

    ids_BL: Tensor
    valid_BL: Tensor
    blocks_BL: Tensor
    images: tuple[Tensor, ...] = ()

    def to(self, device: torch.device | str) -> PromptBatch:
        """The same batch on another device."""
        images = tuple(image.to(device) for image in self.images)
        return PromptBatch(self.ids_BL.to(device), self.valid_BL.to(device), self.blocks_BL.to(device), images)


def image_only(count: int) -> str:
    """The instruction of the image-only branch of two-way guidance: the placeholders, nothing else."""
    return " ".join(f"<img><|image_{i}|></img>" for i in range(1, count + 1))


def with_placeholders(instruction: str, count: int) -> str:
    """Put placeholders in front of an instruction that has none, so that `count` images have their place."""
    return f"{image_only(count)} {instruction}" if count and not _IMAGE.search(instruction) else instruction


class PromptEncoder:
    """Turns instructions into `Prompt`s.

    Args:
        tokenizer: as OmniGen's: it knows the chat's special tokens, and puts id 1 in front of a text (or nothing).
        max_text_tokens: instructions are cut so that a prompt has at most this many text tokens; None for no limit.
    """

    def __init__(self, tokenizer: Tokenizer, max_text_tokens: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.max_text_tokens = max_text_tokens
        self._tail = len(self._ids(TAIL, first=False))

    def encode(self, instruction: str, image_tokens: Sequence[int]) -> Prompt:
        """Tokenise one instruction.

        Args:
            instruction: with placeholders `<img><|image_1|></img>` … for every image.
            image_tokens: how many tokens each input image takes up.

        Raises:
            X2IError: the placeholders are not those of the images, 1 to their number.
        """
        numbers = [int(n) for n in _IMAGE.findall(instruction)]
        if sorted(set(numbers)) != list(range(1, len(image_tokens) + 1)):
            given = ", ".join(f"<|image_{n}|>" for n in numbers) or "no placeholder"
            raise X2IError(
                f"{len(image_tokens)} input images, but the instruction has {given}. It must name every image: "
                f"<img><|image_1|></img> to <img><|image_N|></img>."
            )
        pieces = _IMAGE.split(HEAD + instruction + TAIL)[::2]
        texts = self._cut([self._ids(piece, first=i == 0) for i, piece in enumerate(pieces)])
        ids, blocks = list(texts[0]), [0] * len(texts[0])
        for place, (number, text) in enumerate(zip(numbers, texts[1:], strict=True), 1):
            count = image_tokens[number - 1]
            ids += [0] * count + text
            blocks += [place] * count + [0] * len(text)
        return Prompt(tuple(ids), tuple(blocks), tuple(n - 1 for n in numbers))

    def _ids(self, text: str, first: bool) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids[1:] if not first and ids[:1] == [BOS] else ids

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


def collate(prompts: Sequence[Prompt], images: Sequence[Sequence[Tensor]]) -> PromptBatch:
    """Pad prompts on the left into one batch.

    Args:
        prompts: one per row.
        images: for each row, the latents [C, H, W] of its input images, as numbered in the instruction.
    """
    length = max(len(p.ids) for p in prompts)
    ids = [[PAD] * (length - len(p.ids)) + list(p.ids) for p in prompts]
    blocks = [[0] * (length - len(p.ids)) + list(p.blocks) for p in prompts]
    valid = [[False] * (length - len(p.ids)) + [True] * len(p.ids) for p in prompts]
    placed = tuple(row[i] for p, row in zip(prompts, images, strict=True) for i in p.images)
    return PromptBatch(torch.tensor(ids), torch.tensor(valid), torch.tensor(blocks), placed)
