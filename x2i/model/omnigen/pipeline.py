"""OmniGen as one object to draw with: opened from a folder or the hub, called as the published pipeline is.

    pipe = OmniGenPipeline.from_pretrained("Shitao/OmniGen-v1", device="cuda")
    pipe("A red boat on a lake").images[0].save("boat.png")
    pipe.generate("Make the sky darker", ["photo.jpg"], use_input_image_size_as_output=True).save("darker.png")

Where it differs from VectorSpaceLab's OmniGenPipeline: a seed decides each picture of a batch alone; input images are
encoded as the mean of the autoencoder's posterior, which the published code samples; pixels are rounded, not cut, to
whole numbers; guidance is 2.5 by default, as the paper and diffusers have it, not 3; the cache works on a CPU too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from x2i.base.errors import X2IError
from x2i.base.weights import Weights
from x2i.model import lora, offload
from x2i.model.base import Request
from x2i.model.config import ModelFile
from x2i.model.omnigen import layouts, writing
from x2i.model.omnigen.layouts import Layout, Opened
from x2i.model.omnigen.processor import OmniGenProcessor
from x2i.model.pixels import fit, to_images
from x2i.model.placeholders import with_placeholders
from x2i.model.sampling import Options, Painter

Picture = Image.Image | np.ndarray | str | Path
OutputType = Literal["pil", "np", "pt"]


@dataclass(frozen=True)
class Drawn:
    """`images`: a list of pictures; or float32 in [0, 1], as an array [B, H, W, 3] or a tensor [B, 3, H, W]."""

    images: Any


class OmniGenPipeline:
    """A model with its tokenizer and its autoencoder, ready to draw on a device.

    Args:
        opened: of `layouts.open_model`.
        device: where to compute. Weights go there at the first call.
    """

    def __init__(self, opened: Opened, device: torch.device | str = "cpu") -> None:
        if opened.vae is None:
            raise X2IError("a pipeline needs an autoencoder: open the model with one")
        self.model = opened.model
        self.vae = opened.vae
        self.tokenizer = opened.tokenizer
        self.described: ModelFile = opened.described
        self.processor = OmniGenProcessor(
            opened.model.config, opened.tokenizer, opened.vae, opened.described.max_text_tokens
        )
        self.painter = Painter(self.model, self.vae, self.processor)
        self.device = torch.device(device)
        #: What stands in the unconditional branch: the published sentence, or what our own training shows there.
        self.negative: str | None = None if opened.layout is Layout.X2I else OmniGenProcessor.NEGATIVE

    @classmethod
    def from_pretrained(
        cls,
        place: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        vae: str | None = None,
    ) -> OmniGenPipeline:
        """Open a model.

        Args:
            place: a folder or a hub id, in the published layout, diffusers', or a checkpoint of this project.
            torch_dtype: of the model; default: bfloat16 on a GPU, float32 on a CPU. The autoencoder stays as it is.
            device: where to compute; default: the GPU, if there is one.
            vae: an autoencoder in place of the folder's own: a hub id or a folder.

        Raises:
            X2IError: it cannot be had, or is no OmniGen in a known layout.
        """
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch_dtype or (torch.float32 if chosen.type == "cpu" else torch.bfloat16)
        return cls(layouts.open_model(place, vae_weights=vae, dtype=dtype), chosen)

    def __call__(
        self,
        prompt: str | Sequence[str],
        input_images: Sequence[Any] | None = None,
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 50,
        guidance_scale: float = 2.5,
        img_guidance_scale: float = 1.6,
        use_img_guidance: bool = True,
        separate_cfg_infer: bool = True,
        use_kv_cache: bool = True,
        offload_kv_cache: bool = False,
        offload_model: bool = False,
        use_input_image_size_as_output: bool = False,
        max_input_image_size: int = 1024,
        negative_prompt: str | None = None,
        seed: int = 0,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pil",
    ) -> Drawn:
        """Draw one picture for each prompt.

        Args:
            prompt: one or several, with placeholders `<img><|image_1|></img>` … for their images. The published
                weights were trained with up to three.
            input_images: pictures or paths: of one prompt a list, of several a list (or None) for each.
            height, width: multiples of 16 pixels for the published model.
            num_inference_steps: Euler steps.
            guidance_scale: weight of the words.
            img_guidance_scale: weight of the input images.
            use_img_guidance: without, words and images are weighed together by `guidance_scale`.
            separate_cfg_infer: one pass for each kind of branch: less memory, more time.
            use_kv_cache: compute the condition once. The same picture, faster.
            offload_kv_cache: keep that in host memory: less memory, more time.
            offload_model: keep the layers in host memory and bring them one by one: least memory, most time.
            use_input_image_size_as_output: draw in the size of the one input image, after it was fitted.
            max_input_image_size: input images are scaled down to it and cut to whole tokens (`pixels.fit`).
            negative_prompt: instruction of the unconditional branch. Default: the published pipeline's sentence; with a
                checkpoint of this project `<cfg>`, which is what its training shows.
            seed: of the noise; picture i of a batch draws from (seed, i).
            generator: draw the noise of the batch from it instead, as diffusers does.
            latents: start from these instead, [B, C, height / 8, width / 8].
            output_type: pictures, or an array or a tensor in [0, 1].

        Raises:
            X2IError: sizes, images or placeholders that do not fit.
        """
        requests = self._requests(prompt, input_images, max_input_image_size)
        if use_input_image_size_as_output:
            if len(requests) != 1 or len(requests[0].images) != 1:
                raise X2IError("use_input_image_size_as_output: give one prompt with one input image")
            height, width = requests[0].images[0].shape[:2]
        options = Options(
            height,
            width,
            steps=num_inference_steps,
            guidance=guidance_scale,
            image_guidance=img_guidance_scale if use_img_guidance else guidance_scale,
            seed=seed,
            separate=separate_cfg_infer,
            cache=use_kv_cache,
            offload_cache=offload_kv_cache and use_kv_cache,
            negative=self.negative if negative_prompt is None else negative_prompt,
        )
        self.painter.check(options)
        if latents is None and generator is not None:
            shape = (len(requests), *self.painter.latent_shape(options))
            latents = torch.randn(shape, generator=generator, device=generator.device)
        with self._placed(offload_model):
            pixels = self.painter.draw(requests, options, latents)
        return Drawn(_as(pixels, output_type))

    def generate(self, instruction: str, images: Sequence[Picture] = (), **options: Any) -> Image.Image:
        """Draw one picture: an edit, a control map followed, a subject kept, an example imitated, or words alone.

        Args:
            instruction: one that names no image gets the placeholders of all put in front.
            images: pictures or paths.
            options: as of a call.
        """
        picture: Image.Image = self(
            with_placeholders(instruction, len(images)), list(images) or None, **options
        ).images[0]
        return picture

    def to(self, device: torch.device | str) -> OmniGenPipeline:
        """Compute there from now on."""
        self.device = torch.device(device)
        return self

    def load_lora(self, place: str | Path, merge: bool = False) -> OmniGenPipeline:
        """Attach low-rank adapters, from a folder or the hub, in peft's layout; those there already are replaced.

        Args:
            place: adapter_config.json and adapter_model.safetensors.
            merge: fold them into the weights, which makes steps faster and cannot be undone.
        """
        lora.load_adapter(self.model, Weights(str(place)).fetch())
        if merge:
            lora.merge(self.model)
        return self

    def unload_lora(self) -> OmniGenPipeline:
        """Take the adapters away that were attached and not merged."""
        lora.detach(self.model)
        return self

    def save_pretrained(self, folder: str | Path, layout: Layout | str = Layout.PUBLISHED) -> None:
        """Write the model in a layout (`layouts`); adapters must be merged or unloaded first. Raises X2IError."""
        writing.save(
            Opened(self.model, self.tokenizer, self.described, self.vae, Layout.X2I), Path(folder), Layout(layout)
        )

    @contextmanager
    def _placed(self, offload_model: bool) -> Iterator[None]:
        self.vae.to(self.device)
        if offload_model:
            with offload.streamed(self.model, self.device):
                yield
        else:
            self.model.to(self.device)
            yield

    def _requests(self, prompt: str | Sequence[str], images: Sequence[Any] | None, largest: int) -> list[Request]:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        given: list[Any] = (
            [None] * len(prompts) if images is None else [images] if isinstance(prompt, str) else [*images]
        )
        if len(given) != len(prompts):
            raise X2IError(f"{len(prompts)} prompts, but input images for {len(given)}: give a list (or None) for each")
        side = self.painter.token_side
        return [
            Request(text, tuple(fit(_picture(image), largest, side) for image in row or ()))
            for text, row in zip(prompts, given, strict=True)
        ]


def _picture(image: Picture) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    try:
        with Image.open(image) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except OSError as error:
        raise X2IError(f"{image}: cannot be opened as an image ({error})") from None


def _as(pixels: Tensor, kind: OutputType) -> Any:
    if kind == "pil":
        return to_images(pixels)
    if kind not in ("np", "pt"):
        raise X2IError(f"output_type {kind!r}: expected pil, np or pt")
    unit = (pixels.clamp(-1, 1) + 1) / 2
    return unit if kind == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()
