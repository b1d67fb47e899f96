"""Ovis-U1's decoder: a multimodal diffusion transformer that predicts the velocity of an image's latents.

Architecture (paper arXiv 2506.23044; code AIDC-AI/Ovis-U1-3B, modeling_yak.py):
- tokens: 2 x 2 latents; the latents of a source image are appended and their outputs thrown away
- positions: rotary in three parts (image, row, column); the picture drawn is image 0, its source image 1, text all 0
- text comes from the refiner; its summary and the timestep (times 1000) make the vector that modulates all blocks
- double blocks: text and image have weights of their own and attend together; the image tokens also attend to
  themselves alone, with further weights and modulation
- single blocks: one stream, attention and MLP side by side
- queries and keys are RMS-normalised; LayerNorms have no affine; the head is zero at initialisation

Time runs as published: 1 is noise, 0 is data, and the velocity is noise - data.

Tensor names carry their axes:
    B batch · N noisy tokens · M source tokens · I = N + M · L text tokens · S = L + I · D width · C latent channels
    H heads · E width of a head · K = E / 2 · O values of a token · G documents of a pack
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from x2i.base.errors import X2IError
from x2i.model.ovis_u1.blocks import DoubleBlock, FinalLayer, MLPEmbedder, Modulation, SingleBlock
from x2i.model.ovis_u1.decoder_config import DecoderConfig
from x2i.model.ovis_u1.refiner import Refiner
from x2i.model.ovis_u1.streams import Documents, DocumentStreams, Rotation, Rows, RowStreams, Streams


class Decoder(nn.Module):
    """Predicts the velocity noise - data of noisy tokens, given the context, the timestep and a source image."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, width)
        self.time_in = MLPEmbedder(config.time_dim, width)
        self.vector_in = MLPEmbedder(config.vec_in_dim, width)
        self.txt_in = Refiner(config)
        self.double_blocks = nn.ModuleList([DoubleBlock(config) for _ in range(config.depth)])
        self.single_blocks = nn.ModuleList([SingleBlock(config) for _ in range(config.depth_single)])
        self.final_layer = FinalLayer(width, config.out_channels)
        self._initialise()

    def _initialise(self) -> None:
        # Published: the refiner's gates and summary token. The rest is the usual start of diffusion transformers
        # (facebookresearch/DiT): blocks are the identity and the output is 0.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for embedder in (self.time_in, self.vector_in):
            nn.init.normal_(embedder.in_layer.weight, std=0.02)
            nn.init.normal_(embedder.out_layer.weight, std=0.02)
        zero = [m.lin for m in self.modules() if isinstance(m, Modulation)]
        for linear in (*zero, self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.txt_in.initialise()

    def context(self, hidden_BLE: Tensor, valid_BL: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the condition gives at every timestep: text tokens [B, L, D] and their summary's vector [B, D].

        Args:
            hidden_BLE: last and last but one hidden states of the language model, side by side.
            valid_BL: False on padding.
        """
        text_BLD, summary_BD = self.txt_in(hidden_BLE.to(self.img_in.weight.dtype), valid_BL)
        return text_BLD, self.vector_in(summary_BD)

    def forward(
        self,
        x_BNO: Tensor,
        ids_BN3: Tensor,
        text_BLD: Tensor,
        vector_BD: Tensor,
        t_B: Tensor,
        source_BMO: Tensor | None = None,
        source_ids_BM3: Tensor | None = None,
        text_valid_BL: Tensor | None = None,
        source_valid_BM: Tensor | None = None,
    ) -> Tensor:
        """Velocity noise - data of the noisy tokens, [B, N, O].

        Args:
            x_BNO: noisy tokens, as `pack` makes them.
            ids_BN3: their positions, of `image_ids`.
            text_BLD, vector_BD: of `context`.
            t_B: timesteps, 1 is noise and 0 is data.
            source_BMO, source_ids_BM3: clean tokens of source images, and their positions.
            text_valid_BL, source_valid_BM: False on padding (of finite numbers). Nothing looks at it, so that each
                row of a batch of unequal lengths equals itself alone. None where there is none: no mask is faster.

        Raises:
            X2IError: source tokens without positions.
        """
        if (source_BMO is None) != (source_ids_BM3 is None):
            raise X2IError("decoder: source tokens need their positions, and positions their tokens")
        noisy, length = x_BNO.shape[1], text_BLD.shape[1]
        if source_BMO is not None and source_ids_BM3 is not None:
            x_BNO = torch.cat([x_BNO, source_BMO.to(x_BNO.dtype)], dim=1)
            ids_BN3 = torch.cat([ids_BN3, source_ids_BM3.to(ids_BN3)], dim=1)
        allowed = _allowed(text_valid_BL, source_valid_BM, length, noisy, x_BNO.shape[1])
        ids_BS3 = F.pad(ids_BN3, (0, 0, length, 0))  # the text's positions are 0
        streams = RowStreams(Rows(allowed, rotary(ids_BS3, self.config.axes_dim, self.config.theta)), length)
        img, vector_BD = self._embedded(x_BNO, vector_BD, t_B)
        x_BSD = self._mixed(img, text_BLD, vector_BD, streams)
        return self.final_layer(x_BSD[:, length : length + noisy], vector_BD, streams.whole)

    def packed(
        self,
        x_IO: Tensor,
        ids_I3: Tensor,
        hidden_LE: Tensor,
        t_G: Tensor,
        refined: DocumentStreams,
        drawn: DocumentStreams,
        noisy: Documents,
        noisy_N: Tensor,
    ) -> Tensor:
        """Velocity noise - data of the noisy tokens of documents one after the other, [N, O]; none sees another.

        Args:
            x_IO, ids_I3: of each document the noisy tokens, then those of its source images; and their positions.
            hidden_LE: as `context` takes them, of all documents, without padding.
            t_G: timesteps, 1 is noise and 0 is data.
            refined: how the refiner's summaries and words lie.
            drawn: how text and image tokens lie.
            noisy: how the noisy tokens lie; `noisy_N` is where they stand in `drawn.whole`.
        """
        text_1LD, summary_GD = self.txt_in.packed(hidden_LE.to(self.img_in.weight.dtype), refined)
        zero_L3 = ids_I3.new_zeros(text_1LD.shape[1], 3)
        ids_S3 = drawn.join(zero_L3, ids_I3)
        streams = drawn.placed(rotary(ids_S3[None], self.config.axes_dim, self.config.theta))
        img, vector_GD = self._embedded(x_IO[None], self.vector_in(summary_GD), t_G)
        x_1SD = self._mixed(img, text_1LD, vector_GD, streams)
        velocity_1NO = self.final_layer(x_1SD.index_select(1, noisy_N), vector_GD, noisy)
        return velocity_1NO[0]

    def _embedded(self, x: Tensor, vector: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Image tokens, and the vector with the timestep."""
        dtype = self.img_in.weight.dtype
        img = self.img_in(x.to(dtype))
        return img, self.time_in(timestep_features(t, self.config.time_dim).to(dtype)) + vector

    def _mixed(self, img: Tensor, txt: Tensor, vector_GD: Tensor, streams: Streams) -> Tensor:
        """Image and text through all blocks, [B, S, D]."""
        for block in self.double_blocks:
            img, txt = block(img, txt, vector_GD, streams)
        x_BSD = streams.join(txt, img)
        for block in self.single_blocks:
            x_BSD = block(x_BSD, vector_GD, streams.whole)
        return x_BSD


def _allowed(text: Tensor | None, source: Tensor | None, length: int, noisy: int, image: int) -> Tensor | None:
    """Which of the S tokens may be looked at, bool [B, 1, 1, S]; None for all."""
    given = text if text is not None else source
    if given is None:
        return None
    allowed_BS = torch.ones(len(given), length + image, dtype=torch.bool, device=given.device)
    if text is not None:
        allowed_BS[:, :length] = text
    if source is not None:
        allowed_BS[:, length + noisy :] = source
    return allowed_BS[:, None, None]


def rotary(ids_BS3: Tensor, axes: tuple[int, ...], theta: float) -> Rotation:
    """Cosines and sines of the positions, axis by axis. Angles are computed in float64, once per step."""
    angles = []
    for axis, size in enumerate(axes):
        exponent = torch.arange(0, size, 2, dtype=torch.float64, device=ids_BS3.device) / size
        angles.append(ids_BS3[..., axis, None].double() / theta**exponent)
    angles_B1SK = torch.cat(angles, dim=-1)[:, None]
    return angles_B1SK.cos().float(), angles_B1SK.sin().float()


def timestep_features(t_B: Tensor, size: int) -> Tensor:
    """[cos, sin] of 1000 t at `size / 2` frequencies, float32 [B, size]."""
    half = size // 2
    rate = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t_B.device) / half)
    angles = 1000.0 * t_B.float()[:, None] * rate
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def image_ids(rows: int, columns: int, image: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Positions [rows * columns, 3] of an image's tokens: (image, row, column); 0 is the one drawn, 1 its source."""
    axes = (
        torch.tensor([image], device=device),
        torch.arange(rows, device=device),
        torch.arange(columns, device=device),
    )
    return torch.cartesian_prod(*axes).float()


def pack(latents_BCHW: Tensor, patch: int = 2) -> Tensor:
    """Latents to tokens [B, H / P * W / P, C * P * P], channel first. Raises X2IError where the sides do not fit."""
    height, width = latents_BCHW.shape[-2:]
    if height % patch or width % patch:
        raise X2IError(f"decoder: latents of {height} x {width}; each side must be a multiple of {patch}")
    return F.pixel_unshuffle(latents_BCHW, patch).flatten(2).transpose(1, 2)


def unpack(tokens_BNO: Tensor, rows: int, columns: int, patch: int = 2) -> Tensor:
    """The reverse of `pack`: tokens of `rows` x `columns` to latents [B, C, rows * P, columns * P]."""
    return F.pixel_shuffle(tokens_BNO.transpose(1, 2).unflatten(2, (rows, columns)), patch)


def shift(tokens: int, config: DecoderConfig) -> float:
    """Shift s of the timesteps, s t / (1 + (s - 1) t) in the published time: e^mu, mu linear in the number of tokens."""
    slope = (config.max_shift - config.base_shift) / (4096 - 256)
    return math.exp(config.base_shift + slope * (tokens - 256))
