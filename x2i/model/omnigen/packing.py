"""OmniGen's packs: pictures to be drawn and conversations, one after the other in one sequence.

    [text and condition images][time token][noisy patches] [text and images of a conversation] … [padding]

Within a document everything is as in a batch of its own: the mask, the positions, the rotary frequencies.

Tensor names carry their axes:
    T tokens of the pack · G pictures drawn · N their noisy tokens · M tokens of condition images · S any of these placed
    K conversations · D width · O values of a patch · C latent channels · H, W latent height and width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from x2i.model.layers.attention import mask_of
from x2i.model.layers.learned import Learned
from x2i.model.layers.spans import Spans, positions, spans
from x2i.model.omnigen import trunk
from x2i.model.omnigen.prompt import IGNORED, Prompt
from x2i.model.packs import check_pictures, check_room

if TYPE_CHECKING:
    from x2i.model.omnigen.model import OmniGen


@dataclass(frozen=True)
class OmniGenDocument:
    """A request, or (`size` is None) a conversation.

    Attributes:
        prompt: its tokens.
        images: latents [C, H, W] of its images, in the order of their tokens.
        size: latent height and width of what is to be drawn.
        noisy: tokens of that.
    """

    prompt: Prompt
    images: tuple[Tensor, ...]
    size: tuple[int, int] | None = None
    noisy: int = 0

    @property
    def length(self) -> int:
        """Tokens that it takes in a pack: those of the prompt, and of a picture the timestep's and the noisy ones."""
        return len(self.prompt.ids) + (0 if self.size is None else 1 + self.noisy)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Of each token the block that sees itself whole; 0: none."""
        if self.size is None:
            return self.prompt.blocks
        return (*self.prompt.blocks, 0, *[1 + max(self.prompt.blocks)] * self.noisy)


@dataclass(frozen=True)
class OmniGenPack:
    """Documents as one sequence of T tokens.

    Attributes:
        ids_T: text tokens; what stands at other places is replaced.
        positions_T: from 0 in each document.
        spans: who sees whom.
        lengths: tokens of each document.
        sizes: latent height and width of each picture to be drawn.
        images: latents [C, H, W] of all condition images, in the order of their places.
        image_M, time_G, noisy_N: places of the condition images' tokens, of the timesteps, of the noisy tokens.
        rows_N: whose noisy token it is, from 0 to G - 1.
        learned: what the conversations teach.
    """

    ids_T: Tensor
    positions_T: Tensor
    spans: Spans
    lengths: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    images: tuple[Tensor, ...]
    image_M: Tensor
    time_G: Tensor
    noisy_N: Tensor
    rows_N: Tensor
    learned: Learned

    @property
    def pairs(self) -> int:
        """Pairs (query, key) that the mask allows, padding left out."""
        return self.spans.pairs

    def to(self, device: torch.device | str) -> OmniGenPack:
        """The same pack on another device."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: value.to(device) for name, value in found.items() if isinstance(value, Tensor | Spans | Learned)}
        return OmniGenPack(**{**found, **moved, "images": tuple(image.to(device) for image in self.images)})


