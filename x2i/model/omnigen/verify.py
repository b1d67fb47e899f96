"""OmniGen against diffusers' OmniGenTransformer2DModel, and against the published checkpoint's names."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from x2i.model import verify
from x2i.model.omnigen import names as renaming
from x2i.model.omnigen.config import PRESETS, LongRope, OmniGenConfig
from x2i.model.omnigen.masks import hybrid_mask
from x2i.model.omnigen.model import OmniGen
from x2i.model.omnigen.prompt import Prompt, collate
from x2i.model.omnigen.published import to_transformer

PUBLISHED = ("omnigen-3.8b",)
SMALL = OmniGenConfig(
    hidden_size=32,
    layers=2,
    heads=4,
    kv_heads=4,
    intermediate_size=48,
    vocab_size=100,
    max_positions=512,
    in_channels=4,
    pos_embed_max_size=16,
    pos_embed_base_size=64,
    time_dim=16,
    rope_scaling=LongRope(short_factor=(1.0, 1.1, 1.2, 1.3), long_factor=(2.0, 3.0, 4.0, 5.0), original=128),
)
#: Tokens of condition images -> their latents' height and width.
GRIDS = {4: (4, 4), 6: (4, 6), 9: (6, 6)}
_CASES = {"no image": (), "one image": (6,), "three images": (4, 6, 9)}


def parameters(model: str) -> list[verify.Parameters]:
    """All, and the trunk."""
    return [
        verify.Parameters(model, "all", verify.count(model), 3_762_072_592, verify.version("diffusers")),
        verify.Parameters(
            model,
            "table of positions (buffer)",
            verify.on_meta(model).state_dict()["pos_embed"].numel(),
            113_246_208,
            "size of the published file",
        ),
    ]


def names(model: str) -> list[verify.Names]:
    """The published checkpoint's, and those of diffusers' class after the map."""
    state = verify.on_meta(model).state_dict()
    config = PRESETS[model]
    published = checkpoint(config)
    found = [verify.matched(model, "all", verify.shapes(state), published, "published checkpoint's list")]
    source = f"{verify.version('diffusers')} OmniGenTransformer2DModel, after the map"
    mapped = verify.shapes(renaming.to_diffusers(state, config))
    with torch.device("meta"):
        theirs = verify.shapes(of_diffusers(config).state_dict())
    return [*found, verify.matched(model, "all", mapped, theirs, source)]


def outputs() -> list[verify.Comparison]:
    """Velocities with none, one and three condition images, before and past the switch of the long rope."""
    note = "latents of 6 x 10, rows of unequal length"
    return [
        verify.Comparison(
            f"velocity, {name}{', past the long-rope switch' if long else ''}",
            f"{verify.version('diffusers')} OmniGenTransformer2DModel",
            partial(velocities, sizes, long),
            note,
        )
        for long in (False, True)
        for name, sizes in _CASES.items()
    ]


def checkpoint(config: OmniGenConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published checkpoint (Shitao/OmniGen-v1), in the numbers of a configuration."""
    wide, inner, time = config.hidden_size, config.intermediate_size, config.time_dim
    latents, patch = config.in_channels, config.patch_size
    layer = {
        "self_attn.qkv_proj.weight": (3 * wide, wide),
        "self_attn.o_proj.weight": (wide, wide),
        "mlp.gate_up_proj.weight": (2 * inner, wide),
        "mlp.down_proj.weight": (wide, inner),
        "input_layernorm.weight": (wide,),
        "post_attention_layernorm.weight": (wide,),
    }
    out: dict[str, tuple[int, ...]] = {
        f"llm.layers.{i}.{name}": shape for i in range(config.layers) for name, shape in layer.items()
    }
    out |= {"llm.embed_tokens.weight": (config.vocab_size, wide), "llm.norm.weight": (wide,)}
    out["pos_embed"] = (1, config.pos_embed_max_size**2, wide)
    for name in ("x_embedder", "input_x_embedder"):
        out |= {f"{name}.proj.weight": (wide, latents, patch, patch), f"{name}.proj.bias": (wide,)}
    for name in ("time_token", "t_embedder"):
        out |= {f"{name}.mlp.0.weight": (wide, time), f"{name}.mlp.2.weight": (wide, wide)}
        out |= {f"{name}.mlp.{i}.bias": (wide,) for i in (0, 2)}
    values = latents * patch**2
    out |= {"final_layer.linear.weight": (values, wide), "final_layer.linear.bias": (values,)}
    modulation = "final_layer.adaLN_modulation.1"
    return out | {f"{modulation}.weight": (2 * wide, wide), f"{modulation}.bias": (2 * wide,)}


