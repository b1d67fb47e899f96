"""Pictures that a command is given: opened upright, in RGB."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from x2i.base.errors import RecipeError

if TYPE_CHECKING:
    from PIL import Image


def open_image(path: Path, option: str = "--image") -> Image.Image:
    """Open a picture. Raises RecipeError that names the option and the file."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise RecipeError(f"{option} {path}: cannot be opened as an image ({error})") from None


def image_format(path: Path, option: str = "--out") -> str:
    """Pillow's name of the format that a picture's extension stands for. Raises RecipeError."""
    from PIL import Image

    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise RecipeError(f"{option} {path}: no image format is known by the extension {path.suffix!r}; try .png")
    return kind
