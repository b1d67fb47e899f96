"""Ovis-U1's packs: pictures to be drawn and conversations side by side, in every part of the model without padding.

A document has its tokens in two sequences, both counted in the pack's budget:

    language model   [prompt of a picture] [conversation] [prompt] … [padding]      causal within each document
    decoder          [text][noise][sources] [text][noise] …                        within each document all see all

- the visual tokenizer runs once over the images of all documents, and sees what is the same (as blank images) once
- the language model's sequence is as long as its documents, and a little padding: so few lengths, hence shapes, occur
- what the refiner and the decoder are given is the prompts of the pictures to be drawn, without that padding; pictures of
  any size and their sources lie one after the other in the linear maps, and attend document by document, by the kernels of
  SDPA that need no mask (`streams.py`). FlexAttention would need a mask for each of three sequences, and as many graphs as
  lengths occur; batches of one size would run the blocks once a size
- within a document everything is as alone: the mask, the positions, the time

Tensor names carry their axes:
    T tokens of the language model (padded) · V visual tokens among them · N patches of all images · F values of a patch
    G pictures drawn · L tokens of their prompts · I their image tokens: noise and sources · Z noisy tokens
    K conversations · D width of the language model · E = 2 D · O values of a token · C latent channels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from x2i.model.layers.aimv2 import Grid, patchify
from x2i.model.layers.attention import mask_of
from x2i.model.layers.learned import Learned
from x2i.model.layers.spans import Spans, positions, spans
from x2i.model.lengths import Lengths
from x2i.model.ovis_u1 import decoder
from x2i.model.ovis_u1.config import OvisU1Config
from x2i.model.ovis_u1.prompt import TEXT, VISUAL, Distinct, Row
from x2i.model.ovis_u1.streams import Documents, DocumentStreams
from x2i.model.packs import Size, check_pictures, check_room

if TYPE_CHECKING:
    from x2i.model.ovis_u1.model import OvisU1

#: The language model's sequence is a multiple of a part of its length, and of so many tokens at least.
_PART, _LEAST = 16, 16


@dataclass(frozen=True)
class OvisU1Document:
    """A request, or (`size` is None) a conversation.

    Attributes:
        row: its tokens in the language model; `shown` numbers the `images`.
        images: normalised pixels [3, H, W] of its images.
        sources: latents [C, H, W] of its source images, for the decoder.
        size: latent height and width of what is to be drawn.
        patch: latents a side of one of the decoder's tokens.
    """

    row: Row
    images: tuple[Tensor, ...]
    sources: tuple[Tensor, ...] = ()
    size: Size | None = None
    patch: int = 1

    @property
    def shapes(self) -> tuple[Size, ...]:
        """Rows and columns of the decoder's tokens: of what is drawn, then of the sources."""
        if self.size is None:
            return ()
        sides = [self.size, *[(z.shape[-2], z.shape[-1]) for z in self.sources]]
        return tuple((height // self.patch, width // self.patch) for height, width in sides)

    @property
    def length(self) -> int:
        """Tokens that it takes in a pack: of the language model, and of the decoder besides."""
        return len(self.row.ids) + sum(rows * columns for rows, columns in self.shapes)


@dataclass(frozen=True)
class Drawing:
    """How the tokens of the pictures to be drawn lie in the refiner and the decoder.

    Attributes:
        prompts_L: where the tokens of the prompts stand in the language model's sequence.
        ids_I3: positions of the image tokens.
        refined: summaries and words in the refiner.
        streams: text and image tokens in the decoder.
        noisy: the noisy tokens; `noisy_Z` is where they stand in the decoder.
    """

    prompts_L: Tensor
    ids_I3: Tensor
    refined: DocumentStreams
    streams: DocumentStreams
    noisy: Documents
    noisy_Z: Tensor

    @classmethod
    def of(cls, prompts: Sequence[range], shapes: Sequence[Sequence[Size]]) -> Drawing:
        """Of documents with these places in the language model, and rows and columns of noise and sources; on the CPU."""
        text = [len(places) for places in prompts]
        sizes = [[rows * columns for rows, columns in some] for some in shapes]
        streams = DocumentStreams.of(text, [sum(some) for some in sizes])
        noisy = [torch.arange(some[0]) + first for some, first in zip(sizes, _firsts(sizes), strict=True)]
        ids = [decoder.image_ids(*shape, number) for some in shapes for number, shape in enumerate(some)]
        return cls(
            prompts_L=torch.cat([torch.arange(places.start, places.stop) for places in prompts]),
            ids_I3=torch.cat(ids),
            refined=DocumentStreams.of([1] * len(text), text),
            streams=streams,
            noisy=Documents.of([some[0] for some in sizes]),
            noisy_Z=streams.image_I[torch.cat(noisy)],
        )

    def to(self, device: torch.device | str) -> Drawing:
        """The same on another device."""
        return Drawing(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class OvisU1Pack:
    """Documents as one sequence of T tokens of the language model, and one of the decoder.

    Attributes:
        ids_T, marks_T: as in a batch, `OvisInputs`.
        positions_T: from 0 in each document.
        spans: who sees whom in the language model.
        rows: lengths of each document; images that an earlier one has shown already count as text.
        patches_NF, grids: all images, each once; None without images.
        places_V: where visual tokens stand, and `visual_V`: which of those of all images.
        sizes: latent height and width of each picture to be drawn, and `sources`: latents of its source images.
        drawing: how they lie; None without pictures to be drawn.
        learned: what the conversations teach.
    """

    ids_T: Tensor
    marks_T: Tensor
    positions_T: Tensor
    spans: Spans
    rows: tuple[Lengths, ...]
    patches_NF: Tensor | None
    grids: tuple[Grid, ...]
    places_V: Tensor
    visual_V: Tensor
    sizes: tuple[Size, ...]
    sources: tuple[tuple[Tensor, ...], ...]
    drawing: Drawing | None
    learned: Learned

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document, those of the decoder counted."""
        return tuple(row.tokens for row in self.rows)

    @property
    def pairs(self) -> int:
        """Pairs (query, key) that the language model's mask allows, padding left out."""
        return self.spans.pairs

    def to(self, device: torch.device | str) -> OvisU1Pack:
        """The same pack on another device."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        kinds = Tensor | Spans | Learned | Drawing
        moved = {name: value.to(device) for name, value in found.items() if isinstance(value, kinds)}
        sources = tuple(tuple(latents.to(device) for latents in row) for row in self.sources)
        return replace(self, **moved, sources=sources)


def cut(row: Row, length: int) -> Row:
    """The first `length` tokens of a sequence."""
    return Row(row.ids[:length], row.marks[:length], row.labels[:length], row.shown)


def pack(documents: Sequence[OvisU1Document], length: int, config: OvisU1Config) -> OvisU1Pack:
    """Documents one after the other; see `Processor.pack`."""
    check_room([one.length for one in documents], length)
    counts = [len(one.row.ids) for one in documents]
    total = min(_rounded(sum(counts)), length)
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    ids, marks = [0] * total, [TEXT] * total
    images = Distinct(config.image_factor)
    visual, rows = list[Tensor](), list[Lengths]()
    for one, first, count in zip(documents, firsts, counts, strict=True):
        ids[first : first + count], marks[first : first + count] = one.row.ids, one.row.marks
        left, read, places = one.row.marks.count(VISUAL), list[int](), list[Tensor]()
        for image in (one.images[number] for number in one.row.shown):
            if left <= 0:
                break  # the image is cut off
            tokens, place, new = images.add(image)
            read += [tokens] if new else []
            places.append(torch.arange(min(tokens, left)) + place)
            left -= tokens
        visual += places
        sizes = [height * width for height, width in one.shapes] or [0]
        labels = 0 if one.size is not None else sum(i > 0 and label >= 0 for i, label in enumerate(one.row.labels))
        rows.append(Lengths(count - sum(read), tuple(read), sizes[0], tuple(sizes[1:]), labels))
    drawn = [(one, range(f, f + n)) for one, f, n in zip(documents, firsts, counts, strict=True) if one.size]
    told = [(f, one.row.labels) for one, f in zip(documents, firsts, strict=True) if one.size is None]
    patches, grids = None, list[Grid]()
    if images.held:
        patches, grids = patchify(
            images.held, config.tokenizer.encoder.patch_size, config.tokenizer.encoder.hidden_stride
        )
    marks_T = torch.tensor(marks, dtype=torch.int64)
    return OvisU1Pack(
        ids_T=torch.tensor(ids, dtype=torch.int64),
        marks_T=marks_T,
        positions_T=positions(counts, total),
        spans=spans([[0] * count for count in counts], total),
        rows=tuple(rows),
        patches_NF=patches,
        grids=tuple(grids),
        places_V=(marks_T == VISUAL).nonzero()[:, 0],
        visual_V=torch.cat(visual) if visual else torch.zeros(0, dtype=torch.int64),
        sizes=tuple(one.size for one, _ in drawn if one.size is not None),
        sources=tuple(one.sources for one, _ in drawn),
        drawing=Drawing.of([places for _, places in drawn], [one.shapes for one, _ in drawn]) if drawn else None,
        learned=Learned.of(told),
    )


def packed(model: OvisU1, inputs: OvisU1Pack, x: Sequence[Tensor], t_G: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """See `Model.packed`."""
    check_pictures(inputs.sizes, x, t_G)
    with model.gradients_of_context():
        embeds_TD, unused = _embed(model, inputs)
        states = model.llm.model(
            inputs_embeds=embeds_TD[None],
            attention_mask=mask_of(inputs.spans, model.flex),
            position_ids=inputs.positions_T[None],
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
    velocity_ZO = _drawn(model, inputs, x, t_G, torch.cat([states[-1][0], states[-2][0]], dim=-1))
    unused = unused.float()
    if not x:
        unused = unused + 0 * velocity_ZO.sum()
    sums_K = inputs.learned.sums(states[-1][0], model.llm.logits)
    if not len(inputs.learned.places_J):
        unused = unused + 0 * sums_K.sum()
    # what is unused hangs on all that is returned, whatever of it the caller learns from
    patch, velocities = model.config.decoder.patch_size, list[Tensor]()
    if inputs.drawing is not None:
        for part_ZO, (height, width) in zip(velocity_ZO.split(inputs.drawing.noisy.lengths), inputs.sizes, strict=True):
            reverse = decoder.unpack(part_ZO[None], height // patch, width // patch, patch)[0]
            velocities.append(unused.to(reverse.dtype) - reverse)
    return velocities, sums_K + unused, inputs.learned.counts_K


def _drawn(model: OvisU1, inputs: OvisU1Pack, x: Sequence[Tensor], t_G: Tensor, context_TE: Tensor) -> Tensor:
    """The decoder's output for all noisy tokens [Z, O]; without pictures, for a blank one of a token."""
    patch, drawing = model.config.decoder.patch_size, inputs.drawing
    if drawing is None:
        drawing = Drawing.of([range(1)], [[(1, 1)]]).to(context_TE.device)
        x_IO = context_TE.new_zeros(1, model.config.decoder.in_channels)
        context_LE, t_G = context_TE.new_zeros(1, context_TE.shape[1]), context_TE.new_zeros(1)
    else:
        latents = [z for noise, sources in zip(x, inputs.sources, strict=True) for z in (noise, *sources)]
        x_IO = torch.cat([decoder.pack(z[None].to(x[0].dtype), patch)[0] for z in latents])
        context_LE = context_TE.index_select(0, drawing.prompts_L)
    reverse_ZO: Tensor = model.decoder.packed(
        x_IO, drawing.ids_I3, context_LE, 1 - t_G, drawing.refined, drawing.streams, drawing.noisy, drawing.noisy_Z
    )
    return reverse_ZO


def _embed(model: OvisU1, inputs: OvisU1Pack) -> tuple[Tensor, Tensor]:
    """What the language model reads, [T, D]; and 0, on which hangs what had to be run without being placed."""
    embeds_TD, unused = model.words(inputs.ids_T, inputs.marks_T), inputs.positions_T.new_zeros(()).float()
    if inputs.patches_NF is None:
        return embeds_TD, unused + 0 * model.unseen(embeds_TD).sum()
    visual_VD = model.visual(inputs.patches_NF, inputs.grids).index_select(0, inputs.visual_V)
    return embeds_TD.index_copy(0, inputs.places_V, visual_VD.to(embeds_TD.dtype)), unused


def _firsts(sizes: Sequence[Sequence[int]]) -> list[int]:
    """Where each document's image tokens begin among those of all."""
    ends = torch.tensor([sum(some) for some in sizes]).cumsum(0).tolist()
    return [0, *ends[:-1]]


def _rounded(count: int) -> int:
    """At least so many tokens: a multiple of a sixteenth of the power of two below."""
    step = max(1 << max(count.bit_length() - 1, 0), _PART * _LEAST) // _PART
    return max(-(-count // step), 1) * step
