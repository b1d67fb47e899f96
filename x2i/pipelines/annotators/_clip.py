"""What `clip` and `clip_text` share: open_clip models by tag, hub id, folder or file, and both of their towers."""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from x2i.base.errors import X2IError
from x2i.base.packages import need
from x2i.base.weights import Weights
from x2i.pipelines.annotators._heads import spread, unit
from x2i.pipelines.annotators._torch import ModelConfig, Runtime
from x2i.pipelines.annotators._weights import weights_of

#: The file that makes a folder (or a hub repository) open_clip's.
CONFIG = "open_clip_config.json"

#: What open_clip 3.3.0 says of its tag openai for ViT-L-14, so that the default needs no import of it. Its
#: parameters in fp32; the repository keeps them in more than one format.
DEFAULT = Weights("timm/vit_large_patch14_clip_224.openai", size=427_616_513 * 4, licence="MIT")


class ClipConfig(ModelConfig):
    """Which CLIP."""

    model: str = Field(
        "ViT-L-14",
        description="open_clip's name of the architecture, e.g. ViT-B-32 (open_clip.list_models()); a folder or a hub "
        f"repository that has an {CONFIG} brings its own",
    )
    weights: str = Field(
        "openai",
        description="open_clip's tag, e.g. laion2b_s32b_b82k (open_clip.list_pretrained()), a hub id, e.g. "
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K, a folder in open_clip's hub format, or a checkpoint file",
    )
    tag: str | None = Field(
        None,
        description="for a checkpoint file, which says neither its activation nor its mean and standard deviation: the "
        "tag that it is of, e.g. openai; custom: as `model` says, with OpenAI's mean and standard deviation",
    )


@dataclass(frozen=True)
class Shape:
    """What is known of a CLIP before it is loaded: the embedding's width, and the side of its pictures in pixels."""

    width: int
    side: int


def published(model: str, tag: str) -> dict[str, Any]:
    """open_clip's entry for a model's tag (hf_hub, mean, std, quick_gelu, …). Imports open_clip.

    Raises:
        X2IError: there is none; says which there are.
    """
    table = need("open_clip.pretrained", "open-clip-torch", "clip")
    entry: dict[str, Any] = table.get_pretrained_cfg(model, tag)
    if not entry:
        tags = ", ".join(table.list_pretrained_tags_by_model(model)) or "none"
        raise X2IError(
            f"annotator clip: weights: {tag} is no file or folder, and no tag of {model}; its tags are: {tags}"
        )
    return entry


def listed(spec: str) -> dict[str, Any]:
    """open_clip's entry for a hub repository, whatever the tag; empty where it has none. Imports open_clip."""
    table = need("open_clip.pretrained", "open-clip-torch", "clip")
    repository = spec.partition(":")[0].partition("@")[0]
    for model, tag in table.list_pretrained():
        entry: dict[str, Any] = table.get_pretrained_cfg(model, tag)
        if entry.get("hf_hub", "").rpartition("/")[0] == repository:
            return entry
    return {}


def named(config: ClipConfig) -> Weights:
    """The weights that a configuration names, a tag looked up."""
    spec = config.weights
    if not _is_tag(spec):
        pass
    elif (config.model, spec) == ("ViT-L-14", "openai"):
        spec = DEFAULT.spec
    else:
        repository, _, file = published(config.model, spec).get("hf_hub", "").rpartition("/")
        if not repository:
            raise X2IError(
                f"annotator clip: open_clip has {config.model} with tag {spec} on no hub: get the file, and name it"
            )
        spec = f"{repository}:{file}" if file else repository
    return weights_of(spec, config.sha256, (DEFAULT,))


def shape_of(config: ClipConfig) -> Shape:
    """From a folder's own configuration if it is here, or from the one that open_clip carries. Loads no model.

    Raises:
        X2IError: open_clip has no such model, or is not installed.
    """
    folder = None if _is_tag(config.weights) else Weights(config.weights).local()
    if folder is not None and (folder / CONFIG).is_file():
        return _shape(json.loads((folder / CONFIG).read_text())["model_cfg"])
    spec = importlib.util.find_spec("open_clip")  # finds, and does not import: that takes seconds
    if spec is None or not spec.submodule_search_locations:
        need("open_clip", "open-clip-torch", "clip")
        raise AssertionError("open_clip is a package")
    known = {p.stem: p for p in (Path(spec.submodule_search_locations[0]) / "model_configs").glob("*.json")}
    if config.model not in known:
        close = ", ".join(difflib.get_close_matches(config.model, known, 3, 0)) or "see open_clip.list_models()"
        raise X2IError(f"annotator clip: model: open_clip has no {config.model}; there are, e.g.: {close}")
    return _shape(json.loads(known[config.model].read_text()))


def _shape(architecture: dict[str, Any]) -> Shape:
    side = architecture["vision_cfg"].get("image_size", 224)
    return Shape(int(architecture["embed_dim"]), int(max(side) if isinstance(side, list) else side))


def _is_tag(spec: str) -> bool:
    return "/" not in spec and ":" not in spec and not Path(spec).expanduser().exists()