def document(
    prompt: Prompt, images: Sequence[Tensor], size: tuple[int, int] | None = None, patch: int = 1
) -> OmniGenDocument:
    """A prompt with its images, numbered as the prompt numbers them; `size` [latents] and patch side of a picture."""
    noisy = 0 if size is None else (size[0] // patch) * (size[1] // patch)
    return OmniGenDocument(prompt, tuple(images[i] for i in prompt.images), size, noisy)


def pack(documents: Sequence[OmniGenDocument], length: int, pad: int) -> OmniGenPack:
    """Documents one after the other, then padding with the id `pad`; see `Processor.pack`."""
    lengths = tuple(d.length for d in documents)
    check_room(lengths, length)
    ids = [pad] * length
    image, time, noisy, rows = list[int](), list[int](), list[int](), list[int]()
    told: list[tuple[int, list[int]]] = []
    first = 0
    for one in documents:
        prompt, end = one.prompt, first + len(one.prompt.ids)
        ids[first:end] = prompt.ids
        image += [first + i for i, block in enumerate(prompt.blocks) if block]
        if one.size is None:
            marks = prompt.learned or (False,) * len(prompt.ids)
            told.append((first, [i if mark else IGNORED for i, mark in zip(prompt.ids, marks, strict=True)]))
        else:
            rows += [len(time)] * one.noisy
            noisy += range(end + 1, end + 1 + one.noisy)
            time.append(end)
        first += one.length
    image_M, time_G, noisy_N, rows_N = (torch.tensor(v, dtype=torch.int64) for v in (image, time, noisy, rows))
    return OmniGenPack(
        ids_T=torch.tensor(ids),
        positions_T=positions(lengths, length),
        spans=spans([one.blocks for one in documents], length),
        lengths=lengths,
        sizes=tuple(one.size for one in documents if one.size is not None),
        images=tuple(latents for one in documents for latents in one.images),
        image_M=image_M,
        time_G=time_G,
        noisy_N=noisy_N,
        rows_N=rows_N,
        learned=Learned.of(told),
    )


def packed(
    model: OmniGen, inputs: OmniGenPack, x: Sequence[Tensor], t_G: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """See `Model.packed`."""
    check_pictures(inputs.sizes, x, t_G)
    counts_K = inputs.learned.counts_K
    if len(counts_K):
        model.need_text_head()
    times_G = t_G if x else torch.zeros(1, device=inputs.ids_T.device)
    embeds_TD, unused = _embed(model, inputs, x, times_G)
    with trunk.frequencies_by_document(model.llm, inputs.lengths, len(embeds_TD)):
        hidden_TD = model.llm(
            inputs_embeds=embeds_TD[None],
            attention_mask=mask_of(inputs.spans, model.flex),
            position_ids=inputs.positions_T[None],
            use_cache=False,
        ).last_hidden_state[0]

    noisy_ND = hidden_TD.index_select(0, inputs.noisy_N) if x else hidden_TD[:1]
    rows_N = inputs.rows_N if x else inputs.rows_N.new_zeros(1)
    velocity_NO = model.final_layer(noisy_ND, model.t_embedder(times_G), rows_N)
    unused = unused if x else unused + 0 * velocity_NO.sum()
    if model.config.text_head:
        sums_K = inputs.learned.sums(hidden_TD, model.logits)
    else:
        sums_K = torch.zeros(0, device=hidden_TD.device)
    if not len(inputs.learned.places_J):
        unused = unused + 0 * sums_K.sum()
    # what is unused hangs on all that is returned, whatever of it the caller learns from
    patches = velocity_NO.split([_tokens(model, h, w) for h, w in inputs.sizes]) if x else ()
    velocities = [
        model.unpatchify(part, h, w)[0] + unused.to(part.dtype)
        for part, (h, w) in zip(patches, inputs.sizes, strict=True)
    ]
    return velocities, sums_K + unused.float(), counts_K


def _embed(model: OmniGen, inputs: OmniGenPack, x: Sequence[Tensor], times_G: Tensor) -> tuple[Tensor, Tensor]:
    """What the trunk reads, [T, D]; and 0, on which hangs what had to be run without being placed."""
    embeds_TD: Tensor = model.llm.embed_tokens(inputs.ids_T)
    tokens_GD = model.time_token(times_G)
    tokens_ND = _patches(model, model.x_embedder, x, embeds_TD)
    tokens_MD = _patches(model, model.input_x_embedder, inputs.images, embeds_TD)
    unused = embeds_TD.new_zeros(())
    placed: list[tuple[Tensor, Tensor]] = []
    for wanted, place_S, tokens_SD in (
        (bool(inputs.images), inputs.image_M, tokens_MD),
        (bool(x), inputs.time_G, tokens_GD),
        (bool(x), inputs.noisy_N, tokens_ND),
    ):
        if wanted:
            placed.append((place_S, tokens_SD))
        else:
            unused = unused + 0 * tokens_SD.sum()
    if not placed:
        return embeds_TD, unused
    place_S, tokens_SD = torch.cat([p for p, _ in placed]), torch.cat([t for _, t in placed])
    return embeds_TD.index_copy(0, place_S, tokens_SD.to(embeds_TD.dtype)), unused


def _patches(model: OmniGen, patcher: torch.nn.Module, images: Sequence[Tensor], like: Tensor) -> Tensor:
    """Tokens [S, D] of latents of any sizes, one after the other, by one call; without any, one token of zeros."""
    side, channels = model.config.patch_size, model.config.in_channels
    if not images:
        out: Tensor = patcher(like.new_zeros(1, channels, side, side))[:, 0]
        return out
    cut = [i.unflatten(2, (-1, side)).unflatten(1, (-1, side)).permute(1, 3, 0, 2, 4).flatten(0, 1) for i in images]
    tokens_SD: Tensor = patcher(torch.cat(cut))[:, 0]
    return tokens_SD + torch.cat([model.positions(i.shape[-2], i.shape[-1])[0] for i in images])


def _tokens(model: OmniGen, height: int, width: int) -> int:
    return (height // model.config.patch_size) * (width // model.config.patch_size)
