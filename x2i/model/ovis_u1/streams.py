"""How the decoder's two streams, text and image, lie: as rows of a batch, padded, or as documents one after the other.

The decoder's blocks work on either: they ask a stream to spread what is modulated over its tokens, and to attend.

- rows: padding is masked
- documents (packs): every token sees all of its own document, so each attends by itself, without a mask
  (`x2i.model.layers.within`); of whatever length text and picture are, no token is computed in vain

Tensor names carry their axes:
    B rows · G documents · L text tokens · I image tokens · S = L + I · D width · H heads · E width of a head · K = E / 2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from x2i.model.layers import within

Rotation = tuple[Tensor, Tensor]  # cosines and sines, float32 [B, 1, S, K]


class Stream(Protocol):
    """Tokens that are modulated and attend together."""

    def spread(self, values_BD: Tensor) -> Tensor:
        """Values of each row or document, [B, D] or [G, D], in a shape that goes with its tokens [B, S, D]."""
        ...

    def attend(self, q_BHSE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor) -> Tensor:
        """Attention, with rotary positions where the stream has them, [B, S, D]."""
        ...


class Streams(Protocol):
    """Text, image, and both together."""

    @property
    def text(self) -> Stream: ...

    @property
    def image(self) -> Stream: ...

    @property
    def whole(self) -> Stream: ...

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        """Tokens of both, [..., L, D] and [..., I, D] -> [..., S, D]."""
        ...

    def part(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        """The reverse of `join`."""
        ...


@dataclass(frozen=True)
class Rows:
    """Rows of a batch. `allowed_B11S` is False on padding; None where there is none."""

    allowed_B11S: Tensor | None = None
    rotation: Rotation | None = None

    def spread(self, values_BD: Tensor) -> Tensor:
        return values_BD[:, None]

    def attend(self, q_BHSE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor) -> Tensor:
        q, k = rotated(q_BHSE, k_BHSE, self.rotation)
        return F.scaled_dot_product_attention(q, k, v_BHSE, attn_mask=self.allowed_B11S).transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class RowStreams:
    """Streams of a batch: the text, of `length` tokens, stands in front of the image."""

    whole: Rows
    length: int

    @property
    def text(self) -> Rows:
        return Rows()  # it never attends alone

    @property
    def image(self) -> Rows:
        allowed, rotation = self.whole.allowed_B11S, self.whole.rotation
        return Rows(
            None if allowed is None else allowed[..., self.length :],
            None if rotation is None else (rotation[0][:, :, self.length :], rotation[1][:, :, self.length :]),
        )

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        return torch.cat([text, image], dim=-2)

    def part(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        return whole[..., : self.length, :], whole[..., self.length :, :]


@dataclass(frozen=True)
class Documents:
    """Documents of so many tokens one after the other, as one row; `rows_S` says whose token it is."""

    lengths: tuple[int, ...]
    rows_S: Tensor
    rotation: Rotation | None = None

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Documents:
        return cls(tuple(lengths), torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)))

    def to(self, device: torch.device | str) -> Documents:
        """The same on another device, without positions."""
        return Documents(self.lengths, self.rows_S.to(device))

    def spread(self, values_BD: Tensor) -> Tensor:
        return values_BD.index_select(0, self.rows_S)[None]

    def attend(self, q_BHSE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor) -> Tensor:
        q, k = rotated(q_BHSE, k_BHSE, self.rotation)
        q_SHE, k_SHE, v_SHE = (x[0].transpose(0, 1) for x in (q, k, v_BHSE))
        return within.attend(q_SHE, k_SHE, v_SHE, self.lengths).flatten(1)[None]


@dataclass(frozen=True)
class DocumentStreams:
    """Two streams of the same documents, and both together: of each document the text's tokens, then the image's.

    Attributes:
        text, image, whole: the streams.
        order_S: which token of [all text][all image] stands where in `whole`.
        text_L, image_I: where each token of the two stands in `whole`.
    """

    text: Documents
    image: Documents
    whole: Documents
    order_S: Tensor
    text_L: Tensor
    image_I: Tensor

    @classmethod
    def of(cls, text: Sequence[int], image: Sequence[int]) -> DocumentStreams:
        """Of documents of so many tokens of text and of image; on the CPU."""
        both = [n for pair in zip(text, image, strict=True) for n in pair]
        parts = torch.arange(sum(both)).split(both)
        text_L, image_I = torch.cat(parts[::2]), torch.cat(parts[1::2])
        return cls(
            text=Documents.of(text),
            image=Documents.of(image),
            whole=Documents.of([a + b for a, b in zip(text, image, strict=True)]),
            order_S=torch.cat([text_L, image_I]).argsort(),
            text_L=text_L,
            image_I=image_I,
        )

    def to(self, device: torch.device | str) -> DocumentStreams:
        """The same on another device, without positions."""
        return DocumentStreams(*(getattr(self, field.name).to(device) for field in fields(self)))

    def placed(self, rotation: Rotation) -> DocumentStreams:
        """The same streams with positions, those of `whole`."""
        of_image = rotation[0].index_select(2, self.image_I), rotation[1].index_select(2, self.image_I)
        return replace(self, image=replace(self.image, rotation=of_image), whole=replace(self.whole, rotation=rotation))

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        return torch.cat([text, image], dim=-2).index_select(-2, self.order_S)

    def part(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        return whole.index_select(-2, self.text_L), whole.index_select(-2, self.image_I)


def rotated(q_BHSE: Tensor, k_BHSE: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
    """Queries and keys at their positions."""
    return (q_BHSE, k_BHSE) if rotation is None else (rotate(q_BHSE, rotation), rotate(k_BHSE, rotation))


def rotate(x_BHSE: Tensor, rotation: Rotation) -> Tensor:
    """Turn neighbouring pairs of values by their angles, in float32; the result has x's dtype."""
    cos, sin = rotation
    first, second = x_BHSE.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([cos * first - sin * second, sin * first + cos * second], dim=-1)
    return turned.flatten(-2).to(x_BHSE.dtype)
