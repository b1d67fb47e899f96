"""Ovis-U1's numbers as AIDC-AI writes them: the published config.json and preprocessor_config.json. Light: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from x2i.base.errors import X2IError
from x2i.model.layers.config import to_published_encoder
from x2i.model.ovis_u1.config import OvisU1Config

#: What the published code has as constants: of the decoder, and of the visual tokenizer.
CONSTANTS = {"patch_size": 2, "time_dim": 256, "refiner_depth": 2, "refiner_heads": 24}
#: Its classes are in the published repository.
_CODE = "AIDC-AI/Ovis-U1-3B--"


def from_published(published: Mapping[str, Any], where: str) -> OvisU1Config:
    """Our numbers of a published config.json. Raises X2IError if one is missing, or what they say is not known here."""
    try:
        llm, seen, drawn = (published[f"{part}_config"] for part in ("llm", "visual_tokenizer", "visual_generator"))
        encoder = seen["backbone_config"]
        found = {
            "llm": {
                "hidden_size": llm["hidden_size"],
                "layers": llm["num_hidden_layers"],
                "heads": llm["num_attention_heads"],
                "kv_heads": llm["num_key_value_heads"],
                "head_dim": llm["head_dim"],
                "intermediate_size": llm["intermediate_size"],
                "vocab_size": llm["vocab_size"],
                "norm_eps": llm["rms_norm_eps"],
                "rope_theta": llm["rope_theta"],
                "max_positions": llm["max_position_embeddings"],
            },
            "tokenizer": {
                "encoder": {
                    "hidden_size": encoder["hidden_size"],
                    "layers": encoder["num_hidden_layers"],
                    "heads": encoder["num_attention_heads"],
                    "intermediate_size": encoder["intermediate_size"],
                    "patch_size": encoder["patch_size"],
                    "image_size": encoder["image_size"],
                    "norm_eps": encoder["rms_norm_eps"],
                    "rope": not encoder["disable_rope"],
                    "hidden_stride": encoder["hidden_stride"],
                    "qkv_bias": encoder["qkv_bias"],
                    "use_bias": encoder["use_bias"],
                },
                "vocab_size": seen["vocab_size"],
                "tokenize": seen["tokenize_function"],
                "tau": seen["tau"],
            },
            "decoder": {
                "in_channels": drawn["in_channels"],
                "out_channels": drawn["out_channels"],
                "vec_in_dim": drawn["vec_in_dim"],
                "context_in_dim": drawn["context_in_dim"],
                "hidden_size": drawn["hidden_size"],
                "mlp_ratio": drawn["mlp_ratio"],
                "heads": drawn["num_heads"],
                "depth": drawn["depth"],
                "depth_single": drawn["depth_single_blocks"],
                "axes_dim": drawn["axes_dim"],
                "theta": drawn["theta"],
                "qkv_bias": drawn["qkv_bias"],
                "base_shift": drawn["base_shift"],
                "max_shift": drawn["max_shift"],
            },
            "min_pixels": seen["min_pixels"],
            "max_pixels": seen["max_pixels"],
            "max_tokens": published["multimodal_max_length"],
        }
        return OvisU1Config.model_validate(found)
    except KeyError as error:
        raise X2IError(f"{where}: no published Ovis-U1: {error} is not there") from None
    except ValueError as error:
        raise X2IError(f"{where}: {error}") from None


def to_published(config: OvisU1Config, vae_config: Mapping[str, Any] | None, dtype: str) -> dict[str, Any]:
    """The published config.json.

    Args:
        config: our numbers.
        vae_config: of diffusers' AutoencoderKL; None where the model has another autoencoder.
        dtype: of the weights: bfloat16, float32 …
    """
    llm, seen, drawn = config.llm, config.tokenizer, config.decoder
    encoder = seen.encoder
    image = {
        "hidden_stride": encoder.hidden_stride,
        "disable_rope": not encoder.rope,
        "interpolate_pe_method": "two_dim",
        "preserve_original_pe": True,
        "temporal_patch_size": 1,
        "window_size": 112,
        "fullatt_block_indexes": None,
        "min_pixels": config.min_pixels,
        "max_pixels": config.max_pixels,
    }
    return {
        "architectures": ["OvisU1"],
        "auto_map": {
            "AutoConfig": f"{_CODE}configuration_ovis_u1.OvisU1Config",
            "AutoModelForCausalLM": f"{_CODE}modeling_ovis_u1.OvisU1",
        },
        "model_type": "ovis_u1",
        "conversation_formatter_class": "Qwen3ConversationFormatter",
        "disable_tie_weight": False,
        "hidden_size": llm.hidden_size,
        "llm_attn_implementation": None,
        "multimodal_max_length": config.max_tokens,
        "torch_dtype": dtype,
        "use_cache": False,
        "llm_config": {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "hidden_size": llm.hidden_size,
            "num_hidden_layers": llm.layers,
            "num_attention_heads": llm.heads,
            "num_key_value_heads": llm.kv_heads,
            "head_dim": llm.head_dim,
            "intermediate_size": llm.intermediate_size,
            "vocab_size": llm.vocab_size,
            "rms_norm_eps": llm.norm_eps,
            "rope_theta": llm.rope_theta,
            "rope_scaling": None,
            "max_position_embeddings": llm.max_positions,
            "max_window_layers": llm.layers,
            "sliding_window": None,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
        },
        "visual_tokenizer_config": {
            "model_type": "aimv2_visual_tokenizer",
            "vocab_size": seen.vocab_size,
            "tokenize_function": seen.tokenize,
            "tau": seen.tau,
            "depths": None,
            "drop_cls_token": False,
            "use_indicators": False,
            **image,
            "backbone_config": {
                "architectures": ["AIMv2Model"],
                "model_type": "aimv2",
                **to_published_encoder(encoder),
                "projection_dropout": 0.0,
                "use_bias": encoder.use_bias,
                **image,
            },
        },
        "visual_generator_config": {
            "architectures": ["YakModel"],
            "model_type": "yak",
            "in_channels": drawn.in_channels,
            "out_channels": drawn.out_channels,
            "vec_in_dim": drawn.vec_in_dim,
            "context_in_dim": drawn.context_in_dim,
            "hidden_size": drawn.hidden_size,
            "mlp_ratio": drawn.mlp_ratio,
            "num_heads": drawn.heads,
            "depth": drawn.depth,
            "depth_single_blocks": drawn.depth_single,
            "axes_dim": list(drawn.axes_dim),
            "theta": drawn.theta,
            "qkv_bias": drawn.qkv_bias,
            "guidance_embed": False,
            "checkpoint": False,
            "txt_type": "refiner",
            "timestep_shift": True,
            "base_shift": drawn.base_shift,
            "max_shift": drawn.max_shift,
            "vae_config": None if vae_config is None else dict(vae_config),
        },
    }


def preprocessor(config: OvisU1Config) -> dict[str, Any]:
    """The published preprocessor_config.json: sides of images are free, so that it names none."""
    encoder = config.tokenizer.encoder
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_center_crop": False,
        "do_rescale": True,
        "do_normalize": True,
        "crop_size": {"height": -1, "width": -1},
        "size": {"shortest_edge": -1},
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "patch_size": encoder.patch_size,
        "hidden_stride": encoder.hidden_stride,
        "temporal_patch_size": 1,
        "min_pixels": config.min_pixels,
        "max_pixels": config.max_pixels,
    }


def unusual(config: OvisU1Config) -> list[str]:
    """What differs from the constants of the published code: with any of it, that code cannot open the folder."""
    found = config.decoder
    return [
        f"{name} {getattr(found, name)}, not {usual}"
        for name, usual in CONSTANTS.items()
        if getattr(found, name) != usual
    ]