class Clip:
    """A loaded CLIP: pictures and texts to embeddings float32 [n, width] of length 1.

    Args:
        config: which, and where it runs. shape: what was promised of it before it was loaded.

    Raises:
        X2IError: the weights cannot be had, do not fit the architecture, or are of another width.
    """

    def __init__(self, config: ClipConfig, shape: Shape) -> None:
        self._library = need("open_clip", "open-clip-torch", "clip")
        path = named(config).fetch()
        self._runtime = Runtime(config)
        try:
            model, source = self._load(config, path)
            self._tokenizer = self._library.get_tokenizer(source)
        except X2IError:
            raise
        except Exception as error:  # noqa: BLE001 - a wrong checkpoint raises anything
            raise X2IError(
                f"annotator clip: {path} cannot be loaded ({type(error).__name__}: {str(error)[:600]})"
            ) from None
        preparation = self._library.transform.PreprocessCfg(**model.visual.preprocess_cfg)
        self._transform = self._library.transform.image_transform_v2(preparation, is_train=False)
        self._size = tuple(preparation.input_size[1:])
        self._bicubic, self._mode = preparation.interpolation != "bilinear", preparation.resize_mode
        self._model = self._runtime.place(model)
        self._width = shape.width
        found = self.texts(["a"]).shape[1]
        if found != shape.width:
            raise X2IError(
                f"annotator clip: {config.weights} gives embeddings of width {found}, model: {config.model} of {shape.width}; "
                "set `model` to the architecture of these weights"
            )

    def _load(self, config: ClipConfig, path: Path) -> tuple[Any, str]:
        """The model, and open_clip's name of where its tokenizer is described."""
        if path.is_dir():
            source = f"local-dir:{path}"
            quick = bool(listed(named(config).spec).get("quick_gelu"))  # should a repository leave it unsaid
            return self._create(source, force_quick_gelu=quick), source
        tag = config.weights if _is_tag(config.weights) else config.tag
        if tag is None:
            raise X2IError(
                f"annotator clip: {path.name} is a checkpoint file, which does not say how it was trained: set `tag` to the tag "
                f"of {config.model} that it is of (e.g. openai), or to custom"
            )
        entry = published(config.model, tag) if tag != "custom" else {}
        preparation = {k: entry[k] for k in ("mean", "std", "interpolation", "resize_mode") if k in entry}
        return self._create(
            config.model,
            pretrained=str(path),
            force_quick_gelu=bool(entry.get("quick_gelu")),
            force_preprocess_cfg=preparation,
        ), config.model

    def _create(self, name: str, **arguments: Any) -> Any:
        return self._library.create_model(
            name, precision="fp32", device="cpu", pretrained_text=False, require_pretrained=True, **arguments
        )

    def text_only(self) -> None:
        """Let go of the image tower."""
        self._model.visual = None

    def images(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Embeddings of pictures, uint8 [height, width, 3] each."""
        import torch

        if not pictures:
            return np.zeros((0, self._width), np.float32)
        batch_NCHW = torch.stack([self.prepare(p) for p in pictures]).to(self._runtime.device)
        with self._runtime.running():
            return unit(self._runtime.numpy(self._model.encode_image(batch_NCHW, normalize=True)))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of texts; what is longer than the model's context (77 tokens) is cut."""
        tokens_NL = self._tokenizer(list(texts)).to(self._runtime.device)
        with self._runtime.running():
            return unit(self._runtime.numpy(self._model.encode_text(tokens_NL, normalize=True)))

    def similarity(self, images: np.ndarray, there: np.ndarray, texts: Sequence[str | None]) -> pa.Array:
        """Cosine of each row's image with its text, float32; null where a row has no image, or a text says nothing.

        Args:
            images: embeddings of the rows that have one [<= rows, width]. there: bool [rows], says which they are.
        """
        both = [i for i, text in enumerate(texts) if there[i] and text and text.strip()]
        scored = np.zeros(len(texts), bool)
        scored[both] = True
        if not both:
            return spread(np.zeros(0, np.float32), scored)
        images = images[(np.cumsum(there) - 1)[both]].astype(np.float32)
        return spread(np.einsum("nd,nd->n", unit(images), self.texts([str(texts[i]) for i in both])), scored)

    def prepare(self, pixels: np.ndarray) -> Any:
        """open_clip's own transform, float32 [3, size, size].

        It resizes a whole picture before it crops its centre: one of 1x5000 pixels would become a gigabyte. Where
        one side is over 100 times the other, only what the crop keeps is resized, to the same but for rounding.
        """
        from PIL import Image

        height, width = pixels.shape[:2]
        short, long = sorted((height, width))
        picture = Image.fromarray(pixels)
        if long > 100 * short and self._mode == "shortest" and self._size[0] == self._size[1]:
            size = self._size[0]
            resized = int(size * long / short)  # torchvision's rounding, of the size and of the crop
            start = round((resized - size) / 2)
            kept = (start * long / resized, (start + size) * long / resized)
            box = (kept[0], 0, kept[1], height) if width > height else (0, kept[0], width, kept[1])
            kernel = Image.Resampling.BICUBIC if self._bicubic else Image.Resampling.BILINEAR
            picture = picture.resize((size, size), kernel, box=box)
        elif self._mode == "longest" and long > max(self._size) * short:  # its short side would round to nothing
            times = -(-long // (max(self._size) * short))
            picture = Image.fromarray(pixels.repeat(times, axis=0 if height < width else 1))
        return self._transform(picture)
