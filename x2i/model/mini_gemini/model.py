"""Mini-Gemini: a language model whose image tokens look up details in a high-resolution view of the same image.

Architecture (paper arXiv 2403.18814; code dvlab-research/MGM, mgm/model/mgm_arch.py):
- low view: CLIP's hidden states before the last layer, patch tokens only; HD: crops in a grid and the whole image
- high view: ConvNeXt, four stages on the grid of the first, concatenated
- patch info mining: every low token asks the window of the high view that lies under it; single head, residual
- projector: two linear maps with a GELU, then the tokens stand where `<image>` stood
- any causal language model of transformers; one with scaled embeddings (Gemma) scales the image tokens too, as
  the transformers of MGM's time did (it multiplied all input embeddings inside the trunk)

Tensor names carry their axes:
    B rows · L tokens (padded) · M images · V low views per image · N tokens per view · K keys per window
    C channels · H, W height and width · D width of the language model
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

from x2i.base.errors import X2IError
from x2i.model.base import Model
from x2i.model.layers import attention, chat_pack
from x2i.model.layers.chat_pack import ChatPack
from x2i.model.mini_gemini.batch import IGNORE, ChatBatch
from x2i.model.mini_gemini.config import LanguageModelConfig, LowConfig, MiniGeminiConfig
from x2i.model.mini_gemini.convnext import ConvNeXt, resized


class ClipTower(nn.Module):
    """CLIP's image encoder up to the chosen layer, by the names of its published weights."""

    def __init__(self, config: LowConfig) -> None:
        super().__init__()
        self.run = config.layers + 1 + config.select_layer
        clip: Any = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                projection_dim=config.projection_dim,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                image_size=config.image_size,
                patch_size=config.patch_size,
                attn_implementation="sdpa",
            )
        )
        # transformers dropped the inner `vision_model` on the way; the published names have it
        self.vision_tower = nn.ModuleDict({"vision_model": getattr(clip, "vision_model", clip)})

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H, W] to patch tokens [B, N, C]."""
        vision: Any = self.vision_tower["vision_model"]
        pixels_BCHW = pixels_BCHW.to(vision.embeddings.patch_embedding.weight.dtype)
        x_BLC = vision.pre_layrnorm(vision.embeddings(pixels_BCHW))
        for layer in vision.encoder.layers[: self.run]:
            x_BLC = layer(x_BLC, None)
        return x_BLC[:, 1:]


class MiniGemini(Model[ChatBatch]):
    """Reads images and writes text; what it writes between <h> and </h> is a prompt for SDXL (`generation`)."""

    parts: Mapping[str, tuple[str, ...]] = {
        "llm": ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head."),
        "projector": ("model.mm_projector.",),
        "mining": ("model.vlm_uni_",),
        "low_encoder": ("model.vision_tower.",),
        "high_encoder": ("model.vision_tower_aux.",),
    }
    # google/gemma-2b-it, openai/clip-vit-large-patch14-336, laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup
    pretrained: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "llm": {prefix: prefix for prefix in parts["llm"]},
        "low_encoder": {"model.vision_tower.vision_tower.vision_model.": "vision_model."},
        "high_encoder": {
            "model.vision_tower_aux.vision_stem.": "visual.trunk.stem.",
            "model.vision_tower_aux.vision_stages.": "visual.trunk.stages.",
        },
    }
    draws = False
    answers = True

    def __init__(self, config: MiniGeminiConfig) -> None:
        super().__init__()
        self.config = config
        llm = _language_model(config.llm)
        self.model: Any = llm.model  # the published names put everything but the head into the trunk
        self.lm_head: nn.Linear = llm.lm_head
        self.packs = _packable(llm.config)
        low, high, width = config.low.hidden_size, config.high.channels, config.llm.hidden_size
        self.model.vision_tower = ClipTower(config.low)
        self.model.vision_tower_aux = ConvNeXt(config.high.widths, config.high.depths)
        self.model.vlm_uni_query_projector = nn.Sequential(nn.LayerNorm(low), nn.Linear(low, low))
        self.model.vlm_uni_aux_projector = nn.Sequential(nn.LayerNorm(high), nn.Linear(high, low))
        self.model.vlm_uni_val_projector = nn.Sequential(nn.LayerNorm(high), nn.Linear(high, low))
        self.model.mm_projector = nn.Sequential(nn.Linear(low, width), nn.GELU(), nn.Linear(width, width))

    def blocks(self) -> list[nn.Module]:
        """The language model's layers."""
        return list(self.model.layers)

    def mine(self, low_BNC: Tensor, high_BCHW: Tensor) -> Tensor:
        """Low-resolution tokens with what their windows of the high-resolution features add, [B, N, C].

        Args:
            low_BNC: tokens of a square view, row by row.
            high_BCHW: features of the same view; token (r, c) owns the window (r, c) of H / sqrt(N) rows and columns.
        """
        windows_BNKC = windows(high_BCHW, round(low_BNC.shape[1] ** 0.5))
        query_BN1C = self.model.vlm_uni_query_projector(low_BNC)[:, :, None]
        key_BNKC = self.model.vlm_uni_aux_projector(windows_BNKC)
        value_BNKC = self.model.vlm_uni_val_projector(windows_BNKC)
        score_BN1K = query_BN1C @ (key_BNKC.transpose(-1, -2) / key_BNKC.shape[-1] ** 0.5)
        return low_BNC + (score_BN1K.softmax(dim=-1) @ value_BNKC)[:, :, 0]

    def mined(self, low_MVCHW: Tensor, high_MCHW: Tensor) -> Tensor:
        """Tokens of images before the projector, [M, V * N, C]: the whole image first, then the crops row by row.

        Args:
            low_MVCHW: pixels of the low-resolution views: the crops row by row, then the whole image.
            high_MCHW: pixels of the high-resolution views.
        """
        images, grid = len(low_MVCHW), self.config.grid
        dtype = self.model.vlm_uni_query_projector[1].weight.dtype
        low_MVNC = self.model.vision_tower(low_MVCHW.flatten(0, 1)).to(dtype).unflatten(0, (images, -1))
        high_MCHW = self.model.vision_tower_aux(high_MCHW).to(dtype)
        height, width = high_MCHW.shape[-2] // grid, high_MCHW.shape[-1] // grid
        tiles = high_MCHW.unflatten(3, (grid, width)).unflatten(2, (grid, height)).permute(0, 2, 4, 1, 3, 5)
        crops = self.mine(low_MVNC[:, : grid**2].flatten(0, 1), tiles.flatten(0, 2))
        found = [crops.unflatten(0, (images, -1)).flatten(1, 2)]
        if self.config.overview:
            found.insert(0, self.mine(low_MVNC[:, -1], resized(high_MCHW, (height, width))))
        return torch.cat(found, dim=1)

    def encode(self, low_MVCHW: Tensor, high_MCHW: Tensor) -> Tensor:
        """Pixels of images, as `mined` takes them, to tokens of the language model, [M, V * N, D]."""
        return self.model.mm_projector(self.mined(low_MVCHW, high_MCHW))

    def embed(self, inputs: ChatBatch, dummy: bool = False) -> Tensor:
        """Embeddings [B, L, D] of a batch, the image tokens in their places.

        Args:
            inputs: a batch.
            dummy: of text alone encode a grey image all the same, with weight 0.
        """
        embeds_BLD = self.model.embed_tokens(inputs.ids_BL)
        if inputs.low_MVCHW is None or inputs.high_MCHW is None:
            if not dummy:
                return embeds_BLD
            low, high = self.config.low.image_size, self.config.high.image_size
            grey_MND = self.encode(
                torch.zeros(1, self.config.views, 3, low, low, device=embeds_BLD.device),
                torch.zeros(1, 3, high, high, device=embeds_BLD.device),
            )
            return embeds_BLD + 0 * grey_MND.sum().to(embeds_BLD.dtype)
        tokens_MND = self.encode(inputs.low_MVCHW, inputs.high_MCHW)
        scale = getattr(self.model.embed_tokens, "embed_scale", None)
        if scale is not None:  # an embedding that scales itself; an older trunk scales all its inputs
            tokens_MND = tokens_MND * torch.as_tensor(scale).to(tokens_MND)
        return embeds_BLD.masked_scatter(inputs.image_BL[..., None], tokens_MND.to(embeds_BLD.dtype))

    def next_token(self, inputs: ChatBatch) -> tuple[Tensor, Tensor]:
        if inputs.labels_BL is None:
            raise X2IError("the batch has no labels: prepare it with labels=True")
        hidden_BLD = self._trunk(self.embed(inputs), inputs.valid_BL).last_hidden_state
        labels = inputs.labels_BL[:, 1:]
        learned = labels != IGNORE
        logits = self.lm_head(hidden_BLD[:, :-1][learned]).float()
        losses = F.cross_entropy(logits, labels[learned], reduction="none")
        rows = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)[learned]
        return losses.new_zeros(len(labels)).index_add(0, rows, losses), learned.sum(dim=1)

    def packed(
        self, inputs: ChatPack[ChatBatch], x: Sequence[Tensor], t_G: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """As the contract; there are no pictures to draw: `x` and `t_G` are empty. One call of each encoder takes the
        images of all conversations.
        """
        if not self.packs:
            return super().packed(inputs, x, t_G)
        chat_pack.no_pictures("Mini-Gemini", x, t_G)
        return chat_pack.next_token(self.model, self.lm_head, self.embed(inputs.row, dummy=True), inputs, self.flex)

    @torch.no_grad()
    def answer(self, inputs: ChatBatch, max_tokens: int, stop: Sequence[int]) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in inputs.ids_BL]
        open_rows = set(range(len(answers)))
        embeds_BLD, valid_BL, cache = self.embed(inputs), inputs.valid_BL, None
        for _ in range(max_tokens):
            out = self._trunk(embeds_BLD, valid_BL, cache=cache, use_cache=True)
            cache = out.past_key_values
            chosen_B = self.lm_head(out.last_hidden_state[:, -1]).argmax(dim=-1)
            for row, token in enumerate(chosen_B.tolist()):
                if row in open_rows and token not in stop:
                    answers[row].append(token)
                else:
                    open_rows.discard(row)
            if not open_rows:
                break
            embeds_BLD = self.model.embed_tokens(chosen_B[:, None])
            valid_BL = torch.cat([valid_BL, valid_BL.new_ones(len(valid_BL), 1)], dim=1)
        return answers

    def _trunk(self, embeds_BLD: Tensor, valid_BL: Tensor, cache: Any = None, use_cache: bool = False) -> Any:
        """The language model over the last tokens of rows that `valid_BL` describes from their beginning."""
        positions_BL = (valid_BL.long().cumsum(dim=1) - 1).clamp_min(0)
        return self.model(
            inputs_embeds=embeds_BLD,
            attention_mask=valid_BL.long(),
            position_ids=positions_BL[:, -embeds_BLD.shape[1] :],
            past_key_values=cache,
            use_cache=use_cache,
        )


