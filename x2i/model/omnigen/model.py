"""OmniGen: one transformer that reads text and images and predicts the velocity of an image's latents.

Architecture (paper arXiv 2409.11340; code VectorSpaceLab/OmniGen):
- trunk: a decoder (published: Phi-3) over one sequence, [left pad][text and condition images][time token][noisy patches]
- two patchers (convolutions): one for the noisy image, one for clean condition images; both add the same
  fixed 2-D sine-cosine table, cropped around its centre
- the timestep in [0, 1] enters twice: as a token before the noisy patches, and as shift and scale of the head
- mask: text, images and time are causal; a condition image is bidirectional inside; noisy patches see everything
- head: LayerNorm without affine, shift and scale, Linear; zero at initialisation, so the first output is 0
- text head (ours, by choice): a linear map of the trunk's output on the condition's tokens to the next token

The condition never sees time or noise, so its keys and values can be kept over all steps (cache.py).

Tensor names carry their axes:
    B batch · L condition tokens (padded) · N noisy tokens · S = L + 1 + N · D width · V vocabulary
    C latent channels · H, W latent height and width · P patch side
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from x2i.base.errors import X2IError
from x2i.model.base import Model
from x2i.model.omnigen import trunk
from x2i.model.omnigen.blocks import FinalLayer, PatchEmbed, TimestepEmbedder, sincos_table
from x2i.model.omnigen.cache import ConditionCache
from x2i.model.omnigen.config import OmniGenConfig
from x2i.model.omnigen.masks import additive, condition_mask, hybrid_mask, position_ids, step_mask
from x2i.model.omnigen.packing import OmniGenPack, packed
from x2i.model.omnigen.prompt import IGNORED, PromptBatch

#: Names of the paper for parts of the network -> prefixes of their parameters.
PARTS = {
    "trunk": ("llm.",),
    "patchers": ("x_embedder.", "input_x_embedder."),
    "time": ("time_token.", "t_embedder."),
    "head": ("final_layer.",),
    "text_head": ("lm_head.",),
}


@dataclass(frozen=True)
class Condition:
    """What all steps share: the embedded tokens [B, L, D], or (`cache`) their keys and values in every layer."""

    prompt: PromptBatch
    embeds_BLD: Tensor | None
    cache: ConditionCache | None = None


class OmniGen(Model[PromptBatch]):
    """Predicts the velocity x1 - x0 of noisy latents, given text, condition images and the timestep."""

    parts = PARTS
    packs = True
    pretrained: ClassVar = {"trunk": {"llm.": "model."}, "text_head": {"lm_head.": "lm_head."}}  # any CausalLM

    def __init__(self, config: OmniGenConfig) -> None:
        super().__init__()
        self.config = config
        self.answers = config.text_head
        width, patch, channels = config.hidden_size, config.patch_size, config.in_channels
        self.x_embedder = PatchEmbed(channels, width, patch)
        self.input_x_embedder = PatchEmbed(channels, width, patch)
        self.time_token = TimestepEmbedder(config.time_dim, width)
        self.t_embedder = TimestepEmbedder(config.time_dim, width)
        table = sincos_table(width, config.pos_embed_max_size, config.pos_embed_base_size)
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", table[None])  # in the published checkpoints, so kept in ours
        self.final_layer = FinalLayer(width, patch * patch * channels)
        self.llm = trunk.build(config)
        if config.text_head and not config.tie_text_head:
            self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
            nn.init.normal_(self.lm_head.weight, std=0.02)
        self._initialise()

    def _initialise(self) -> None:
        for patcher in (self.x_embedder.proj, self.input_x_embedder.proj):
            nn.init.xavier_uniform_(patcher.weight.view(patcher.weight.shape[0], -1))
            nn.init.zeros_(patcher.bias)
        for embedder in (self.time_token, self.t_embedder):
            for linear in (embedder.mlp[0], embedder.mlp[2]):
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)
        for linear in (self.final_layer.linear, self.final_layer.adaLN_modulation[1]):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> OmniGen:
        super()._apply(fn, recurse)
        trunk.restore_frequencies(self.llm)
        return self

    def blocks(self) -> list[nn.Module]:
        """The trunk's decoder layers."""
        return list(self.llm.layers)

    def condition(
        self,
        inputs: PromptBatch,
        *,
        cache: bool = False,
        target: tuple[int, int] | None = None,
        offload: bool = False,
    ) -> Condition:
        """The embedded prompt, or (`cache`) the keys and values of its tokens in every layer.

        Args:
            inputs: token ids, and the latents of the condition images in the order of their placeholders.
            cache: keep keys and values, so that many steps share them: the same numbers for less work.
            target: latent height and width to be drawn. A cache needs it where the rotary frequencies depend on the
                whole sequence's length, as Phi-3's long-rope does.
            offload: keep the cache in host memory, and fetch it layer by layer.

        Raises:
            X2IError: a cache with gradients, or without the target that it needs; an image that does not fit.
        """
        embeds_BLD = self.embed_prompt(inputs)
        if not cache:
            return Condition(inputs, embeds_BLD)
        if torch.is_grad_enabled():
            raise X2IError("a cached condition has no gradients: call condition(cache=True) under torch.no_grad()")
        if target is None and trunk.depends_on_length(self.llm):
            raise X2IError("the trunk's rotary frequencies depend on the length: condition(cache=True) needs `target`")
        kept = ConditionCache(embeds_BLD.shape[1], offload)
        # One token more, which nobody sees, stands where the last noisy one will: its position decides the frequencies
        noisy = self._tokens(*target) if target else 0
        last_B1 = position_ids(inputs.valid_BL, 1 + noisy)[:, -1:]
        positions_BT = torch.cat([position_ids(inputs.valid_BL, 0), last_B1], dim=1)
        allowed_BTT = hybrid_mask(inputs.valid_BL, inputs.blocks_BL, 0)
        self._trunk(F.pad(embeds_BLD, (0, 0, 0, 1)), allowed_BTT, positions_BT, kept)
        kept.fill()
        return Condition(inputs, None, kept)

    def velocity(self, x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        """Velocity of the noisy latents, in their shape.

        Args:
            x_BCHW: noisy latents; H and W are multiples of the patch size.
            t_B: timesteps in [0, 1]; 0 is noise, 1 is data.
            condition: of `condition`, for as many rows.

        Raises:
            X2IError: an image is larger than the table of positions, or not a multiple of the patch.
        """
        height, width = x_BCHW.shape[-2:]
        noisy_BND = self.hidden(x_BCHW, t_B, condition)[:, -self._tokens(height, width) :]
        return self.unpatchify(self.final_layer(noisy_BND, self.t_embedder(t_B)), height, width)

    def hidden(self, x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        """The trunk's last hidden states: [B, S, D] of the whole sequence, of a cached condition [B, 1 + N, D]."""
        valid_BL, length = condition.prompt.valid_BL, condition.prompt.valid_BL.shape[1]
        noisy_BND = self.x_embedder(x_BCHW) + self.positions(*x_BCHW.shape[-2:])
        count = noisy_BND.shape[1]
        step_BTD = torch.cat([self.time_token(t_B)[:, None], noisy_BND], dim=1)
        positions_BS = position_ids(valid_BL, 1 + count)
        if condition.embeds_BLD is None:
            return self._trunk(step_BTD, step_mask(valid_BL, count), positions_BS[:, length:], condition.cache)
        embeds_BSD = torch.cat([condition.embeds_BLD, step_BTD], dim=1)
        return self._trunk(embeds_BSD, hybrid_mask(valid_BL, condition.prompt.blocks_BL, count), positions_BS)

    def _trunk(self, embeds: Tensor, allowed: Tensor, positions: Tensor, cache: Cache | None = None) -> Tensor:
        # transformers hands a 4-D mask through to the attention untouched
        out: Tensor = self.llm(
            inputs_embeds=embeds,
            attention_mask=additive(allowed, embeds)[:, None],
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return out

    def embed_prompt(self, prompt: PromptBatch) -> Tensor:
        """Token embeddings [B, L, D], with the patches of the condition images in their places."""
        embeds_BLD: Tensor = self.llm.embed_tokens(prompt.ids_BL)
        if not prompt.images:
            return embeds_BLD
        if len({image.shape for image in prompt.images}) == 1:
            stacked = torch.stack(list(prompt.images))
            tokens = self.input_x_embedder(stacked) + self.positions(*stacked.shape[-2:])
            tokens_MD = tokens.flatten(0, 1)
        else:
            parts = [self.input_x_embedder(i[None])[0] + self.positions(*i.shape[-2:])[0] for i in prompt.images]
            tokens_MD = torch.cat(parts)
        is_image_BL1 = (prompt.blocks_BL > 0)[..., None]
        return embeds_BLD.masked_scatter(is_image_BL1, tokens_MD.to(embeds_BLD.dtype))

    def next_token(self, inputs: PromptBatch) -> tuple[Tensor, Tensor]:
        """Next-token loss of chats with labels: sum of each row's learned tokens, float32 [B], and their number [B].

        Raises:
            X2IError: the model has no text head, or the batch no labels.
        """
        self.need_text_head()
        if inputs.labels_BL is None:
            raise X2IError("next_token needs labels: prepare the chats with labels=True")
        allowed_BLL = condition_mask(inputs.valid_BL, inputs.blocks_BL)
        hidden_BLD = self._trunk(self.embed_prompt(inputs), allowed_BLL, position_ids(inputs.valid_BL, 0))
        following_BM = inputs.labels_BL[:, 1:]
        learned_BM = (following_BM != IGNORED) & inputs.valid_BL[:, :-1]  # nothing foretells a first token
        logits_KV = self.logits(hidden_BLD[:, :-1][learned_BM])  # of learned tokens alone: V is large
        losses_K = F.cross_entropy(logits_KV.float(), following_BM[learned_BM], reduction="none")
        sums_B = torch.zeros(len(learned_BM), device=losses_K.device)
        return sums_B.index_add(0, learned_BM.nonzero()[:, 0], losses_K), learned_BM.sum(dim=1)

    def packed(self, inputs: OmniGenPack, x: Sequence[Tensor], t_G: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """As the contract. Each document has the rotary frequencies that it has alone, long-rope or not."""
        return packed(self, inputs, x, t_G)

    @torch.no_grad()
    def answer(self, inputs: PromptBatch, max_tokens: int, stop: Sequence[int]) -> list[list[int]]:
        """Greedy continuation of chats, without the stop token. Raises X2IError without a text head."""
        self.need_text_head()
        embeds, valid, blocks = self.embed_prompt(inputs), inputs.valid_BL, inputs.blocks_BL
        ends = torch.tensor(list(stop), dtype=torch.long, device=valid.device)
        done_B = torch.zeros(len(valid), dtype=torch.bool, device=valid.device)
        cache: DynamicCache | None = None
        said: list[Tensor] = []
        while len(said) < max_tokens and not done_B.all():
            if cache is None or trunk.switches_at(self.llm, int(valid.sum(dim=1).max())):
                cache, fresh = DynamicCache(), embeds  # other frequencies: the keys must be computed anew
                allowed = condition_mask(valid, blocks)
            else:
                fresh, allowed = embeds[:, -1:], valid[:, None]
            positions = position_ids(valid, 0)[:, -fresh.shape[1] :]
            chosen_B = self.logits(self._trunk(fresh, allowed, positions, cache)[:, -1]).argmax(dim=-1)
            said.append(chosen_B)
            done_B = done_B | torch.isin(chosen_B, ends)
            embeds = torch.cat([embeds, self.llm.embed_tokens(chosen_B)[:, None]], dim=1)
            valid, blocks = F.pad(valid, (0, 1), value=True), F.pad(blocks, (0, 1))
        rows = torch.stack(said, dim=1).tolist() if said else [[] for _ in range(len(valid))]
        return [row[: next((i for i, token in enumerate(row) if token in stop), len(row))] for row in rows]

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, [..., D] -> [..., V]."""
        if self.config.tie_text_head:
            return F.linear(hidden, self.llm.embed_tokens.weight)
        out: Tensor = self.lm_head(hidden)
        return out

    def need_text_head(self) -> None:
        if not self.config.text_head:
            raise X2IError("this OmniGen has no text head: set `text_head: true` in its configuration")

    def _tokens(self, height: int, width: int) -> int:
        return (height // self.config.patch_size) * (width // self.config.patch_size)

    def positions(self, height: int, width: int) -> Tensor:
        """The table's centre, [1, H/P * W/P, D], for latents of this height and width."""
        patch, side = self.config.patch_size, self.config.pos_embed_max_size
        rows, columns = height // patch, width // patch
        if rows > side or columns > side or height % patch or width % patch:
            raise X2IError(
                f"latents of {height} x {width}: each side must be a multiple of {patch}, and at most {side * patch}"
            )
        top, left = (side - rows) // 2, (side - columns) // 2
        grid = self.pos_embed.view(side, side, -1)[top : top + rows, left : left + columns]
        return grid.reshape(1, rows * columns, -1)

    def unpatchify(self, patches_BNO: Tensor, height: int, width: int) -> Tensor:
        """[B, N, P * P * C] -> [B, C, H, W]."""
        patch, channels = self.config.patch_size, self.config.in_channels
        rows, columns = height // patch, width // patch
        grid = patches_BNO.view(-1, rows, columns, patch, patch, channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, height, width)


MODEL = OmniGen
