"""Ovis-U1: a language model that sees images as probable visual words, and a decoder that draws from its hidden states.

Architecture (paper arXiv 2506.23044; code AIDC-AI/Ovis-U1-3B):
- a Qwen3 decoder whose output map is its token embedding
- images: visual tokenizer (AIMv2 at native resolution, head, softmax), then the mean embedding of the visual words;
  two rows of the same table stand around each image
- drawing: the last hidden states (after the norm) and the last but one, side by side, go through the refiner to the
  decoder; of source images the decoder sees the latents besides
- the autoencoder that the published weights hold is not part of this network (see `names.split_vae`)

Time: the decoder counts from 1 (noise) to 0 and predicts noise - data; `velocity` turns both round.

Tensor names carry their axes:
    B batch · L tokens (padded on the right) · D width of the language model · E = 2 D · N patches · F values of a patch
    V visual tokens of images · M tokens of source images (padded) · O values of a token · C latent channels · H, W latent height and width
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3Model

from x2i.base.errors import X2IError
from x2i.model.base import Model
from x2i.model.layers import attention
from x2i.model.layers.aimv2 import Grid
from x2i.model.layers.chat import IGNORE
from x2i.model.layers.visual_tokenizer import VisualEmbedding, VisualTokenizer, initialise_like
from x2i.model.ovis_u1.config import PARTS, OvisU1Config, Qwen3Numbers
from x2i.model.ovis_u1.decoder import Decoder, image_ids, pack, unpack
from x2i.model.ovis_u1.packing import OvisU1Pack, packed
from x2i.model.ovis_u1.prompt import VISUAL, OvisInputs


@dataclass(frozen=True)
class Condition:
    """What every step of a drawing shares. Masks are False on padding, and None where there is none."""

    text_BLD: Tensor
    vector_BD: Tensor
    text_valid_BL: Tensor | None = None
    source_BMO: Tensor | None = None
    source_ids_BM3: Tensor | None = None
    source_valid_BM: Tensor | None = None


class LanguageModel(nn.Module):
    """Qwen3. The output map is the token embedding itself, so there is no second tensor to keep equal to it."""

    def __init__(self, numbers: Qwen3Numbers) -> None:
        super().__init__()
        self.model = Qwen3Model(_trunk(numbers))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., vocabulary]."""
        return F.linear(hidden, self.model.embed_tokens.weight)


