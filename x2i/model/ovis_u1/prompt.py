"""Ovis-U1's sequences: text with runs of visual tokens between two indicators, and the images themselves as patches.

An image is [start][visual tokens][end]: the indicators are rows of the visual embedding table, the visual tokens what
the tokenizer makes of the patches. Batches are padded on the right: the language model is causal, so nothing looks at
padding. An image that stands in several places or rows is held once.

Tensor names carry their axes: B batch · L tokens (padded) · N patches of all images · F values of a patch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from x2i.base.errors import X2IError
from x2i.model.layers.aimv2 import Grid, patchify
from x2i.model.layers.chat import IGNORE, IMAGE, Formatted
from x2i.model.ovis_u1.config import OvisU1Config
from x2i.model.placeholders import numbers_of, with_placeholders

#: What stands at a place of `OvisInputs.marks_BL`, other than an indicator (its row of the visual table).
TEXT, VISUAL = -1, -2
#: CLIP's mean and standard deviation per channel (preprocessor_config.json of AIDC-AI/Ovis-U1-3B).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
#: Values of an image, about, by which others are told apart from it before all are compared.
_LOOK = 64

_PLACE = r"\s*(?:<img>)?<\|image_(\d+)\|>(?:</img>)?\s*"


@dataclass(frozen=True)
class OvisInputs:
    """A batch of sequences.

    Attributes:
        ids_BL: token ids; 0 where no text stands.
        marks_BL: `TEXT` (and on padding), `VISUAL`, or the row of the visual table of an indicator.
        lengths: tokens of each row; the rest is padding.
        patches_NF, grids: the images, each once, as `patchify` makes them; None without images.
        shown: which image stands at each run of visual tokens, row by row.
        labels_BL: token ids to be learned, `IGNORE` elsewhere; None without labels.
        sources: for each row the latents [C, H, W] of its source images, for the decoder.
    """

    ids_BL: Tensor
    marks_BL: Tensor
    lengths: tuple[int, ...]
    patches_NF: Tensor | None = None
    grids: tuple[Grid, ...] = ()
    shown: tuple[int, ...] = ()
    labels_BL: Tensor | None = None
    sources: tuple[tuple[Tensor, ...], ...] = ()

    def to(self, device: torch.device | str) -> OvisInputs:
        """The same batch on another device."""
        return replace(
            self,
            ids_BL=self.ids_BL.to(device),
            marks_BL=self.marks_BL.to(device),
            patches_NF=None if self.patches_NF is None else self.patches_NF.to(device),
            labels_BL=None if self.labels_BL is None else self.labels_BL.to(device),
            sources=tuple(tuple(latents.to(device) for latents in row) for row in self.sources),
        )


@dataclass(frozen=True)
class Row:
    """One sequence: ids, marks and labels of each place, and the images that it shows, in order."""

    ids: tuple[int, ...]
    marks: tuple[int, ...]
    labels: tuple[int, ...]
    shown: tuple[int, ...]


@dataclass
class Pictures:
    """The images of a batch, each once."""

    config: OvisU1Config
    images: list[Tensor] = field(default_factory=list)
    _known: dict[Hashable, int] = field(default_factory=dict)

    def add(self, key: Hashable, make: Callable[[], Image.Image | Tensor]) -> int:
        """The number of the image of this key; it is made when first seen, its sides multiples of `image_factor`.

        A tensor is normalised already.
        """
        if key not in self._known:
            self._known[key] = len(self.images)
            made = make()
            self.images.append(made if isinstance(made, Tensor) else normalised(made))
        return self._known[key]

    def tokens(self, number: int) -> int:
        """How many visual tokens an image is."""
        height, width = self.images[number].shape[-2:]
        return int(height * width) // self.config.image_factor**2

    def row(self, words: Formatted, shown: Sequence[int]) -> Row:
        """A sequence with its images in their places. Raises X2IError if it has not as many places as images."""
        if words.ids.count(IMAGE) != len(shown):
            raise X2IError(f"{len(shown)} images, but {words.ids.count(IMAGE)} marks <image> in the words")
        start, end = self.config.start_row, self.config.start_row + 1
        ids: list[int] = []
        marks: list[int] = []
        labels: list[int] = []
        left = iter(shown)
        for token, label in zip(words.ids, words.labels, strict=True):
            new = [start, *[VISUAL] * self.tokens(next(left)), end] if token == IMAGE else [TEXT]
            marks += new
            ids += [0 if token == IMAGE else token] * len(new)
            labels += [label] * len(new)
        return Row(tuple(ids), tuple(marks), tuple(labels), tuple(shown))

    def collate(self, rows: Sequence[Row], labels: bool, sources: Sequence[Sequence[Tensor]] = ()) -> OvisInputs:
        """Pad rows on the right into one batch."""
        lengths = tuple(len(row.ids) for row in rows)
        over = [max(lengths) - length for length in lengths]
        encoder = self.config.tokenizer.encoder
        used = sorted({number for row in rows for number in row.shown})
        place = {number: i for i, number in enumerate(used)}
        patches: Tensor | None = None
        grids: list[Grid] = []
        if used:
            patches, grids = patchify([self.images[n] for n in used], encoder.patch_size, encoder.hidden_stride)
        return OvisInputs(
            ids_BL=torch.tensor([[*row.ids, *[0] * n] for row, n in zip(rows, over, strict=True)]),
            marks_BL=torch.tensor([[*row.marks, *[TEXT] * n] for row, n in zip(rows, over, strict=True)]),
            lengths=lengths,
            patches_NF=patches,
            grids=tuple(grids),
            shown=tuple(place[number] for row in rows for number in row.shown),
            labels_BL=torch.tensor([[*row.labels, *[IGNORE] * n] for row, n in zip(rows, over, strict=True)])
            if labels
            else None,
            sources=tuple(tuple(row) for row in sources),
        )


class Distinct:
    """The images of a pack, each once: the blank one of a size, that of an example that comes twice, of two answers."""

    def __init__(self, factor: int) -> None:
        self.held: list[Tensor] = []
        self._factor = factor
        self._known: dict[tuple[Any, ...], list[tuple[Tensor, int]]] = {}  # images that look alike, and their places
        self._tokens = 0

    def add(self, image: Tensor) -> tuple[int, int, bool]:
        """Visual tokens of an image, the place of the first among those of all, and whether the image is new."""
        tokens = image.shape[-2] * image.shape[-1] // self._factor**2
        some = image.flatten()[:: image.numel() // _LOOK + 1]
        alike = self._known.setdefault((*image.shape, *some.tolist()), [])
        for other, place in alike:
            if other is image or torch.equal(other, image):
                return tokens, place, False
        place = self._tokens
        alike.append((image, place))
        self.held.append(image)
        self._tokens += tokens
        return tokens, place, True


def normalised(image: Image.Image) -> Tensor:
    """RGB pixels as the encoder reads them: float32 [3, H, W], CLIP's mean and deviation."""
    pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"), dtype=np.float32) / 255
    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
    return torch.from_numpy((pixels - mean) / std).permute(2, 0, 1)