def of_diffusers(config: OmniGenConfig) -> Any:
    """diffusers' class in the same numbers, with fresh weights. Raises ModuleNotFoundError."""
    from diffusers import OmniGenTransformer2DModel

    numbers = {name: value for name, value in to_transformer(config).items() if not name.startswith("_")}
    return OmniGenTransformer2DModel(**numbers).eval()


def randomised(config: OmniGenConfig = SMALL) -> OmniGen:
    """A model whose every parameter is random, the zero-initialised head too."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = OmniGen(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    torch.random.set_rng_state(state)
    return model


def text(length: int, seed: int) -> Prompt:
    """A prompt of words alone."""
    ids = torch.randint(3, 100, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Prompt(tuple(ids), (0,) * length, ())


def with_images(seed: int, before: int, *sizes: int, after: int = 3) -> Prompt:
    """Text, then image, then text …: `sizes` are the images' tokens."""
    ids, blocks = list(text(before, seed).ids), [0] * before
    for place, size in enumerate(sizes, 1):
        ids += [0] * size + list(text(after, seed + place).ids)
        blocks += [place] * size + [0] * after
    return Prompt(tuple(ids), tuple(blocks), tuple(range(len(sizes))))


def velocities(sizes: tuple[int, ...], long: bool) -> tuple[Tensor, Tensor]:
    """Ours and diffusers' of two rows of unequal length, at latents of 6 x 10. Raises ModuleNotFoundError.

    Args:
        sizes: tokens of the first row's condition images, of `GRIDS`; the second row has none.
        long: whether the sequence passes the length from which the long rope's other factors count.
    """
    ours, theirs = randomised(), of_diffusers(SMALL)
    theirs.load_state_dict(renaming.to_diffusers(ours.state_dict(), SMALL))
    # the first row is the longest, since diffusers takes every row's images from the first
    prompts = [with_images(1, 150 if long else 12, *sizes), text(7, seed=9)]
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(4, *GRIDS[size], generator=generator) for size in sizes]
    batch = collate(prompts, [images, []])
    x_BCHW, t_B = torch.randn(2, 4, 6, 10, generator=generator), torch.tensor([0.3, 0.8])
    noisy, length = 3 * 5, batch.ids_BL.shape[1]
    spans: Mapping[int, list[list[int]]] = {0: []} if sizes else {}
    for block in range(1, len(sizes) + 1):
        where = (batch.blocks_BL[0] == block).nonzero().flatten()
        spans[0].append([int(where[0]), int(where[-1]) + 1])
    positions = torch.zeros(2, length + 1 + noisy, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        pad = length - len(prompt.ids)
        positions[row, pad:] = torch.arange(length + 1 + noisy - pad)
    with torch.no_grad():
        public = theirs(
            hidden_states=x_BCHW,
            timestep=t_B,
            input_ids=batch.ids_BL,
            input_img_latents=[image[None] for image in images],
            input_image_sizes=spans,
            attention_mask=hybrid_mask(batch.valid_BL, batch.blocks_BL, noisy).float(),
            position_ids=positions,
            return_dict=False,
        )[0]
        return ours(x_BCHW, t_B, batch), public
