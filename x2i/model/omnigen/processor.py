"""OmniGen's inputs: requests and conversations with their pictures, as token sequences and latents.

Guidance (VectorSpaceLab/OmniGen, processor.py and model.py): the full branch, the image-only branch (the placeholders
and nothing else), the unconditional branch (no images). What stands in the unconditional branch is a choice:

- `<cfg>`, the default: what a model saw in training where its condition was dropped, ours and the published one
- `NEGATIVE`: the fixed sentence that the published pipeline uses; give it as `negative` for the published weights
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from x2i.base.errors import X2IError
from x2i.model import flow
from x2i.model.base import Branches, Chat, Processor, Request
from x2i.model.omnigen.config import OmniGenConfig
from x2i.model.omnigen.lengths import LARGEST
from x2i.model.omnigen.packing import OmniGenDocument, OmniGenPack, document, pack
from x2i.model.omnigen.prompt import BEGIN, END, HEAD, PAD, UNCONDITIONAL, Prompt, PromptBatch, PromptEncoder, collate
from x2i.model.pixels import fit, fitted, to_tensor
from x2i.model.placeholders import image_only
from x2i.model.vae import VAE

#: Tokens that end an answer, as far as the tokenizer knows them.
_STOPS = (END, "</s>", "<|endoftext|>", "<|im_end|>")


class OmniGenProcessor(Processor[PromptBatch]):
    """Words and pictures into OmniGen's sequences."""

    special_tokens: ClassVar = (
        *("<unk>", BEGIN, "</s>"),  # ids 0, 1 and 2, as in the published tokenizer
        *("<|user|>", END, "<|assistant|>", "<|diffusion|>", "<img>", "</img>", UNCONDITIONAL),
    )
    begin: ClassVar = BEGIN
    needed_tokens: ClassVar = special_tokens[3:]
    #: The published pipeline's unconditional instruction.
    NEGATIVE: ClassVar[str] = (
        "low quality, jpeg artifacts, ugly, duplicate, morbid, mutilated, extra fingers, mutated hands, "
        "poorly drawn hands, poorly drawn face, mutation, deformed, blurry, dehydrated, bad anatomy, bad proportions, "
        "extra limbs, cloned face, disfigured, gross proportions, malformed limbs, missing arms, missing legs, "
        "extra arms, extra legs, fused fingers, too many fingers."
    )

    def __init__(
        self, config: OmniGenConfig, tokenizer: Tokenizer, vae: VAE | None, max_text_tokens: int | None = None
    ) -> None:
        super().__init__(config, tokenizer, vae, max_text_tokens)
        self.encoder = PromptEncoder(tokenizer, max_text_tokens)
        pad = tokenizer.token_to_id("</s>")
        self._pad = min(PAD, config.vocab_size - 1) if pad is None else pad

    @property
    def token_side(self) -> int:
        """Pixels per side of one token: the autoencoder's factor times the patch."""
        side: int = self._vae().shrink * self.config.patch_size
        return side

    def check_size(self, height: int, width: int) -> None:
        """Raise X2IError if pictures of this size in pixels cannot be drawn, or read."""
        side, limit = self.token_side, self.token_side * self.config.pos_embed_max_size
        for name, value in (("height", height), ("width", width)):
            if value % side or not 0 < value <= limit:
                raise X2IError(f"{name} {value}: must be a multiple of {side}, and at most {limit} pixels")

    def picture_tokens(self, width: int, height: int, chat: bool) -> int:
        """As the contract."""
        if chat:
            width, height = fitted(width, height, self._largest, self.token_side)
        return (width // self.token_side) * (height // self.token_side)

    @classmethod
    def learned_text(cls, instruction: str) -> str:
        """An instruction behind the words that stand before each."""
        return HEAD + instruction

    def requests(
        self,
        requests: Sequence[Request],
        dropped: Sequence[bool] | None = None,
        generators: Sequence[torch.Generator] | None = None,
        size: tuple[int, int] | None = None,
    ) -> PromptBatch:
        """One row per request; a dropped one shows `<cfg>` and no images.

        Raises:
            X2IError: placeholders that do not match the images, or an image of a size that does not fit.
        """
        return self._batch(*self._asked(requests, dropped, generators))

    def branches(
        self,
        requests: Sequence[Request],
        *,
        height: int,
        width: int,
        guidance: float,
        image_guidance: float,
        separate: bool = False,
        negative: str | None = None,
    ) -> list[Branches[PromptBatch]]:
        """Full, image-only and unconditional rows; a request without images has no image-only one.

        Raises:
            X2IError: as `requests`, or a size that cannot be drawn.
        """
        self.check_size(height, width)
        latents = self._latents([r.images for r in requests], None)
        kinds: list[list[tuple[int, float, Prompt, list[Tensor]]]] = [[], [], []]
        for row, (request, images) in enumerate(zip(requests, latents, strict=True)):
            weights = flow.guidance_weights(guidance, image_guidance, bool(images))
            said = self.encoder.control.broken(request.instruction)
            texts = (said, image_only(len(images)), UNCONDITIONAL if negative is None else negative)
            for kind, text, weight, shown in zip(kinds, texts, weights, (images, images, []), strict=True):
                if abs(weight) > 1e-9:
                    kind.append((row, weight, self._prompt(text, shown), shown))
        groups = kinds if separate else [[branch for kind in kinds for branch in kind]]
        return [
            Branches(
                self._batch([prompt for _, _, prompt, _ in group], [images for *_, images in group]),
                torch.tensor([row for row, *_ in group]),
                torch.tensor([weight for _, weight, *_ in group]),
            )
            for group in groups
            if group
        ]

    def chats(self, chats: Sequence[Chat], labels: bool, plain: bool = False) -> PromptBatch:
        """One row per conversation in Phi-3's chat format; its images are condition images, none longer than 1024 px.

        Raises:
            X2IError: as many images are not marked, an image does not fit, or nothing is to be learned or answered.
        """
        return self._batch(*self._told(chats, labels, plain))

    def documents(
        self,
        requests: Sequence[Request],
        dropped: Sequence[bool] | None,
        sizes: Sequence[tuple[int, int]],
        chats: Sequence[Chat],
        plain: bool = False,
        generators: Sequence[torch.Generator] | None = None,
    ) -> list[OmniGenDocument]:
        """As the contract. A dropped request shows `<cfg>` and no images, as in `requests`."""
        for height, width in sizes:
            self.check_size(height, width)
        shrink, patch = self._vae().shrink, self.config.patch_size
        prompts, images = self._asked(requests, dropped, generators)
        said, shown = self._told(chats, labels=True, plain=plain)
        drawn = [
            document(prompt, row, (height // shrink, width // shrink), patch)
            for prompt, row, (height, width) in zip(prompts, images, sizes, strict=True)
        ]
        return [*drawn, *(document(prompt, row) for prompt, row in zip(said, shown, strict=True))]

    def pack(self, documents: Sequence[OmniGenDocument], length: int) -> OmniGenPack:
        """As the contract."""
        return pack(documents, length, self._pad)

    @property
    def stop(self) -> tuple[int, ...]:
        """Ids of the tokens that end an answer."""
        found = (self.tokenizer.token_to_id(token) for token in _STOPS)
        return tuple(i for i in found if i is not None)

    def _asked(
        self, requests: Sequence[Request], dropped: Sequence[bool] | None, generators: Sequence[torch.Generator] | None
    ) -> tuple[list[Prompt], list[list[Tensor]]]:
        """Each request's tokens and latents."""
        pairs = list(zip(requests, dropped or [False] * len(requests), strict=True))
        images = self._latents([() if drop else r.images for r, drop in pairs], generators)
        texts = [UNCONDITIONAL if drop else self.encoder.control.broken(r.instruction) for r, drop in pairs]
        return [self._prompt(t, i) for t, i in zip(texts, images, strict=True)], images

    def _told(self, chats: Sequence[Chat], labels: bool, plain: bool) -> tuple[list[Prompt], list[list[Tensor]]]:
        """Each conversation's tokens and latents."""
        pictures = [[fit(Image.fromarray(i), self._largest, self.token_side) for i in c.images] for c in chats]
        images = self._latents(pictures, None)
        pairs = zip(chats, images, strict=True)
        return [self.encoder.chat(c, [self._tokens(i) for i in row], labels, plain) for c, row in pairs], images

    @property
    def _largest(self) -> int:
        """Longest side in pixels of a picture that a conversation shows."""
        return min(LARGEST, self.token_side * self.config.pos_embed_max_size)

    def _prompt(self, text: str, images: Sequence[Tensor]) -> Prompt:
        return self.encoder.encode(text, [self._tokens(image) for image in images])

    def _tokens(self, latents: Tensor) -> int:
        count: int = latents.shape[-2] * latents.shape[-1] // self.config.patch_size**2
        return count

    def _batch(self, prompts: Sequence[Prompt], images: Sequence[Sequence[Tensor]]) -> PromptBatch:
        return collate(prompts, images, self._pad)

    def _latents(
        self, images: Sequence[Sequence[np.ndarray]], generators: Sequence[torch.Generator] | None
    ) -> list[list[Tensor]]:
        """Latents of each row's images; those of one size are encoded in one call."""
        flat = [(image, row) for row, some in enumerate(images) for image in some]
        sizes: dict[tuple[int, ...], list[int]] = {}
        for place, (image, _) in enumerate(flat):
            self.check_size(*image.shape[:2])
            sizes.setdefault(image.shape, []).append(place)
        encoded: dict[int, Tensor] = {}
        for places in sizes.values():
            drawn = None if generators is None else [generators[flat[p][1]] for p in places]
            encoded |= zip(places, self._vae().encode(to_tensor([flat[p][0] for p in places]), drawn), strict=True)
        following = iter(range(len(flat)))
        return [[encoded[next(following)] for _ in row] for row in images]

    def _vae(self) -> VAE:
        if self.vae is None:
            raise X2IError("this processor has no autoencoder: it can prepare no pictures")
        return self.vae


PROCESSOR = OmniGenProcessor
