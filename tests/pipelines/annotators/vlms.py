"""Tiny vision-language models of the real architectures, random, saved as they are published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

QWEN = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TILES = QWEN.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMAGE>\n")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.6,  # wide, so that random weights say different things of different pictures
}


def tokenizer(folder: Path, special: list[str], **named: str) -> Any:
    """A byte-level BPE of about 300 tokens in Qwen2's format."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import Qwen2TokenizerFast

    bpe = ByteLevelBPETokenizer()
    sentences = ["a red car stands near the house", "describe the picture in one sentence", "two dogs run"]
    bpe.train_from_iterator(sentences, vocab_size=300, min_frequency=1)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save_model(str(folder))
    made = Qwen2TokenizerFast.from_pretrained(
        str(folder), pad_token="<|endoftext|>", eos_token="<|im_end|>", unk_token=None, extra_special_tokens=named
    )
    made.add_special_tokens({"additional_special_tokens": SPECIAL + special})
    return made


def _save(folder: Path, model: Any, processor: Any, ends: list[int]) -> Path:
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.generation_config.update(do_sample=True, temperature=0.1, top_k=1, repetition_penalty=1.05)  # as published
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _qwen(folder: Path, family: str, vision: dict[str, Any], text: dict[str, Any], processor: str, seed: int) -> Path:
    import torch
    import transformers

    words = tokenizer(folder, QWEN_TOKENS)
    ids = {t: words.convert_tokens_to_ids(t) for t in QWEN_TOKENS + SPECIAL}
    config = getattr(transformers, f"{family}Config")(
        vision_config=vision,
        text_config=TEXT | {"vocab_size": len(words), "tie_word_embeddings": False} | text,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    patch = vision["patch_size"]
    made = getattr(transformers, processor)(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=patch),
        tokenizer=words,
        video_processor=getattr(transformers, "Qwen3VLVideoProcessor" if "3" in family else "Qwen2VLVideoProcessor")(
            patch_size=patch
        ),
        chat_template=QWEN,
    )
    return _save(folder, model, made, [ids["<|im_end|>"], ids["<|endoftext|>"]])


def qwen2_vl(folder: Path, seed: int = 0) -> Path:
    """Qwen2-VL."""
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    return _qwen(folder, "Qwen2VL", vision, rope, "Qwen2VLProcessor", seed)


def qwen2_5_vl(folder: Path, seed: int = 0) -> Path:
    """Qwen2.5-VL."""
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32, "patch_size": 14,
        "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip
    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    return _qwen(folder, "Qwen2_5_VL", vision, rope, "Qwen2_5_VLProcessor", seed)


def qwen3_vl(folder: Path, seed: int = 4) -> Path:
    """Qwen3-VL. (With other seeds the model says one token only.)"""
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32, "patch_size": 16,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 64,
    }  # fmt: skip
    rope = {
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 10000.0
        },
    }  # fmt: skip
    return _qwen(folder, "Qwen3VL", vision, rope, "Qwen3VLProcessor", seed)


def internvl(folder: Path, seed: int = 0) -> Path:
    """InternVL 3 (the -hf format): tiles of 28 pixels here, of 448 in the published ones."""
    import torch
    import transformers

    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = tokenizer(folder, list(named.values()), **named)
    config = transformers.InternVLConfig(
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
            "image_size": [28, 28], "patch_size": [7, 7],
        },
        text_config=TEXT | {"model_type": "qwen2", "vocab_size": len(words)},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    processor = transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(
            size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=6
        ),
        tokenizer=words,
        video_processor=transformers.InternVLVideoProcessor(size={"height": 28, "width": 28}),
        image_seq_length=4,
        chat_template=TILES.replace("<IMAGE>", "<IMG_CONTEXT>"),
    )
    model = transformers.InternVLForConditionalGeneration(config)
    return _save(folder, model, processor, [words.convert_tokens_to_ids("<|im_end|>")])


def ovis2(folder: Path, seed: int = 0) -> Path:
    """Ovis2: tiles of 28 pixels here, of 448 in the published ones."""
    import torch
    import transformers

    marks = ["<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    words = tokenizer(folder, ["<image>", *marks])
    ids = words.convert_tokens_to_ids(marks)
    config = transformers.Ovis2Config(
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
            "image_size": 28, "patch_size": 7, "vocab_size": 40, "hidden_stride": 2,
        },
        text_config=TEXT | {"model_type": "qwen2", "vocab_size": len(words)},
        image_token_id=ids[0],
        visual_indicator_token_ids=ids[1:],
        vocab_size=len(words),
        hidden_size=32,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    processor = transformers.Ovis2Processor(
        image_processor=transformers.Ovis2ImageProcessor(
            size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=6
        ),
        tokenizer=words,
        image_seq_length=4,
        chat_template=TILES.replace("<IMAGE>", "<image>"),
    )
    model = transformers.Ovis2ForConditionalGeneration(config)
    return _save(folder, model, processor, [words.convert_tokens_to_ids("<|im_end|>")])


#: All families that are tested, by name.
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "ovis2": ovis2,
}
