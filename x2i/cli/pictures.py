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
