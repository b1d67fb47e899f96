"""A tiny OmniGen with everything that it needs to draw, all weights random."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from tests.model.test_omnigen import SMALL, randomised
from x2i.model import vae
from x2i.model.config import AutoencoderKLConfig, ModelFile, PixelsConfig, VAEConfig
from x2i.model.omnigen import writing
from x2i.model.omnigen.config import LongRope, OmniGenConfig
from x2i.model.omnigen.layouts import Layout, Opened
from x2i.model.omnigen.processor import OmniGenProcessor
from x2i.trainer.config import TokenizerTraining
from x2i.trainer.tokens import train

#: Long enough for the published negative sentence; an image is 16 x 16 tokens at most.
ROPE = LongRope(short_factor=(1.0, 1.1, 1.2, 1.3), long_factor=(2.0, 3.0, 4.0, 5.0), original=1024)


@cache
def tokenizer() -> Tokenizer:
    """A byte-level one that knows the words of these tests."""
    texts = [OmniGenProcessor.NEGATIVE, OmniGenProcessor.learned_text("Draw a red boat on a lake. Make the sky darker")]
    options = TokenizerTraining(vocab_size=500)
    return train(texts * 3, options, OmniGenProcessor.special_tokens, OmniGenProcessor.begin)


@cache
def bytes_alone() -> Tokenizer:
    """A byte-level one without merges."""
    return train(["a"], TokenizerTraining(vocab_size=300), OmniGenProcessor.special_tokens, OmniGenProcessor.begin)


def write_vae(folder: Path) -> AutoencoderKLConfig:
    """An autoencoder of 4 channels and 8 pixels per latent, whose posterior has no spread: its sample is its mean."""
    import diffusers

    torch.manual_seed(0)
    made = diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
        scaling_factor=0.13025,
        mid_block_add_attention=False,
    )
    without_spread(made)
    made.save_pretrained(folder)
    return AutoencoderKLConfig(kind="autoencoder_kl", weights=str(folder))


@torch.no_grad()
def without_spread(autoencoder: Any) -> None:
    """Make the posterior a point: whoever samples it gets its mean."""
    autoencoder.quant_conv.weight[4:] = 0
    autoencoder.quant_conv.bias[4:] = -30


def numbers(channels: int, **changes: object) -> OmniGenConfig:
    """Of a model with this many latent channels and the words of `tokenizer`."""
    update = {"vocab_size": tokenizer().get_vocab_size(), "in_channels": channels, "max_positions": 4096}
    return SMALL.model_copy(update={**update, "rope_scaling": ROPE, **changes})


def opened(described: VAEConfig | None = None, words: Tokenizer | None = None, **changes: object) -> Opened:
    """The model as `layouts.open_model` would give it; default: on pixels, two to a latent's side."""
    autoencoder = vae.build(described or PixelsConfig(factor=2))
    known = words or tokenizer()
    config = numbers(autoencoder.channels, vocab_size=known.get_vocab_size(), **changes)
    file = ModelFile(
        architecture="omnigen",
        model=config.model_dump(mode="json"),
        vae=described or PixelsConfig(factor=2),
        resolution=64,
    )
    return Opened(randomised(config), known, file, autoencoder, Layout.X2I)


def in_every_layout(folder: Path) -> Path:
    """One model in every layout, each in a folder of the layout's name."""
    made = opened(write_vae(folder / "kl"))
    for layout in Layout:
        writing.save(made, folder / layout.value, layout)
    return folder


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def copied(folder: Path, target: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, target))