def windows(high_BCHW: Tensor, side: int) -> Tensor:
    """Features cut into side x side windows, row by row: [B, N, K, C] with N = side^2, K = H * W / N."""
    high_BCrhcw = high_BCHW.unflatten(3, (side, -1)).unflatten(2, (side, -1))
    return high_BCrhcw.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def _language_model(config: LanguageModelConfig) -> Any:
    numbers = {"vocab_size": config.vocab_size, "hidden_size": config.hidden_size} | config.numbers
    try:
        llm = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config.model_type, **numbers), attn_implementation=attention.NAME
        )
    except ValueError as error:
        raise X2IError(f"llm: transformers builds no {config.model_type} of these numbers ({error})") from None
    if not isinstance(getattr(llm, "lm_head", None), nn.Linear) or not hasattr(
        getattr(llm, "model", 0), "embed_tokens"
    ):
        raise X2IError(
            f"llm: {config.model_type} has no `model.embed_tokens` and `lm_head`; take gemma, llama, qwen2 …"
        )
    if getattr(llm.config, "final_logit_softcapping", None):
        raise X2IError(f"llm: {config.model_type} caps its logits, which Mini-Gemini does not; take gemma, llama, …")
    return llm


def _packable(config: Any) -> bool:
    """Whether a language model does with a conversation in a pack what it does with it alone.

    It does not where layers look back a number of tokens only (the mask of a pack has no such window), or where the
    rotary frequencies follow the longest position of a call.
    """
    kinds = getattr(config, "layer_types", None)
    windows = any(kind != "full_attention" for kind in kinds) if kinds else getattr(config, "sliding_window", None)
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # by kind of layer
    return not windows and not any(part.get("rope_type") in ("dynamic", "longrope") for part in ropes)


MODEL = MiniGemini
