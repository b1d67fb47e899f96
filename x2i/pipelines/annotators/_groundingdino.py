"""Grounding DINO by two libraries, behind one call: token ids and pixels in, logits and boxes out.

groundingdino-py 0.4.0 (Apache-2.0) is mended for transformers 5, whose BertModel lacks the methods that the
package's wrapper borrows; made to run offline: BERT's weights are in the published checkpoint, so that only
its vocabulary (and, if it is not bert-base's, its configuration) is needed besides; and mended for batches of
unequal prompts (see `_own_masks`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from x2i.base.packages import need
from x2i.pipelines.annotators._pictures import bilinear, normalised
from x2i.pipelines.annotators._torch import checkpoint, component, filled, pretrained

#: Configurations that the package carries, by the name of their backbone.
PACKAGED = {"SwinT": "GroundingDINO_SwinT_OGC.py", "SwinB": "GroundingDINO_SwinB_cfg.py"}

#: In published checkpoints, and used only in training or by old transformers.
_UNUSED = {"label_enc.weight", "bert.embeddings.position_ids"}


def size_for(height: int, width: int, side: int, longest: int) -> tuple[int, int]:
    """The published size: shorter side `side`, unless the longer one would pass `longest`.

    No side is under 16 pixels, nor, for that reason, is the aspect of extreme strips kept.
    """
    small, large = sorted((height, width))
    if large / small * side > longest:
        side = round(longest * small / large)
    side = max(16, side)
    other = min(int(side * large / small), max(longest, side))
    return (side, other) if height <= width else (other, side)


def prepare(pixels: np.ndarray, side: int, longest: int) -> np.ndarray:
    """uint8 [height, width, 3] to float32 [3, H, W]: resized bilinearly, normalised as ImageNet."""
    height, width = size_for(pixels.shape[0], pixels.shape[1], side, longest)
    return normalised(bilinear(pixels, width, height))


def padded(ids: list[list[int]], pad: int) -> dict[str, Any]:
    """Token ids of unequal length as `input_ids`, `attention_mask`, `token_type_ids`, int64 [B, longest]."""
    import torch

    ids_BL = torch.full((len(ids), max(map(len, ids))), pad)
    mask_BL = torch.zeros_like(ids_BL)
    for row, tokens in enumerate(ids):
        ids_BL[row, : len(tokens)] = torch.tensor(tokens)
        mask_BL[row, : len(tokens)] = 1
    return {"input_ids": ids_BL, "attention_mask": mask_BL, "token_type_ids": torch.zeros_like(ids_BL)}


class Transformers:
    """transformers' GroundingDinoForObjectDetection, from a folder in the hub's format."""

    def __init__(self, folder: str) -> None:
        library = need("transformers", "transformers", "grounding")
        self.tokenizer = component(library.AutoTokenizer, folder, "grounding")
        self.model = pretrained(library.AutoModelForZeroShotObjectDetection, folder, "grounding")
        self.limit = int(self.model.config.max_text_len)

    def __call__(self, images_BCHW: Any, ids: list[list[int]]) -> tuple[Any, Any]:
        """Logits [B, queries, tokens] and boxes [B, queries, (cx, cy, w, h)] as shares."""
        text = {k: v.to(images_BCHW.device) for k, v in padded(ids, self.tokenizer.pad_token_id).items()}
        out = self.model(pixel_values=images_BCHW, **text)
        return out.logits, out.pred_boxes


class Published:
    """The authors' implementation.

    Args:
        path: a published .pth. architecture: "SwinT", "SwinB" or a configuration file in the package's format.
        bert: a vocab.txt (bert-base-uncased's), or a folder with BERT's configuration and tokenizer.

    Raises:
        X2IError: the package is missing, or the checkpoint is not of this architecture.
    """

    def __init__(self, path: str, architecture: str, bert: str) -> None:
        need("groundingdino", "groundingdino-py", "grounding")
        from groundingdino.models import build_model
        from groundingdino.util.slconfig import SLConfig

        config = SLConfig.fromfile(_config_file(architecture))
        config.device = "cpu"
        config.use_checkpoint = config.use_transformer_ckpt = False  # recomputation serves only training
        self.tokenizer, language_model = _bert(Path(bert))
        with _mended(self.tokenizer, language_model):
            model = build_model(config)
        state = {k: v for k, v in checkpoint(path, "grounding").items() if k not in _UNUSED}
        self.model = filled(model, state, path, "grounding")
        self.model.tokenizer = self._tokens
        for layer in self.model.transformer.encoder.text_layers:
            layer.register_forward_pre_hook(_own_masks, with_kwargs=True)
        self.limit = int(self.model.max_text_len)

    def _tokens(self, ids: list[list[int]], **_: Any) -> Any:
        """What the model calls on its `captions`: they are token ids already."""
        from transformers import BatchEncoding

        return BatchEncoding(padded(ids, self.tokenizer.pad_token_id))

    def __call__(self, images_BCHW: Any, ids: list[list[int]]) -> tuple[Any, Any]:
        """As `Transformers.__call__`."""
        out = self.model(images_BCHW, captions=ids)
        return out["pred_logits"], out["pred_boxes"]


def _own_masks(layer: Any, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Before a text layer: a mask per picture and head, in the order that torch's attention wants.

    The package repeats them head by head, so that in a batch pictures see each other's masks: prompts that
    differ would change each other's boxes.
    """
    return args, {**inputs, "src_mask": inputs["src_mask"].repeat_interleave(layer.nhead, dim=0)}


def _config_file(architecture: str) -> str:
    import groundingdino.config

    packaged = PACKAGED.get(architecture)
    return str(Path(next(iter(groundingdino.config.__path__))) / packaged) if packaged else architecture


def _bert(path: Path) -> tuple[Any, Any]:
    """BERT's tokenizer, and a BERT (its weights still random) that takes a mask per pair of tokens."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer

    class Bert(BertModel):
        def forward(self, attention_mask: Any = None, **inputs: Any) -> Any:
            seen_B1LL = attention_mask[:, None].bool()
            dtype = self.embeddings.word_embeddings.weight.dtype
            if torch.is_autocast_enabled(seen_B1LL.device.type):
                dtype = torch.get_autocast_dtype(seen_B1LL.device.type)
            additive = torch.zeros_like(seen_B1LL, dtype=dtype).masked_fill(~seen_B1LL, torch.finfo(dtype).min)
            return super().forward(attention_mask=additive, **inputs)

    if path.is_file():
        return BertTokenizer(vocab=str(path), do_lower_case=True), Bert(BertConfig())
    config = component(BertConfig, str(path), "grounding")
    return component(AutoTokenizer, str(path), "grounding"), Bert(config)


@contextlib.contextmanager
def _mended(tokenizer: Any, language_model: Any) -> Iterator[None]:
    """While it holds, the package builds with these, and without its own wrapper of BERT."""
    from groundingdino.models.GroundingDINO import groundingdino as package

    with (
        mock.patch.object(package.get_tokenlizer, "get_tokenlizer", return_value=tokenizer),
        mock.patch.object(package.get_tokenlizer, "get_pretrained_language_model", return_value=language_model),
        mock.patch.object(package, "BertModelWarper", lambda bert_model: bert_model),
    ):
        yield
