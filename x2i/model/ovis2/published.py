"""Ovis2's numbers as others write them: AIDC-AI's config.json (`ovis`), transformers' (`ovis2`). Light: no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from x2i.base.errors import X2IError
from x2i.model.layers.config import to_published_encoder
from x2i.model.ovis2.config import Ovis2Config

#: Its classes are in the published repositories.
_CODE = "AIDC-AI/Ovis2-1B--"
_MEAN, _STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def from_published(numbers: Mapping[str, Any], where: str) -> Ovis2Config:
    """Our numbers of AIDC-AI's config.json. Raises X2IError if one is missing, or it is another Ovis's."""
    try:
        llm, seen = numbers["llm_config"], numbers["visual_tokenizer_config"]
        encoder = seen["backbone_config"]
        if (llm["model_type"], encoder["model_type"]) != ("qwen2", "aimv2"):
            raise X2IError(
                f"{where}: an Ovis of {llm['model_type']} and {encoder['model_type']}; known is Ovis2, of qwen2 and aimv2"
            )
        return Ovis2Config.model_validate(
            {
                "llm": _llm(llm),
                "tokenizer": {
                    "encoder": _encoder(encoder, seen["hidden_stride"], encoder.get("use_bias", False)),
                    "vocab_size": seen["vocab_size"],
                    "indicators": 5,
                    "tokenize": seen["tokenize_function"],
                    "tau": seen.get("tau", 1.0),
                },
                "max_length": numbers["multimodal_max_length"],
            }
        )
    except KeyError as error:
        raise X2IError(f"{where}: no published Ovis2: {error} is not there") from None
    except ValueError as error:
        raise X2IError(f"{where}: {error}") from None


def to_published(config: Ovis2Config, dtype: str) -> dict[str, Any]:
    """AIDC-AI's config.json."""
    seen = config.tokenizer
    return {
        "architectures": ["Ovis"],
        "auto_map": {
            "AutoConfig": f"{_CODE}configuration_ovis.OvisConfig",
            "AutoModelForCausalLM": f"{_CODE}modeling_ovis.Ovis",
        },
        "model_type": "ovis",
        "conversation_formatter_class": "QwenConversationFormatter",
        "disable_tie_weight": False,
        "hidden_size": config.llm.hidden_size,
        "llm_attn_implementation": None,
        "multimodal_max_length": config.max_length,
        "torch_dtype": dtype,
        "use_cache": True,
        "llm_config": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **_to_llm(config)},
        "visual_tokenizer_config": {
            "model_type": "aimv2_visual_tokenizer",
            "vocab_size": seen.vocab_size,
            "tokenize_function": seen.tokenize,
            "tau": seen.tau,
            "depths": None,
            "drop_cls_token": False,
            "hidden_stride": seen.encoder.hidden_stride,
            "backbone_config": {
                "architectures": ["AIMv2Model"],
                "model_type": "aimv2",
                **to_published_encoder(config.tokenizer.encoder),
                "projection_dropout": 0.0,
                "use_bias": seen.encoder.use_bias,
            },
        },
    }


def from_transformers(numbers: Mapping[str, Any], where: str) -> Ovis2Config:
    """Our numbers of transformers' config.json. Raises X2IError if one is missing."""
    try:
        seen = numbers["vision_config"]
        return Ovis2Config.model_validate(
            {
                "llm": {**_llm(numbers["text_config"]), "tied": numbers.get("tie_word_embeddings", True)},
                "tokenizer": {
                    "encoder": _encoder(seen, seen["hidden_stride"], seen.get("mlp_bias", False)),
                    "vocab_size": seen["vocab_size"],
                    "indicators": seen.get("num_visual_indicator_tokens", 5),
                    "tokenize": seen.get("tokenize_function", "softmax"),
                },
                "max_length": numbers["text_config"]["max_position_embeddings"],
            }
        )
    except KeyError as error:
        raise X2IError(f"{where}: no Ovis2 of transformers: {error} is not there") from None
    except ValueError as error:
        raise X2IError(f"{where}: {error}") from None


