"""Stable Diffusion's pipelines, tiny and random, as `save_pretrained` leaves them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


def saved(folder: Path, inpaints: bool) -> Path:
    """A pipeline in `folder`/sd: the one that inpaints (its UNet sees the mask), or the plain one."""
    import diffusers
    import torch
    import transformers

    torch.manual_seed(0)
    alphabet = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = [*alphabet, *(f"{c}</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    text = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(pieces),
        max_position_embeddings=77, bos_token_id=len(pieces) - 2, eos_token_id=len(pieces) - 1,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=9 if inpaints else 4, out_channels=4, layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32), cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16, 16), norm_num_groups=8, latent_channels=4, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    kind = diffusers.StableDiffusionInpaintPipeline if inpaints else diffusers.StableDiffusionPipeline
    pipeline = kind(
        vae=vae, text_encoder=transformers.CLIPTextModel(text), tokenizer=tokenizer, unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "sd")
    return folder / "sd"


def broken(pipeline: Path, folder: Path) -> Path:
    """A copy of a pipeline in `folder`, whose UNet lacks `conv_in.weight`."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(pipeline, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state.pop("conv_in.weight")
    save_file(state, file, metadata={"format": "pt"})
    return folder
