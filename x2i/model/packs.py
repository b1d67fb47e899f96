"""What the packs of all architectures that draw have in common: what fits, and which pictures they were made for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from x2i.base.errors import X2IError

#: Latent height and width.
Size = tuple[int, int]


def check_room(lengths: Sequence[int], length: int) -> None:
    """Raise X2IError if documents of so many tokens do not fit into a pack of `length`."""
    if sum(lengths) > length:
        raise X2IError(
            f"{len(lengths)} documents of {sum(lengths)} tokens do not fit into a pack of {length}: "
            "leave some out, or make packs longer"
        )


def check_pictures(sizes: Sequence[Size], x: Sequence[Tensor], t_G: Tensor) -> None:
    """Raise X2IError if these noisy latents [C, H, W] and timesteps are not those of a pack with pictures of `sizes`."""
    found = [(latents.shape[-2], latents.shape[-1]) for latents in x]
    if found != list(sizes) or len(t_G) != len(x):
        raise X2IError(
            f"a pack made for pictures of latent sizes {list(sizes)} was given {found}, and {len(t_G)} timesteps"
        )
