"""Pictures that a command is given: opened as a build opens them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from x2i.base.errors import RecipeError

if TYPE_CHECKING:
    from PIL import Image


def open_image(path: Path, option: str = "--image") -> Image.Image:
    """Open a picture as a build would: upright, in sRGB, transparency on white. Raises RecipeError that names both."""
    from PIL import Image

    from x2i.pipelines.images import BadImage, decode, read_header

    try:
        data = path.read_bytes()
        return Image.fromarray(decode(data, read_header(data)))
    except (OSError, BadImage) as error:
        raise RecipeError(f"{option} {path}: cannot be opened as an image ({error})") from None


def image_format(path: Path, option: str = "--out") -> str:
    """Pillow's name of the format that a picture's extension stands for. Raises RecipeError."""
    from PIL import Image

    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise RecipeError(f"{option} {path}: no image format is known by the extension {path.suffix!r}; try .png")
    return kind