class OvisU1(Model[OvisInputs]):
    """Draws from text and images, and answers."""

    parts = PARTS
    pretrained: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "llm": {"llm.model.": "model."},  # any Qwen3 of these numbers
        "encoder": {"visual_tokenizer.backbone.": ""},
    }
    packs = True
    config: OvisU1Config

    def __init__(self, config: OvisU1Config) -> None:
        super().__init__()
        self.config = config
        self.llm = LanguageModel(config.llm)
        self.visual_tokenizer = VisualTokenizer(config.tokenizer)
        self.vte = VisualEmbedding(config.tokenizer.vocab_size, config.llm.hidden_size)
        self.visual_generator = nn.ModuleDict({"backbone": Decoder(config.decoder)})
        self._renew_table()

    def begin(self, pretrained: Sequence[str]) -> None:
        if "llm" in pretrained:
            self._renew_table()

    def _renew_table(self) -> None:
        """Draw the visual table anew, like the language model's embedding (AIDC-AI/Ovis, v1 training)."""
        initialise_like(self.vte, self.llm.model.embed_tokens.weight)

    @property
    def decoder(self) -> Decoder:
        """What draws; the published names have it one level deeper."""
        found = self.visual_generator["backbone"]
        assert isinstance(found, Decoder)
        return found

    def blocks(self) -> list[nn.Module]:
        """The language model's layers; not the drawing decoder's blocks, which conversations do not run."""
        return list(self.llm.model.layers)

    def condition(self, inputs: OvisInputs, *, cache: bool = False, target: tuple[int, int] | None = None) -> Condition:
        """As the contract. Text and its summary are computed once in any case, so `cache` changes nothing."""
        with self.gradients_of_context():
            embeds_BLD = self.embed(inputs)
            states = self.llm.model(inputs_embeds=embeds_BLD, output_hidden_states=True, use_cache=False).hidden_states
            context_BLE = torch.cat([states[-1], states[-2]], dim=-1)
        valid_BL = _valid(inputs.lengths, context_BLE)
        text_BLD, vector_BD = self.decoder.context(context_BLE, valid_BL)
        return Condition(text_BLD, vector_BD, valid_BL, *self._sources(inputs, text_BLD))

    def velocity(self, x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        """As the contract. Raises X2IError if a side of the latents is not a multiple of the decoder's patch."""
        patch = self.config.decoder.patch_size
        rows, columns = x_BCHW.shape[-2] // patch, x_BCHW.shape[-1] // patch
        reverse_BNO = self.decoder(
            pack(x_BCHW, patch),
            image_ids(rows, columns, device=x_BCHW.device).expand(len(x_BCHW), -1, -1),
            condition.text_BLD,
            condition.vector_BD,
            1 - t_B,
            condition.source_BMO,
            condition.source_ids_BM3,
            condition.text_valid_BL,
            condition.source_valid_BM,
        )
        return -unpack(reverse_BNO, rows, columns, patch)

    def next_token(self, inputs: OvisInputs) -> tuple[Tensor, Tensor]:
        """As the contract. Raises X2IError if the batch has no labels."""
        if inputs.labels_BL is None:
            raise X2IError("a batch without labels: prepare it with `chats(…, labels=True)`")
        hidden_BLD = self.llm.model(inputs_embeds=self.embed(inputs), use_cache=False).last_hidden_state
        labels_BL = inputs.labels_BL[:, 1 : hidden_BLD.shape[1]]
        learned_BL = labels_BL != IGNORE
        # the vocabulary is large: logits of learned places only
        logits = self.llm.logits(hidden_BLD[:, :-1][learned_BL]).float()
        losses = F.cross_entropy(logits, labels_BL[learned_BL], reduction="none")
        sums_B = losses.new_zeros(len(labels_BL)).index_add(0, learned_BL.nonzero()[:, 0], losses)
        return sums_B, learned_BL.sum(dim=1)

    def packed(self, inputs: OvisU1Pack, x: Sequence[Tensor], t_G: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """As the contract: the language model's layers are its trunk."""
        return packed(self, inputs, x, t_G)

    @torch.no_grad()
    def answer(self, inputs: OvisInputs, max_tokens: int, stop: Sequence[int]) -> list[list[int]]:
        """As the contract; the stop token is left out."""
        embeds_BLD = self.embed(inputs)
        lengths_B = torch.tensor(inputs.lengths, device=embeds_BLD.device)
        seen_BL = torch.arange(embeds_BLD.shape[1], device=embeds_BLD.device) < lengths_B[:, None]
        out = self.llm.model(inputs_embeds=embeds_BLD, use_cache=True)
        last_BD = out.last_hidden_state[torch.arange(len(lengths_B), device=lengths_B.device), lengths_B - 1]
        answers: list[list[int]] = [[] for _ in inputs.lengths]
        open_rows = set(range(len(answers)))
        for step in range(max_tokens):
            token_B = self.llm.logits(last_BD).argmax(dim=-1)
            for row, token in enumerate(token_B.tolist()):
                if token in stop:
                    open_rows.discard(row)
                elif row in open_rows:
                    answers[row].append(token)
            if not open_rows or step + 1 == max_tokens:
                break
            # what was padding stays unseen behind the question; an answer's positions go on from its own question's
            seen_BL = F.pad(seen_BL, (0, 1), value=True)
            out = self.llm.model(
                input_ids=token_B[:, None],
                attention_mask=seen_BL.long(),
                position_ids=(lengths_B + step)[:, None],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            last_BD = out.last_hidden_state[:, -1]
        return answers

    def embed(self, inputs: OvisInputs) -> Tensor:
        """What the language model reads, [B, L, D]: words, indicators and visual tokens, cut to `max_tokens`."""
        embeds_BLD = self.words(inputs.ids_BL, inputs.marks_BL)
        if inputs.patches_NF is not None:
            visual_VD = self._visual(inputs, inputs.patches_NF).to(embeds_BLD.dtype)
            embeds_BLD = embeds_BLD.masked_scatter(inputs.marks_BL[..., None] == VISUAL, visual_VD)
        elif self.training and torch.is_grad_enabled():
            # text alone: as published, an image takes part with weight 0, so that on every device the same parameters
            # are used in every step
            embeds_BLD = embeds_BLD + 0 * self.unseen(embeds_BLD).sum().to(embeds_BLD.dtype)
        return embeds_BLD[:, : self.config.max_tokens]

    def words(self, ids: Tensor, marks: Tensor) -> Tensor:
        """Embeddings of words and indicators, [..., D], by ids and marks as in `OvisInputs`; of visual tokens any."""
        words = self.llm.model.embed_tokens(ids)
        indicators = self.vte(marks.clamp_min(0)).to(words.dtype)
        return torch.where(marks[..., None] >= 0, indicators, words)

    def visual(self, patches_NF: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Embeddings of the visual tokens of images, in their order, [V, D]."""
        with _gradients(self.visual_tokenizer):
            weights = self.visual_tokenizer(patches_NF, grids)
        embeds_VD: Tensor = self.vte(weights)
        return embeds_VD

    def unseen(self, like: Tensor) -> Tensor:
        """Embedding of the smallest image, all zeros: what takes part where there are no images."""
        encoder = self.config.tokenizer.encoder
        side = encoder.hidden_stride
        return self.visual(like.new_zeros(side**2, 3 * encoder.patch_size**2), ((side, side),))

    def gradients_of_context(self) -> AbstractContextManager[None]:
        """Within the block gradients only if something learns of what makes the decoder's context, and answers."""
        return _gradients(self.llm, self.visual_tokenizer, self.vte)

    def _visual(self, inputs: OvisInputs, patches_NF: Tensor) -> Tensor:
        """Embeddings of all visual tokens of the batch, in their order; an image shown twice is encoded once."""
        visual_VD = self.visual(patches_NF, inputs.grids)
        if inputs.shown == tuple(range(len(inputs.grids))):
            return visual_VD
        merged = self.config.tokenizer.encoder.hidden_stride**2
        each = visual_VD.split([rows * columns // merged for rows, columns in inputs.grids])
        return torch.cat([each[number] for number in inputs.shown])

    def _sources(self, inputs: OvisInputs, like: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Tokens, positions and mask of the source images; the k-th of a row is image k."""
        if not any(inputs.sources):
            return None, None, None
        patch, device = self.config.decoder.patch_size, like.device
        tokens = [
            torch.cat([pack(latents[None].to(like), patch)[0] for latents in row])
            if row
            else like.new_zeros(0, self.config.decoder.in_channels)
            for row in inputs.sources
        ]
        ids = [
            torch.cat(
                [
                    image_ids(latents.shape[-2] // patch, latents.shape[-1] // patch, image, device)
                    for image, latents in enumerate(row, 1)
                ]
            )
            if row
            else torch.zeros(0, 3, device=device)
            for row in inputs.sources
        ]
        source_BMO = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        ids_BM3 = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        return source_BMO, ids_BM3, _valid([len(row) for row in tokens], source_BMO)


def _valid(lengths: Sequence[int], like_BLD: Tensor) -> Tensor | None:
    """Mask [B, L], False on padding; None if there is none."""
    length = like_BLD.shape[1]
    if min(lengths) >= length:
        return None
    return torch.arange(length, device=like_BLD.device) < torch.tensor(lengths, device=like_BLD.device)[:, None]


def _gradients(*modules: nn.Module) -> AbstractContextManager[None]:
    """Gradients only if some parameter of these trains: frozen parts must not pay for a graph."""
    trains = any(parameter.requires_grad for module in modules for parameter in module.parameters())
    return torch.set_grad_enabled(torch.is_grad_enabled() and trains)


def _trunk(numbers: Qwen3Numbers) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=numbers.vocab_size,
        hidden_size=numbers.hidden_size,
        intermediate_size=numbers.intermediate_size,
        num_hidden_layers=numbers.layers,
        num_attention_heads=numbers.heads,
        num_key_value_heads=numbers.kv_heads,
        head_dim=numbers.head_dim,
        max_position_embeddings=numbers.max_positions,
        rms_norm_eps=numbers.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": numbers.rope_theta},
        tie_word_embeddings=True,
        attn_implementation=attention.NAME,
    )


MODEL = OvisU1
