"""Ovis2: a language model that reads images as probabilistic visual tokens and answers in words.

Architecture (paper arXiv 2405.20797; code AIDC-AI/Ovis at 58b0ad6):
- an image is cut into tiles (`partition.py`), each resized and padded to one size
- visual tokenizer: AIMv2 with a fixed table of positions, 2 x 2 features together, a head: weights of visual words
- the visual table turns weights into embeddings; its last five rows are the marks between tiles
- these embeddings stand among those of the text in one causal sequence: Qwen2.5, which is left as it is
- learned are the assistant's words; nothing is predicted of an image

Tensor names carry their axes:
    B batch · L tokens (padded) · D width of the language model · N patches of all tiles · F values of a patch
    M visual tokens of all tiles · P places of visual tokens in the batch · K learned tokens · V words
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from x2i.base.errors import X2IError
from x2i.model.base import Model
from x2i.model.layers import attention, chat_pack
from x2i.model.layers.aimv2 import Grid
from x2i.model.layers.chat import IGNORE
from x2i.model.layers.chat_pack import ChatPack
from x2i.model.layers.visual_tokenizer import VisualEmbedding, VisualTokenizer, initialise_like
from x2i.model.ovis2.config import Ovis2Config, Qwen2Numbers, parts
from x2i.model.ovis2.partition import INDICATORS, START, TILE


@dataclass(frozen=True)
class Ovis2Batch:
    """Conversations, padded on the right to be learned and on the left to be answered.

    Attributes:
        ids_BL: text tokens from 0 up; `TILE` at each visual token; `INDICATORS`.
        valid_BL: False on padding.
        labels_BL: text tokens to be learned, `IGNORE` elsewhere; None where nothing is.
        patches_NF: pixels of all tiles in merge order, row by row of the batch.
        grids: rows and columns of patches of each tile.
        visual_P: which visual token stands at each `TILE` of `ids_BL`, row by row.
    """

    ids_BL: Tensor
    valid_BL: Tensor
    labels_BL: Tensor | None
    patches_NF: Tensor
    grids: tuple[Grid, ...]
    visual_P: Tensor

    def to(self, device: torch.device | str) -> Ovis2Batch:
        """The same batch on another device."""
        return replace(
            self,
            ids_BL=self.ids_BL.to(device),
            valid_BL=self.valid_BL.to(device),
            labels_BL=None if self.labels_BL is None else self.labels_BL.to(device),
            patches_NF=self.patches_NF.to(device),
            visual_P=self.visual_P.to(device),
        )


class Ovis2(Model[Ovis2Batch]):
    """Answers questions about images. `visual_tokenizer.tau` is the temperature of gumbel_argmax."""

    # Qwen/Qwen2.5-*-Instruct, apple/aimv2-*-patch14-448 (its first files; later ones have transformers' own names)
    pretrained: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "llm": {"llm.": ""},
        "encoder": {"visual_tokenizer.backbone.": ""},
    }
    draws = False
    packs = True

    def __init__(self, config: Ovis2Config) -> None:
        super().__init__()
        self.config = config
        self.parts = parts(config)  # which block is the last depends on the numbers
        self.llm: Any = Qwen2ForCausalLM(_numbers(config.llm))
        self.visual_tokenizer = VisualTokenizer(config.tokenizer)
        self.vte = VisualEmbedding(config.tokenizer.vocab_size, config.llm.hidden_size)
        self.renew_table()

    def renew_table(self) -> None:
        """Draw the visual table anew, like the language model's embedding: as training begins with a pretrained one."""
        initialise_like(self.vte, self.llm.model.embed_tokens.weight)

    def blocks(self) -> list[nn.Module]:
        """The language model's layers."""
        return list(self.llm.model.layers)

    def next_token(self, inputs: Ovis2Batch) -> tuple[Tensor, Tensor]:
        if inputs.labels_BL is None:
            raise X2IError("Ovis2: a batch without labels has nothing to learn; prepare it with labels=True")
        wanted_BL = inputs.labels_BL[:, 1:]
        learned_BL = wanted_BL != IGNORE
        # the vocabulary is large: logits of the learned tokens only
        logits_KV = self.llm.lm_head(self.hidden(inputs)[:, :-1][learned_BL])
        losses_K = F.cross_entropy(logits_KV.float(), wanted_BL[learned_BL], reduction="none")
        losses_BL = losses_K.new_zeros(wanted_BL.shape).masked_scatter(learned_BL, losses_K)
        return losses_BL.sum(dim=1), learned_BL.sum(dim=1)

    def packed(
        self, inputs: ChatPack[Ovis2Batch], x: Sequence[Tensor], t_G: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """As the contract; there are no pictures to draw: `x` and `t_G` are empty."""
        chat_pack.no_pictures("Ovis2", x, t_G)
        embeds_1TD = self.embed(inputs.row, dummy=True)
        return chat_pack.next_token(self.llm.model, self.llm.lm_head, embeds_1TD, inputs, self.flex)

    @torch.no_grad()
    def answer(self, inputs: Ovis2Batch, max_tokens: int, stop: Sequence[int]) -> list[list[int]]:
        written_BL = self.llm.generate(
            inputs_embeds=self.embed(inputs),
            attention_mask=inputs.valid_BL.long(),
            max_new_tokens=max_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=list(stop) or None,
            pad_token_id=stop[0] if stop else 0,
        )
        return [_until(row, stop) for row in written_BL.tolist()]

    def hidden(self, inputs: Ovis2Batch) -> Tensor:
        """The language model's last hidden states [B, L, D]."""
        return self.llm.model(
            inputs_embeds=self.embed(inputs),
            attention_mask=inputs.valid_BL,
            position_ids=(inputs.valid_BL.long().cumsum(dim=1) - 1).clamp_min(0),
            use_cache=False,
        ).last_hidden_state

    def embed(self, inputs: Ovis2Batch, dummy: bool = False) -> Tensor:
        """Embeddings [B, L, D]: of words, of marks, and of visual tokens in their places.

        Args:
            inputs: a batch.
            dummy: of text alone encode a tile all the same; default: where there are gradients.
        """
        ids_BL = inputs.ids_BL
        embeds_BLD = self.llm.model.embed_tokens(ids_BL.clamp_min(0))
        first, count = self.config.tokenizer.vocab_size - len(INDICATORS), len(INDICATORS)
        marks_BLD = self.vte((START - ids_BL).clamp(0, count - 1) + first)
        is_mark_BL = (ids_BL <= START) & (ids_BL > START - count)
        embeds_BLD = torch.where(is_mark_BL[..., None], marks_BLD.to(embeds_BLD.dtype), embeds_BLD)
        if inputs.grids:
            visual_PD = self.visual(inputs.patches_NF, inputs.grids)[inputs.visual_P]
            return embeds_BLD.masked_scatter((ids_BL == TILE)[..., None], visual_PD.to(embeds_BLD.dtype))
        if dummy or (self.training and torch.is_grad_enabled()):
            # text alone, as published: a grey tile takes part with weight 0, so that on every device all parameters
            # are used in every step
            return embeds_BLD + 0 * self.visual(*self._grey_tile(embeds_BLD.device)).sum().to(embeds_BLD.dtype)
        return embeds_BLD

    def visual(self, patches_NF: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Embeddings of the visual tokens of all tiles, [M, D]."""
        return self.vte(self.visual_tokenizer(patches_NF, grids))

    def _grey_tile(self, device: torch.device) -> tuple[Tensor, list[Grid]]:
        patch = self.config.tokenizer.encoder.patch_size
        side = self.config.side // patch
        return torch.zeros(side * side, 3 * patch * patch, device=device), [(side, side)]

    def begin(self, pretrained: Sequence[str]) -> None:
        if "llm" in pretrained:
            self.renew_table()


def _until(ids: list[int], stop: Sequence[int]) -> list[int]:
    return ids[: next((place for place, token in enumerate(ids) if token in stop), len(ids))]


def _numbers(config: Qwen2Numbers) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation=attention.NAME,
    )


MODEL = Ovis2
