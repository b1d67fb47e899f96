"""Autoencoders by configuration: both kinds, through the same path."""

from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from x2i.base.errors import X2IError
from x2i.model import vae
from x2i.model.config import AutoencoderKLConfig, PixelsConfig, VAEConfig


def test_pixels_are_exactly_invertible() -> None:
    latents = vae.build(PixelsConfig(factor=4))
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    z = latents.encode(pixels)
    assert z.shape == (2, latents.channels, 4, 6)
    assert torch.equal(latents.decode(z), pixels)


@pytest.fixture(scope="module")
def kl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import diffusers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=2,
        norm_num_groups=2,
        scaling_factor=0.25,
        shift_factor=0.5,
        mid_block_add_attention=False,
    ).save_pretrained(folder)
    return folder


def test_a_diffusers_autoencoder_loads_from_a_folder_and_scales_its_latents(kl_folder: Path) -> None:
    import diffusers

    ours = vae.build(TypeAdapter(VAEConfig).validate_python({"kind": "autoencoder_kl", "weights": str(kl_folder)}))
    theirs = diffusers.AutoencoderKL.from_pretrained(kl_folder)
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(pixels).latent_dist
        alone = [theirs.encode(pixels[i : i + 1]).latent_dist for i in range(2)]
        drawn = torch.cat([one.sample(torch.Generator().manual_seed(3 + i)) for i, one in enumerate(alone)])
        mean = posterior.mode()
        decoded = theirs.decode(mean).sample
    assert (ours.channels, ours.shrink) == (2, 2)
    torch.testing.assert_close(ours.encode(pixels), (mean - 0.5) * 0.25)
    # each picture by a generator of its own: what it is made of does not depend on the others
    of_two = ours.encode(pixels, [torch.Generator().manual_seed(3 + i) for i in range(2)])
    torch.testing.assert_close(of_two, (drawn - 0.5) * 0.25)
    torch.testing.assert_close(ours.decode(ours.encode(pixels)), decoded)


def test_a_folder_without_an_autoencoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(X2IError, match="AutoencoderKL"):
        vae.build(AutoencoderKLConfig(kind="autoencoder_kl", weights=str(tmp_path)))
