"""Mini-Gemini's numbers as dvlab-research/MGM writes them in config.json: a Gemma's or Llama's with mm_* besides.

The file says nothing of the encoders but where they lay: the tensors' shapes tell. Light to import: no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from x2i.base.errors import X2IError
from x2i.model.mini_gemini.config import MiniGeminiConfig

Shapes = Mapping[str, tuple[int, ...]]

#: model_type there -> of its language model in transformers.
KINDS = {"mgm_gemma": "gemma", "mgm": "llama", "mgm_llama": "llama"}
#: Numbers of a language model, by the names of every version of transformers.
_NUMBERS = (
    *("intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("max_position_embeddings", "rms_norm_eps", "attention_bias", "tie_word_embeddings"),
)
LOW, HIGH = "model.vision_tower.vision_tower.vision_model.", "model.vision_tower_aux."
#: Where MGM's scripts have the encoders.
TOWERS = {
    "mm_vision_tower": "model_zoo/OpenAI/clip-vit-large-patch14-336",
    "mm_vision_tower_aux": "model_zoo/OpenAI/openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup",
}
_LLAMA_3, _YI = 128_000, 64_000  # sizes of vocabularies, from and exactly


def from_published(numbers: Mapping[str, Any], shapes: Shapes, low: Mapping[str, Any], where: str) -> MiniGeminiConfig:
    """Our numbers of a published folder.

    Args:
        numbers: the content of its config.json.
        shapes: of all tensors, those of the encoders among them.
        low: numbers of the CLIP in transformers, as far as known; heads are 64 wide otherwise.
        where: the file, for messages.

    Raises:
        X2IError: it is no Mini-Gemini with a Gemma or a Llama, or a number or tensor is missing.
    """
    kind = numbers.get("model_type")
    if kind not in KINDS or numbers.get("vocab_size") == _YI:
        raise X2IError(
            f"{where}: model_type {kind!r} with {numbers.get('vocab_size')} tokens; known: {', '.join(KINDS)}"
        )
    if numbers.get("mm_projector_type", "mlp2x_gelu") != "mlp2x_gelu":
        raise X2IError(f"{where}: mm_projector_type {numbers['mm_projector_type']!r}; known: mlp2x_gelu")
    try:
        llama = "llama_3" if numbers["vocab_size"] >= _LLAMA_3 else "vicuna_v1"
        found = {name: numbers[name] for name in _NUMBERS if numbers.get(name) is not None}
        rope = numbers.get("rope_parameters") or numbers.get("rope_scaling")
        theta = numbers.get("rope_theta")
        if rope or theta:
            found["rope_parameters"] = {"rope_type": "default", "rope_theta": theta or 10_000.0, **(rope or {})}
        return MiniGeminiConfig.model_validate(
            {
                "llm": {
                    "model_type": KINDS[kind],
                    "vocab_size": numbers["vocab_size"],
                    "hidden_size": numbers["hidden_size"],
                    "numbers": found,
                },
                "low": {**_low(shapes, low), "select_layer": numbers.get("mm_vision_select_layer", -2)},
                "high": {**_high(shapes), "image_size": numbers.get("image_size_aux", 768)},
                "grid": numbers.get("image_grid") or 1,
                "overview": bool(numbers.get("image_global", False)),
                "template": "gemma" if KINDS[kind] == "gemma" else llama,
                "aspect": "pad" if numbers.get("image_aspect_ratio", "pad") == "pad" else "crop",
            }
        )
    except KeyError as error:
        raise X2IError(f"{where}: no published Mini-Gemini: {error} is not there") from None
    except ValueError as error:
        raise X2IError(f"{where}: {error}") from None


def to_published(config: MiniGeminiConfig, llm: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The published config.json.

    Args:
        config: our numbers.
        llm: all numbers of the language model, as transformers has them.
        dtype: of the weights.

    Raises:
        X2IError: MGM's code has no such language model.
    """
    kinds = {"gemma": "mgm_gemma", "llama": "mgm"}
    if (kind := kinds.get(config.llm.model_type)) is None:
        raise X2IError(f"the published layout has {' or '.join(kinds)} as language model, not {config.llm.model_type}")
    rope = llm.get("rope_parameters") or {}
    return {
        "architectures": ["MGMGemmaForCausalLM" if kind == "mgm_gemma" else "MGMLlamaForCausalLM"],
        "model_type": kind,
        "vocab_size": config.llm.vocab_size,
        "hidden_size": config.llm.hidden_size,
        **{name: llm[name] for name in _NUMBERS if llm.get(name) is not None},
        "hidden_act": llm.get("hidden_act"),
        "rope_theta": rope.get("rope_theta", 10_000.0),
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else dict(rope),
        "torch_dtype": dtype,
        "use_cache": True,
        "use_mm_proj": True,
        **TOWERS,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config.low.hidden_size,
        "mm_hidden_size_aux": config.high.channels,
        "mm_vision_select_layer": config.low.select_layer,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_size_aux": config.high.image_size,
        "image_grid": config.grid,
        "image_global": config.overview,
        "image_aspect_ratio": "pad" if config.aspect == "pad" else "square",
        # their code takes encoders from the folder only where it is told that they were trained
        "optimize_vision_tower": True,
        "optimize_vision_tower_aux": True,
    }


def _low(shapes: Shapes, known: Mapping[str, Any]) -> dict[str, Any]:
    patch = shapes[f"{LOW}embeddings.patch_embedding.weight"]
    positions = shapes[f"{LOW}embeddings.position_embedding.weight"][0] - 1
    return {
        "image_size": round(positions**0.5) * patch[2],
        "patch_size": patch[2],
        "hidden_size": patch[0],
        "layers": _count(shapes, f"{LOW}encoder.layers."),
        "heads": known.get("num_attention_heads") or max(1, patch[0] // 64),
        "intermediate_size": shapes[f"{LOW}encoder.layers.0.mlp.fc1.weight"][0],
    }


def _high(shapes: Shapes) -> dict[str, Any]:
    stages = [f"{HIGH}vision_stages.{i}.blocks." for i in range(4)]
    return {
        "widths": [shapes[f"{stage}0.conv_dw.weight"][0] for stage in stages],
        "depths": [_count(shapes, stage) for stage in stages],
    }


def _count(shapes: Shapes, prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)})