def to_transformers(config: Ovis2Config, rows: int, places: Sequence[int], dtype: str) -> dict[str, Any]:
    """transformers' config.json.

    Args:
        config: our numbers.
        rows: of the token embedding as it is written.
        places: token ids of a visual token, and of the five marks.
        dtype: of the weights.
    """
    seen = config.tokenizer
    return {
        "architectures": ["Ovis2ForConditionalGeneration"],
        "model_type": "ovis2",
        "dtype": dtype,
        "hidden_size": config.llm.hidden_size,
        "vocab_size": rows,
        "image_token_id": places[0],
        "visual_indicator_token_ids": list(places[1:]),
        "tie_word_embeddings": config.llm.tied,
        "text_config": {"model_type": "qwen2", **_to_llm(config), "vocab_size": rows},
        "vision_config": {
            "model_type": "ovis2_vision",
            **to_published_encoder(config.tokenizer.encoder),
            "mlp_bias": seen.encoder.use_bias,
            "hidden_act": "silu",
            "hidden_stride": seen.encoder.hidden_stride,
            "vocab_size": seen.vocab_size,
            "num_visual_indicator_tokens": seen.indicators,
            "tokenize_function": seen.tokenize,
        },
    }


def preprocessor(config: Ovis2Config, kind: str) -> dict[str, Any]:
    """preprocessor_config.json of `CLIPImageProcessor` (published) or `Ovis2ImageProcessor` (transformers)."""
    side = {"height": config.side, "width": config.side}
    own: dict[str, Any] = {"crop_size": side, "size": {"shortest_edge": config.side}, "do_center_crop": False}
    if kind == "Ovis2ImageProcessor":
        own = {"size": side, "crop_to_patches": True, "min_patches": 1, "max_patches": config.tiles.single}
        own["use_covering_area_grid"] = True
    return {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": _MEAN,
        "image_std": _STD,
        **own,
    }


def _llm(numbers: Mapping[str, Any]) -> dict[str, Any]:
    rope = numbers.get("rope_parameters") or {}
    return {
        "hidden_size": numbers["hidden_size"],
        "layers": numbers["num_hidden_layers"],
        "heads": numbers["num_attention_heads"],
        "kv_heads": numbers["num_key_value_heads"],
        "intermediate_size": numbers["intermediate_size"],
        "vocab_size": numbers["vocab_size"],
        "tied": numbers.get("tie_word_embeddings", False),
        "norm_eps": numbers.get("rms_norm_eps", 1e-6),
        "rope_theta": numbers.get("rope_theta") or rope.get("rope_theta") or 10_000.0,
        "max_positions": numbers["max_position_embeddings"],
    }


def _to_llm(config: Ovis2Config) -> dict[str, Any]:
    llm = config.llm
    return {
        "hidden_size": llm.hidden_size,
        "num_hidden_layers": llm.layers,
        "num_attention_heads": llm.heads,
        "num_key_value_heads": llm.kv_heads,
        "intermediate_size": llm.intermediate_size,
        "vocab_size": llm.vocab_size,
        "tie_word_embeddings": llm.tied,
        "rms_norm_eps": llm.norm_eps,
        "rope_theta": llm.rope_theta,
        "max_position_embeddings": llm.max_positions,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_sliding_window": False,
    }


def _encoder(numbers: Mapping[str, Any], stride: int, bias: bool) -> dict[str, Any]:
    return {
        "hidden_size": numbers["hidden_size"],
        "layers": numbers["num_hidden_layers"],
        "heads": numbers["num_attention_heads"],
        "intermediate_size": numbers["intermediate_size"],
        "patch_size": numbers["patch_size"],
        "image_size": numbers["image_size"],
        "norm_eps": numbers["rms_norm_eps"],
        "rope": False,
        "hidden_stride": stride,
        "qkv_bias": numbers.get("qkv_bias", False),
        "use_bias": bias,
    }
