"""`x2i sample`: a checkpoint and words (and images) into a picture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from x2i.base.errors import RecipeError
from x2i.base.files import atomic
from x2i.cli.console import console, print_json

if TYPE_CHECKING:
    from PIL import Image


def sample(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint (step-NNNNNN), or a run's output: then its newest.", show_default=False)
    ],
    prompt: Annotated[str, typer.Argument(help="The instruction.", show_default=False)],
    image: Annotated[
        list[Path] | None,
        typer.Option(help="An input image; give it again for more, in the order of the placeholders."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("picture.png"),
    size: Annotated[
        str | None, typer.Option(help="Pixels: 512, or 640x384 (width x height). Default: that of the last stage.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps from noise to picture.")] = 50,
    guidance: Annotated[float, typer.Option(help="Weight of the words; 1 is no guidance.")] = 1.0,
    image_guidance: Annotated[float, typer.Option(help="Weight of the input images; 1 is no guidance.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another picture.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda …")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Draw a picture with a trained model.

    Input images are written <img><|image_1|></img> … in the prompt; a prompt that names none gets them in front.

    Example: x2i sample runs/quickstart/train "Remove the blur" --image photo.jpg --out sharp.png
    """
    from x2i.trainer.checkpoint import find, load_painter

    pictures = [_open(path) for path in image or []]
    found = find(checkpoint)
    painter, described = load_painter(found.path, device)
    width, height = _size(size) if size else (described.resolution, described.resolution)
    drawn = painter.generate(
        prompt,
        pictures,
        height=height,
        width=width,
        seed=seed,
        steps=steps,
        guidance=guidance,
        image_guidance=image_guidance,
    )
    with atomic(out) as temporary:
        drawn.save(temporary, _format(out))
    if as_json:
        print_json({"out": str(out), "checkpoint": str(found.path), "width": width, "height": height, "seed": seed})
    else:
        console.print(f"{out}: {width} x {height}, from {found.path}", highlight=False, markup=False)


def _open(path: Path) -> Image.Image:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except OSError as error:
        raise RecipeError(f"--image {path}: cannot be opened as an image ({error})") from None


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not found:
        raise RecipeError(f"--size {text}: expected a number of pixels, as 512, or width x height, as 640x384")
    return int(found[1]), int(found[2] or found[1])


def _format(path: Path) -> str:
    from PIL import Image

    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise RecipeError(f"--out {path}: no image format is known by the extension {path.suffix!r}; try .png")
    return kind
