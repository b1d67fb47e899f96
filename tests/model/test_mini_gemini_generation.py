"""Mini-Gemini's pictures: the prompt in an answer, drawn by SDXL."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from x2i.base.errors import X2IError
from x2i.model.mini_gemini.generation import NEGATIVE, Painter, asked, draw, split_prompt

# drawing


def test_prompts_are_found_in_answers() -> None:
    assert split_prompt("Here: <h> a red boat </h> as you wished") == "a red boat"
    assert split_prompt("<h>one</h> or <h>two\nlines</h>") == "two\nlines"
    assert split_prompt("<h>never closed") is None
    assert split_prompt("none") is None
    assert split_prompt("<h>  </h>") is None
    assert split_prompt("<h> left open <h>a boat</h>") == "a boat"
    assert asked("Draw a boat") == "Draw a boat <GEN>"
    assert asked(asked("Draw a boat")) == "Draw a boat <GEN>"


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL's pipeline, tiny and random."""
    import diffusers
    import transformers

    folder = tmp_path_factory.mktemp("sdxl")
    torch.manual_seed(0)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    text = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(pieces),
        max_position_embeddings=77, bos_token_id=len(pieces) - 2, eos_token_id=len(pieces) - 1, projection_dim=16,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32), cross_attention_dim=32, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16, 16), norm_num_groups=8, latent_channels=4, sample_size=64, force_upcast=False,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    diffusers.StableDiffusionXLPipeline(
        vae=vae, text_encoder=transformers.CLIPTextModel(text), tokenizer=tokenizer, unet=unet,
        text_encoder_2=transformers.CLIPTextModelWithProjection(text), tokenizer_2=tokenizer,
        scheduler=diffusers.EulerDiscreteScheduler(), add_watermarker=False,
    ).save_pretrained(folder / "sdxl")  # fmt: skip
    return folder / "sdxl"


def test_sdxl_draws_the_prompt_of_an_answer(sdxl: Path) -> None:
    import diffusers

    painter = Painter(str(sdxl))
    few: dict[str, Any] = {"steps": 2, "height": 64, "width": 48, "seed": 7}
    found = painter("Sure: <h>a red boat</h>", **few)
    assert found.shape == (64, 48, 3)
    assert found.dtype == np.uint8
    assert np.array_equal(found, draw("<h>a red boat</h>", str(sdxl), **few))
    assert not np.array_equal(found, painter("<h>a blue dog</h>", **few))
    assert not np.array_equal(found, painter("<h>a red boat</h>", negative="", **few))

    plain = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl)
    plain.set_progress_bar_config(disable=True)
    theirs = plain(
        "a red boat", negative_prompt=NEGATIVE, num_inference_steps=2, height=64, width=48,
        generator=torch.Generator().manual_seed(7),
    ).images[0]  # fmt: skip
    assert np.abs(found.astype(int) - np.asarray(theirs)).max() <= 1


def test_sdxl_must_be_whole(sdxl: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "sdxl"
    shutil.copytree(sdxl, broken)
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["conv_in.weight"]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(X2IError, match="unet lacks conv_in.weight"):
        Painter(str(broken))


def test_what_cannot_be_drawn_is_refused(sdxl: Path, tmp_path: Path) -> None:
    with pytest.raises(X2IError, match="no prompt between <h> and </h>"):
        draw("I cannot.", "no/such-model")
    with pytest.raises(X2IError, match="multiple of 8"):
        Painter(str(sdxl))("<h>a</h>", height=60)
    with pytest.raises(X2IError, match="cannot be read"):
        Painter(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(X2IError, match="holds a StableDiffusionPipeline"):
        Painter(str(tmp_path))
    with pytest.raises(X2IError, match="no such file or folder"):
        Painter("./nowhere")
