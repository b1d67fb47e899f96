"""Pictures by a pipeline of diffusers from a folder, every weight of it loaded, every number seeded."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from x2i.base.errors import X2IError
from x2i.base.packages import need
from x2i.pipelines.annotators._torch import Runtime, pretrained
from x2i.pipelines.images import resize

#: Sides are multiples of this many pixels: every known pipeline's patches fit (8 for SD, 16 for SD 3 and Flux).
_MULTIPLE = 16


class Inpainting:
    """What a class of diffusers, `auto`, makes of a folder, on the device and in the precision of a `Runtime`.

    Raises:
        X2IError: diffusers is missing, or the folder holds no whole pipeline of this kind.
    """

    auto: ClassVar = "AutoPipelineForInpainting"
    what: ClassVar = "pipeline that inpaints"  # for people

    def __init__(self, path: str, runtime: Runtime, annotator: str) -> None:
        diffusers = need("diffusers", "diffusers", annotator)
        said = need("diffusers.utils.logging", "diffusers", annotator)
        said.disable_progress_bar()
        said.set_verbosity_error()
        try:
            models = _models(Path(path), annotator)
            self.pipeline: Any = getattr(diffusers, self.auto).from_pretrained(path, local_files_only=True, **models)
        except X2IError:
            raise
        except Exception as error:  # noqa: BLE001 - diffusers raises anything for files that it does not understand
            why = f"{type(error).__name__}: {str(error)[:400]}"
            raise X2IError(f"annotator {annotator}: {path} holds no {self.what} of diffusers ({why})") from None
        self.pipeline.set_progress_bar_config(disable=True)
        self._runtime = runtime
        for part in self.pipeline.components.values():
            if hasattr(part, "parameters"):
                runtime.place(part)
        self._takes = set(inspect.signature(self.pipeline.__call__).parameters)

    def __call__(
        self,
        picture: np.ndarray,
        hole: np.ndarray,
        prompt: str,
        avoid: str,
        *,
        longest: int,
        steps: int,
        guidance: float,
        strength: float,
        seed: int,
    ) -> np.ndarray | None:
        """A picture whose hole is filled.

        Args:
            picture: uint8 [height, width, 3]. hole: bool [height, width]; of no account to pipelines that take none.
            avoid: a negative prompt, for pipelines that take one.
            longest: longer side, in pixels, at which the model works.

        Returns:
            uint8 [height, width, 3], changed outside the hole too (the model's own coding); None where the
            pipeline's safety checker refuses it.
        """
        import torch
        from PIL import Image

        height, width = picture.shape[:2]
        scale = longest / max(width, height)
        w, h = (max(_MULTIPLE, round(n * scale / _MULTIPLE) * _MULTIPLE) for n in (width, height))
        white = resize(np.where(hole, 255, 0).astype(np.uint8), w, h)
        given: dict[str, Any] = {
            "prompt": prompt,
            "negative_prompt": avoid or None,
            "image": Image.fromarray(resize(picture, w, h)),
            "mask_image": Image.fromarray(np.where(white > 0, 255, 0).astype(np.uint8)),
            "width": w,
            "height": h,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "strength": strength,
            "generator": torch.Generator("cpu").manual_seed(seed),
            "output_type": "np",
        }
        with self._runtime.running():
            made = self.pipeline(**{name: value for name, value in given.items() if name in self._takes})
        if any(getattr(made, "nsfw_content_detected", None) or ()):
            return None
        filled = np.rint(np.asarray(made.images[0], np.float32).clip(0, 1) * 255).astype(np.uint8)
        return resize(filled, width, height)


class Redrawing(Inpainting):
    """The same from image to image: the whole picture is painted anew."""

    auto = "AutoPipelineForImage2Image"
    what = "pipeline from image to image"


def _models(path: Path, annotator: str) -> dict[str, Any]:
    """The pipeline's networks, each with every one of its weights: diffusers itself would make what is missing."""
    import torch

    index = path / "model_index.json"
    if not index.is_file():
        raise X2IError(f"annotator {annotator}: {path} has no model_index.json, which a pipeline of diffusers has")
    out: dict[str, Any] = {}
    for name, said in json.loads(index.read_text()).items():
        if not isinstance(said, list) or len(said) != 2 or said[0] not in ("diffusers", "transformers"):
            continue
        kind = getattr(need(said[0], said[0], annotator), said[1], None)
        if not isinstance(kind, type) or not issubclass(kind, torch.nn.Module):
            continue
        if said[0] == "transformers":
            out[name] = pretrained(kind, str(path / name), annotator)
            continue
        loader: Any = kind
        model, found = loader.from_pretrained(
            path / name, local_files_only=True, output_loading_info=True, torch_dtype=torch.float32
        )
        lacking = sorted(found["missing_keys"])
        if lacking:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise X2IError(f"annotator {annotator}: {path / name} is no whole {said[1]}: it lacks {lacking[0]}{more}")
        out[name] = model
    return out
