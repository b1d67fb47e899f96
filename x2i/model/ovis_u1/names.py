"""Names of Ovis-U1's weights. They are the published ones; the published file holds its autoencoder too."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

VAE = "visual_generator.vae."
HEAD, EMBEDDING = "llm.lm_head.weight", "llm.model.embed_tokens.weight"


def split_vae(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A published state as this package's model takes it, and its SDXL autoencoder as diffusers' AutoencoderKL does.

    The language model's output map is its token embedding: a copy by the map's name is left out, and where a file has
    only that name, it is the embedding.
    """
    vae = {name.removeprefix(VAE): tensor for name, tensor in state.items() if name.startswith(VAE)}
    model = {name: tensor for name, tensor in state.items() if not name.startswith(VAE) and name != HEAD}
    if HEAD in state:
        model.setdefault(EMBEDDING, state[HEAD])
    return model, vae


def with_vae(model: Mapping[str, Tensor], vae: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse: one state in the published names."""
    return {**model, **{VAE + name: tensor for name, tensor in vae.items()}}
