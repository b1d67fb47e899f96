"""SAM and SAM 2 by two libraries, behind one face: pictures are embedded in a batch, boxes decoded a picture at a time.

Kirillov et al. 2023, "Segment Anything", https://arxiv.org/abs/2304.02643 (segment-anything 1.0, Apache-2.0);
Ravi et al. 2024, "SAM 2: Segment Anything in Images and Videos", https://arxiv.org/abs/2408.00714.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from x2i.base.errors import X2IError
from x2i.base.packages import need
from x2i.pipelines.annotators._pictures import bilinear, normalised
from x2i.pipelines.annotators._torch import checkpoint, described, filled, pretrained


def inner(height: int, width: int, side: int, square: bool) -> tuple[int, int]:
    """The size at which a picture is seen: SAM 2 squeezes it into the square, SAM fits its longer side."""
    if square:
        return side, side
    scale = side / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def prepare(pixels: np.ndarray, side: int, square: bool) -> np.ndarray:
    """uint8 [height, width, 3] to float32 [3, side, side]: bilinear, normalised as ImageNet, zeros below and right."""
    height, width = inner(pixels.shape[0], pixels.shape[1], side, square)
    out = np.zeros((3, side, side), np.float32)
    out[:, :height, :width] = normalised(bilinear(pixels, width, height))
    return out


class Transformers:
    """transformers' SamModel or Sam2Model, from a folder in the hub's format."""

    def __init__(self, folder: str) -> None:
        library = need("transformers", "transformers", "masks")
        self.square = described(folder, "masks", ("sam", "sam2", "sam2_video")).model_type != "sam"
        self.model = pretrained(library.Sam2Model if self.square else library.SamModel, folder, "masks")
        side = self.model.config.prompt_encoder_config.image_size
        self.side = int(side if isinstance(side, int) else side[0])

    def embed(self, images_BCHW: Any) -> list[Any]:
        """What `decode` wants, per picture."""
        found = self.model.get_image_embeddings(images_BCHW)
        levels = found if isinstance(found, list) else [found]
        each = [[level[i : i + 1] for level in levels] for i in range(len(images_BCHW))]
        return each if self.square else [e[0] for e in each]

    def decode(self, embedding: Any, boxes_N4: Any, multimask: bool) -> tuple[Any, Any]:
        """Mask logits [N, masks, h, w] and predicted IoU [N, masks] for boxes in pixels of the model's view."""
        out = self.model(image_embeddings=embedding, input_boxes=boxes_N4[None], multimask_output=multimask)
        return out.pred_masks[0], out.iou_scores[0]


class Published:
    """The authors' SAM. Its sizes (vit_b, vit_l, vit_h or any other) are read from the checkpoint.

    Raises:
        X2IError: the package is missing, or the file is no checkpoint of SAM.
    """

    square = False

    def __init__(self, path: str) -> None:
        need("segment_anything", "segment-anything", "masks")
        state = checkpoint(path, "masks")
        try:
            model = build(state)
        except (KeyError, RuntimeError, StopIteration, ValueError, ZeroDivisionError, IndexError) as error:
            why = f"{type(error).__name__}: {error}"
            raise X2IError(f"annotator masks: {path} does not hold Sam: {why}") from None
        self.model = filled(model, state, path, "masks")
        # mask proposals and their quality as float32: the package's generator makes numpy of them, which has no bf16
        self.model.mask_decoder.register_forward_hook(lambda *given: tuple(t.float() for t in given[-1]))
        self.side = int(self.model.image_encoder.img_size)

    def embed(self, images_BCHW: Any) -> list[Any]:
        """What `decode` wants, per picture."""
        return list(self.model.image_encoder(images_BCHW).split(1))

    def decode(self, embedding: Any, boxes_N4: Any, multimask: bool) -> tuple[Any, Any]:
        """As `Transformers.decode`."""
        sparse, dense = self.model.prompt_encoder(points=None, boxes=boxes_N4, masks=None)
        logits, quality = self.model.mask_decoder(
            image_embeddings=embedding,
            image_pe=self.model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )
        return logits, quality


def build(state: dict[str, Any]) -> Any:
    """A Sam without weights, of the sizes that a state dict has."""
    import torch
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    def count(stem: str) -> int:
        return len({k[len(stem) :].split(".")[0] for k in state if k.startswith(stem)})

    patch_size = state["image_encoder.patch_embed.proj.weight"].shape[-1]
    _, grid, _, width = state["image_encoder.pos_embed"].shape
    depth = count("image_encoder.blocks.")
    offsets = [state[f"image_encoder.blocks.{i}.attn.rel_pos_h"].shape for i in range(depth)]
    whole = [i for i, (length, _) in enumerate(offsets) if length == 2 * grid - 1]  # blocks that see the whole picture
    window = next(((length + 1) // 2 for length, _ in offsets if length != 2 * grid - 1), 0)
    hidden = state["image_encoder.blocks.0.mlp.lin1.weight"].shape[0]
    channels = state["image_encoder.neck.0.weight"].shape[0]
    side = grid * patch_size
    return Sam(
        image_encoder=ImageEncoderViT(
            depth=depth,
            embed_dim=width,
            img_size=side,
            mlp_ratio=hidden / width,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            num_heads=width // offsets[0][1],
            patch_size=patch_size,
            qkv_bias="image_encoder.blocks.0.attn.qkv.bias" in state,
            use_rel_pos=True,
            global_attn_indexes=whole,
            window_size=window,
            out_chans=channels,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=channels,
            image_embedding_size=(grid, grid),
            input_image_size=(side, side),
            mask_in_chans=state["prompt_encoder.mask_downscaling.3.weight"].shape[0],
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=state["mask_decoder.mask_tokens.weight"].shape[0] - 1,
            transformer=TwoWayTransformer(
                depth=count("mask_decoder.transformer.layers."),
                embedding_dim=channels,
                mlp_dim=state["mask_decoder.transformer.layers.0.mlp.lin1.weight"].shape[0],
                num_heads=8,
            ),
            transformer_dim=channels,
            iou_head_depth=count("mask_decoder.iou_prediction_head.layers."),
            iou_head_hidden_dim=state["mask_decoder.iou_prediction_head.layers.0.weight"].shape[0],
        ),
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
    )
