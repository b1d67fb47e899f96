"""OmniGen's numbers as others write them: the published folder's Phi-3 config.json, diffusers' transformer/config.json.

The published file says nothing of patches, tables and latents: its code has them as constants, and the tensors' shapes
tell. Light to import: no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from x2i.base.errors import X2IError
from x2i.model.omnigen.config import LongRope, OmniGenConfig

Shapes = Mapping[str, tuple[int, ...]]

#: What the published code takes for granted, and what its pipeline and diffusers' do (16 pixels a token).
CONSTANTS = {"in_channels": 4, "patch_size": 2, "pos_embed_max_size": 192, "pos_embed_base_size": 64, "time_dim": 256}


def from_phi3(numbers: Mapping[str, Any], shapes: Shapes, where: str) -> OmniGenConfig:
    """Our numbers of a published folder.

    Args:
        numbers: the content of its config.json, as any version of transformers writes it.
        shapes: of its tensors.
        where: the file, for messages.

    Raises:
        X2IError: it is no Phi-3, a number is missing, or the tensors are not OmniGen's.
    """
    if numbers.get("model_type") != "phi3":
        raise X2IError(f"{where}: model_type is {numbers.get('model_type')!r}; OmniGen's published trunk is 'phi3'")
    rope = numbers.get("rope_scaling") or numbers.get("rope_parameters") or {}
    try:
        patch = shapes["x_embedder.proj.weight"]
        theta = numbers.get("rope_theta") or rope.get("rope_theta") or 10_000.0
        return OmniGenConfig(
            hidden_size=numbers["hidden_size"],
            layers=numbers["num_hidden_layers"],
            heads=numbers["num_attention_heads"],
            kv_heads=numbers.get("num_key_value_heads") or numbers["num_attention_heads"],
            intermediate_size=numbers["intermediate_size"],
            vocab_size=numbers["vocab_size"],
            norm_eps=numbers["rms_norm_eps"],
            rope_theta=theta,
            rope_scaling=_long_rope(
                rope, numbers.get("original_max_position_embeddings"), numbers["max_position_embeddings"]
            ),
            max_positions=numbers["max_position_embeddings"],
            in_channels=patch[1],
            patch_size=patch[2],
            pos_embed_max_size=round(shapes["pos_embed"][1] ** 0.5),
            pos_embed_base_size=CONSTANTS["pos_embed_base_size"],
            time_dim=shapes["time_token.mlp.0.weight"][1],
        )
    except (KeyError, IndexError) as error:
        raise X2IError(f"{where}: no OmniGen: {error} is not there") from None
    except ValueError as error:
        raise X2IError(f"{where}: {error}") from None


def to_phi3(config: OmniGenConfig) -> dict[str, Any]:
    """The published config.json. Raises X2IError if the trunk is none that it can describe."""
    _require_phi3(config, "the published layout")
    scaling = config.rope_scaling
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else {"type": "longrope", **_factors(scaling)},
        "max_position_embeddings": config.max_positions,
        "original_max_position_embeddings": config.max_positions if scaling is None else scaling.original,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def from_transformer(numbers: Mapping[str, Any], where: str) -> OmniGenConfig:
    """Our numbers of diffusers' OmniGenTransformer2DModel. Raises X2IError if they are another model's."""
    if numbers.get("_class_name") != "OmniGenTransformer2DModel":
        raise X2IError(f"{where}: _class_name is {numbers.get('_class_name')!r}, not OmniGenTransformer2DModel")
    try:
        return OmniGenConfig(
            hidden_size=numbers["hidden_size"],
            layers=numbers["num_layers"],
            heads=numbers["num_attention_heads"],
            kv_heads=numbers["num_key_value_heads"],
            intermediate_size=numbers["intermediate_size"],
            vocab_size=numbers["vocab_size"],
            norm_eps=numbers["rms_norm_eps"],
            rope_theta=numbers["rope_base"],
            rope_scaling=_long_rope(
                numbers["rope_scaling"], numbers["original_max_position_embeddings"], numbers["max_position_embeddings"]
            ),
            max_positions=numbers["max_position_embeddings"],
            in_channels=numbers["in_channels"],
            patch_size=numbers["patch_size"],
            pos_embed_max_size=numbers["pos_embed_max_size"],
            pos_embed_base_size=CONSTANTS["pos_embed_base_size"],
            time_dim=numbers["time_step_dim"],
        )
    except KeyError as error:
        raise X2IError(f"{where}: {error} is not there") from None
    except ValueError as error:
        raise X2IError(f"{where}: {error}") from None


def to_transformer(config: OmniGenConfig) -> dict[str, Any]:
    """The config.json of diffusers' OmniGenTransformer2DModel. Raises X2IError if the trunk is none of its."""
    _require_phi3(config, "diffusers' OmniGenTransformer2DModel")
    scaling = config.rope_scaling
    if scaling is None:  # it cannot do without: factors of 1 up to the longest sequence change nothing
        ones = (1.0,) * (config.hidden_size // config.heads // 2)
        scaling = LongRope(short_factor=ones, long_factor=ones, original=config.max_positions)
    return {
        "_class_name": "OmniGenTransformer2DModel",
        "_diffusers_version": "0.33.0",
        "in_channels": config.in_channels,
        "patch_size": config.patch_size,
        "hidden_size": config.hidden_size,
        "rms_norm_eps": config.norm_eps,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.intermediate_size,
        "num_layers": config.layers,
        "pad_token_id": min(32_000, config.vocab_size - 1),
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "original_max_position_embeddings": scaling.original,
        "rope_base": config.rope_theta,
        "rope_scaling": {"type": "longrope", **_factors(scaling)},
        "pos_embed_max_size": config.pos_embed_max_size,
        "time_step_dim": config.time_dim,
        "flip_sin_to_cos": True,
        "downscale_freq_shift": 0,
        "timestep_activation_fn": "silu",
    }


def unusual(config: OmniGenConfig) -> list[str]:
    """What differs from the constants of the published code: with any of it, that code cannot open the folder."""
    return [
        f"{name} {getattr(config, name)}, not {usual}"
        for name, usual in CONSTANTS.items()
        if getattr(config, name) != usual
    ]


def _require_phi3(config: OmniGenConfig, what: str) -> None:
    if config.trunk != "phi3" or config.trunk_options:
        raise X2IError(f"{what} has a plain Phi-3 trunk; this model's is {config.trunk} {config.trunk_options or ''}")


def _factors(scaling: LongRope) -> dict[str, list[float]]:
    return {"short_factor": list(scaling.short_factor), "long_factor": list(scaling.long_factor)}


def _long_rope(rope: Mapping[str, Any] | None, original: int | None, max_positions: int) -> LongRope | None:
    if not rope or "short_factor" not in rope:
        return None
    length = original or rope.get("original_max_position_embeddings") or 4096
    if {*rope["short_factor"], *rope["long_factor"]} == {1.0} and length == max_positions:
        return None  # as `to_transformer` writes it
    return LongRope(short_factor=tuple(rope["short_factor"]), long_factor=tuple(rope["long_factor"]), original=length)
