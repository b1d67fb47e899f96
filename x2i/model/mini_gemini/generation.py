"""Pictures from Mini-Gemini: its answer holds a prompt between <h> and </h>, and SDXL draws it.

The question ends with ` <GEN>`. Source: dvlab-research/MGM, mgm/serve/cli.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from x2i.base.errors import X2IError
from x2i.base.weights import Weights

#: What the user's turn ends with where a picture is wanted.
ASK = " <GEN>"
#: The pipeline that MGM draws with.
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
#: What SDXL is told to avoid.
NEGATIVE = (
    "out of frame, lowres, text, error, cropped, worst quality, low quality, jpeg artifacts, ugly, duplicate, morbid, "
    "mutilated, out of frame, extra fingers, mutated hands, poorly drawn hands, poorly drawn face, mutation, deformed, "
    "blurry, dehydrated, bad anatomy, bad proportions, extra limbs, cloned face, disfigured, gross proportions, "
    "malformed limbs, missing arms, missing legs, extra arms, extra legs, fused fingers, too many fingers, long neck, "
    "username, watermark, signature"
)

_CLASSES: dict[str, Any] = {
    "text_encoder": transformers.CLIPTextModel,
    "text_encoder_2": transformers.CLIPTextModelWithProjection,
    "unet": diffusers.UNet2DConditionModel,
    "vae": diffusers.AutoencoderKL,
}
_PROMPT = re.compile(r"<h>((?:(?!<h>).)*?)</h>", re.DOTALL)


def asked(text: str) -> str:
    """A user's message, to be answered with a picture's prompt."""
    return text if text.endswith(ASK) else text.rstrip() + ASK


def split_prompt(reply: str) -> str | None:
    """The prompt within an answer: the last that stands between <h> and </h>; None if there is none."""
    found = [prompt.strip() for prompt in _PROMPT.findall(reply)]
    return found[-1] or None if found else None


class Painter:
    """SDXL, loaded once.

    Args:
        weights: hub id, or folder that `save_pretrained` wrote.
        device: where to draw.
        dtype: of its networks; default: float16 on a GPU (as MGM), float32 elsewhere.

    Raises:
        X2IError: the weights cannot be had, are no pipeline of SDXL, or lack some of its tensors.
    """

    def __init__(
        self, weights: str = SDXL, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        folder = Weights(weights).fetch()
        dtype = dtype or (torch.float16 if torch.device(device).type == "cuda" else torch.float32)
        try:
            networks = _networks(folder, weights, dtype)
            pipeline: Any = diffusers.StableDiffusionXLPipeline.from_pretrained(
                folder, local_files_only=True, **networks
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise X2IError(f"weights {weights}: {folder} cannot be read as a pipeline of SDXL ({error})") from None
        self.pipeline = pipeline.to(device)
        self.pipeline.set_progress_bar_config(disable=True)

    def __call__(
        self,
        reply: str,
        *,
        negative: str | None = NEGATIVE,
        steps: int = 50,
        guidance: float = 5.0,
        height: int | None = None,
        width: int | None = None,
        seed: int | None = None,
    ) -> np.ndarray:
        """Draw what an answer describes.

        Args:
            reply: an answer with a prompt between <h> and </h>.
            negative: what to avoid. steps, guidance: of the pipeline; the defaults are diffusers', which MGM takes.
            height, width: in pixels; default: the pipeline's own size.
            seed: of the noise, which is drawn on the CPU; None: another picture each time.

        Returns:
            uint8 [height, width, 3].

        Raises:
            X2IError: the answer has no prompt, or a size is no multiple of 8.
        """
        prompt = split_prompt(reply)
        if prompt is None:
            raise X2IError(
                f"the answer has no prompt between <h> and </h>: {reply[:200]!r}. End the question with{ASK}"
            )
        if any(n is not None and (n < 8 or n % 8) for n in (height, width)):
            raise X2IError(f"size {height} x {width}: each side must be a multiple of 8")
        made = self.pipeline(
            prompt=prompt,
            negative_prompt=negative,
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=height,
            width=width,
            generator=None if seed is None else torch.Generator("cpu").manual_seed(seed),
            output_type="np",
        ).images[0]
        return np.rint(np.asarray(made, np.float32).clip(0, 1) * 255).astype(np.uint8)


def draw(reply: str, weights: str = SDXL, device: torch.device | str = "cpu", **options: Any) -> np.ndarray:
    """One picture of an answer: `Painter(weights, device)(reply, **options)`. For many, keep a `Painter`."""
    if split_prompt(reply) is None:  # before anything is fetched
        raise X2IError(f"the answer has no prompt between <h> and </h>: {reply[:200]!r}. End the question with{ASK}")
    return Painter(weights, device)(reply, **options)


def _networks(folder: Path, weights: str, dtype: torch.dtype) -> dict[str, Any]:
    """The pipeline's networks, each with all of its weights: diffusers itself would draw at random what is missing."""
    index = folder / "model_index.json"
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
        kind = parts.get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise X2IError(f"weights {weights}: {index} cannot be read ({error}): not a pipeline of diffusers") from None
    if kind != "StableDiffusionXLPipeline":
        raise X2IError(f"weights {weights}: {folder} holds a {kind}, not a StableDiffusionXLPipeline")
    out: dict[str, Any] = {}
    for part, place in _CLASSES.items():
        network, found = place.from_pretrained(
            folder / part, local_files_only=True, output_loading_info=True, dtype=dtype, **_variant(folder / part)
        )
        if lacking := sorted(found["missing_keys"]):
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise X2IError(f"weights {weights}: {folder / part} lacks {lacking[0]}{more}")
        out[part] = network
    return out


def _variant(folder: Path) -> dict[str, str]:
    """The half-precision files, where only these are there."""
    files = [p.name for p in folder.glob("*.safetensors")]
    return {"variant": "fp16"} if files and all(".fp16." in name for name in files) else {}