def white(config: OvisU1Config, height: int, width: int) -> Tensor:
    """A white image of this height and width, scaled and normalised as it is read."""
    return normalised(resized(Image.new("RGB", (width, height), (255, 255, 255)), config))


def resized(image: Image.Image, config: OvisU1Config, max_pixels: int | None = None) -> Image.Image:
    """An image at the resolution at which it is read, between `min_pixels` and `max_pixels`, about its own aspect."""
    largest = max_pixels or config.max_pixels
    height, width = smart_resize(
        image.height, image.width, config.image_factor, min(config.min_pixels, largest), largest
    )
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return rgb if rgb.size == (width, height) else rgb.resize((width, height), Image.Resampling.BICUBIC)


def resized_to_draw(image: Image.Image, config: OvisU1Config) -> Image.Image:
    """An image as it is read in order to draw: about `min_pixels`. Scaled twice, as published: down, then up to it."""
    height, width = drawing_size(image.height, image.width, config)
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return resized(rgb.resize((width, height), Image.Resampling.BICUBIC), config)


def drawing_size(height: int, width: int, config: OvisU1Config) -> tuple[int, int]:
    """Height and width after the first scaling of `resized_to_draw`: at most `min_pixels`, which here is the upper end."""
    return smart_resize(height, width, config.image_factor, 4 * config.image_factor**2, config.min_pixels)


def tokens_to_draw(height: int, width: int, config: OvisU1Config) -> int:
    """Visual tokens of an image of this size, blank or a source, as it is read in order to draw."""
    sides = drawing_size(height, width, config)
    height, width = smart_resize(*sides, config.image_factor, config.min_pixels, config.max_pixels)
    return height * width // config.image_factor**2


def smart_resize(
    height: int, width: int, factor: int = 28, min_pixels: int = 56 * 56, max_pixels: int = 28 * 28 * 1280
) -> tuple[int, int]:
    """Height and width nearest to the given ones that are multiples of `factor`, with pixels between the two ends.

    The rule of Qwen2-VL with what the published code of AIDC-AI/Ovis-U1-3B adds: a side below `factor` is enlarged to
    it with the other in proportion, and a side over 200 times the other is cut to that. With a `factor` of 32 it gives
    the size of the picture that the published script draws when it edits one of this size.
    """
    if min(height, width) < factor:
        if height < width:
            height, width = factor, round(factor / height * width)
        else:
            height, width = round(factor / width * height), factor
    elif max(height, width) / min(height, width) > 200:
        height, width = min(height, 200 * width), min(width, 200 * height)
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        # at least one: the published rule gives 0 for a thin picture, and fails
        rows, columns = max(1, math.floor(height / scale / factor)), max(1, math.floor(width / scale / factor))
    elif rows * columns * factor**2 < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * scale / factor), math.ceil(width * scale / factor)
    return rows * factor, columns * factor


def named(instruction: str, count: int) -> str:
    """An instruction whose placeholders have become words, for images that stand in front of it.

    The only image goes unnamed. Of several, the placeholder of the k-th becomes "image k"; placeholders that all stand
    in front of the words name nothing there, and are left out. Raises X2IError as `numbers_of`.
    """
    numbers_of(with_placeholders(instruction, count), count)
    head = re.match(f"(?:{_PLACE})*", instruction)
    text = instruction[head.end() :] if head and not re.search(_PLACE, instruction[head.end() :]) else instruction
    text = re.sub(_PLACE, lambda found: f" image {found[1]} " if count > 1 else " ", text)
    return re.sub(r" (?=[,.;:!?)])", "", re.sub(r" {2,}", " ", text)).strip()
