"""OmniGen against diffusers' OmniGenTransformer2DModel, its published code, and the published checkpoint's names.

The published code (OmniGen/model.py of VectorSpaceLab/OmniGen at d475201) was run on a small network with weights by
name, in float32 on a CPU, over transformers' Phi-3 with its mask: its own trunk is written for an older transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from x2i.model import recorded, verify
from x2i.model.filling import draw, draw_ids, fill
from x2i.model.omnigen import names as renaming
from x2i.model.omnigen.config import PRESETS, LongRope, OmniGenConfig
from x2i.model.omnigen.masks import hybrid_mask
from x2i.model.omnigen.model import OmniGen
from x2i.model.omnigen.prompt import Prompt, PromptBatch, collate
from x2i.model.omnigen.published import to_transformer

PUBLISHED = ("omnigen-3.8b",)
SOURCE = "VectorSpaceLab/OmniGen@d475201"
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
CASES = {"no image": (), "one image": (6,), "three images": (4, 6, 9)}


def parameters(model: str) -> list[verify.Parameters]:
    """All, and the table of positions, which is a buffer: together the 15.50 GB of the published file, in float32."""
    source, table = "size of the published file, with the table", verify.on_meta(model).state_dict()["pos_embed"]
    return [
        verify.Parameters(model, "all", verify.count(model), 3_762_072_592, source),
        verify.Parameters(model, "table of positions (no parameters)", table.numel(), 113_246_208, source),
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
    """Velocities with none, one and three condition images; in diffusers also past the switch of the long rope."""
    note = "latents of 6 x 10, rows of unequal length"
    live = [
        verify.Comparison(
            f"velocity, {name}{', past the long-rope switch' if long else ''}",
            f"{verify.version('diffusers')} OmniGenTransformer2DModel",
            partial(velocities, sizes, long),
            note,
        )
        for long in (False, True)
        for name, sizes in CASES.items()
    ]
    whats = {published_case(name): sizes for name, sizes in CASES.items()}
    return [
        *live,
        *(verify.Comparison(what, SOURCE, partial(against_recorded, s, what), note) for what, s in whats.items()),
    ]


def published_case(name: str) -> str:
    """What a recorded comparison is called."""
    return f"velocity, {name}, published code"


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
    """A model whose every parameter is random, the zero-initialised head too. Seeds torch."""
    torch.manual_seed(0)
    model = OmniGen(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def filled(config: OmniGenConfig = SMALL) -> OmniGen:
    """A model filled by name."""
    model = OmniGen(config).eval()
    fill(model, 0.2)
    return model


def text(length: int, seed: int) -> Prompt:
    """A prompt of words alone."""
    return Prompt(tuple(draw_ids(seed, length, SMALL.vocab_size)), (0,) * length, ())


def with_images(seed: int, before: int, *sizes: int, after: int = 3) -> Prompt:
    """Text, then image, then text …: `sizes` are the images' tokens."""
    ids, blocks = list(text(before, seed).ids), [0] * before
    for place, size in enumerate(sizes, 1):
        ids += [0] * size + list(text(after, seed + place).ids)
        blocks += [place] * size + [0] * after
    return Prompt(tuple(ids), tuple(blocks), tuple(range(len(sizes))))


@dataclass(frozen=True)
class Case:
    """Two rows of unequal length; the first has the images. `spans` are their places, as both public codes take them."""

    x_BCHW: Tensor
    t_B: Tensor
    batch: PromptBatch
    images: tuple[Tensor, ...]
    spans: dict[int, list[list[int]]]
    positions: Tensor
    noisy: int


def case(sizes: tuple[int, ...], long: bool) -> Case:
    """Inputs at latents of 6 x 10.

    Args:
        sizes: tokens of the first row's condition images, of `GRIDS`; the second row has none.
        long: whether the sequence passes the length from which the long rope's other factors count.
    """
    # the first row is the longest, since diffusers takes every row's images from the first
    prompts = [with_images(1, 150 if long else 12, *sizes), text(7, seed=9)]
    images = tuple(draw(20 + i, 4, *GRIDS[size]) for i, size in enumerate(sizes))
    batch = collate(prompts, [images, ()])
    x_BCHW, t_B = draw(30, 2, 4, 6, 10), torch.tensor([0.3, 0.8])
    noisy, length = 3 * 5, batch.ids_BL.shape[1]
    spans: dict[int, list[list[int]]] = {0: []} if sizes else {}
    for block in range(1, len(sizes) + 1):
        where = (batch.blocks_BL[0] == block).nonzero().flatten()
        spans[0].append([int(where[0]), int(where[-1]) + 1])
    positions = torch.zeros(2, length + 1 + noisy, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        pad = length - len(prompt.ids)
        positions[row, pad:] = torch.arange(length + 1 + noisy - pad)
    return Case(x_BCHW, t_B, batch, images, spans, positions, noisy)


def velocities(sizes: tuple[int, ...], long: bool) -> tuple[Tensor, Tensor]:
    """Ours and diffusers' of the same inputs. Arguments as `case`. Raises ModuleNotFoundError."""
    ours, theirs, given = randomised(), of_diffusers(SMALL), case(sizes, long)
    theirs.load_state_dict(renaming.to_diffusers(ours.state_dict(), SMALL))
    with torch.no_grad():
        public = theirs(
            hidden_states=given.x_BCHW,
            timestep=given.t_B,
            input_ids=given.batch.ids_BL,
            input_img_latents=[image[None] for image in given.images],
            input_image_sizes=given.spans,
            attention_mask=hybrid_mask(given.batch.valid_BL, given.batch.blocks_BL, given.noisy).float(),
            position_ids=given.positions,
            return_dict=False,
        )[0]
        return ours(given.x_BCHW, given.t_B, given.batch), public


def against_recorded(sizes: tuple[int, ...], what: str) -> tuple[Tensor, Any]:
    """Ours, and the figures of the published code."""
    given = case(sizes, long=False)
    return filled()(given.x_BCHW, given.t_B, given.batch), recorded.content("omnigen")["outputs"][what]
