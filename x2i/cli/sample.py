"""`x2i sample`: a checkpoint and words (and images) into a picture."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from x2i.base.errors import RecipeError
from x2i.base.files import atomic
from x2i.cli.console import console, print_json
from x2i.cli.pictures import image_format, open_image

if TYPE_CHECKING:
    from PIL import Image

    from x2i.cli.opening import Ready
    from x2i.model.sampling import Painter


def sample(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A checkpoint (step-NNNNNN), a run's output (its newest), a published or diffusers folder, or a hub id.",
            show_default=False,
        ),
    ],
    prompt: Annotated[str, typer.Argument(help="The instruction.", show_default=False)],
    image: Annotated[
        list[Path] | None,
        typer.Option(help="An input image; give it again for more, in the order of the placeholders."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("picture.png"),
    size: Annotated[
        str | None,
        typer.Option(
            help="Pixels: 512, 640x384 (width x height), or input: that of the first input image. Default: that of the "
            "last stage, 1024 for published models."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps from noise to picture.")] = 50,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Weight of the words; 1 is no guidance, and the default for checkpoints of ours. Default for published "
            "weights: OmniGen 2.5, Ovis-U1 5, with input images 6."
        ),
    ] = None,
    image_guidance: Annotated[
        float | None,
        typer.Option(help="Weight of the input images; as --guidance: OmniGen 1.6, Ovis-U1 1.5."),
    ] = None,
    negative: Annotated[
        str | None, typer.Option(help="What the picture is guided away from. Default: the model's own.")
    ] = None,
    shift: Annotated[
        float | None,
        typer.Option(min=0.01, help="Above 1, more steps near the noise. Default: the model's own at this size."),
    ] = None,
    lora: Annotated[
        str | None, typer.Option(help="Low-rank adapters to fold in: a folder in peft's layout, or a hub id.")
    ] = None,
    max_input: Annotated[
        int | None,
        typer.Option(
            min=16,
            help="Keep the input images' aspect, and scale them down to this longer side. Default: 1024 for published "
            "OmniGen; otherwise inputs are cropped to the picture's size, as in training.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another picture.")] = 0,
    separate: Annotated[
        bool, typer.Option("--separate", help="Guide with one pass after another: less memory, more time.")
    ] = False,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Compute the condition anew in every step: the same picture, slower.")
    ] = False,
    offload_cache: Annotated[
        bool, typer.Option("--offload-cache", help="Keep the condition's cache in host memory.")
    ] = False,
    offload_model: Annotated[
        bool, typer.Option("--offload-model", help="Keep the layers in host memory, and bring them one by one.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda …")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Draw a picture with a trained model.

    Input images are written <img><|image_1|></img> … in the prompt; a prompt that names none gets them in front.

    Example: x2i sample runs/quickstart/train "Remove the blur" --image photo.jpg --out sharp.png

    Example: x2i sample Shitao/OmniGen-v1 "A red boat on a lake" --device cuda --guidance 3 --out boat.png

    Example: x2i sample Shitao/OmniGen-v1 "Make the sky darker" --image photo.jpg --size input --device cuda --offload-model
    """
    import torch

    from x2i.cli import opening
    from x2i.model import offload

    pictures = [open_image(path) for path in image or []]
    kind = image_format(out)
    asked = _size(size, pictures) if size else None
    ready = opening.ready(opening.find(checkpoint), device)
    painter, drawing = ready.painter, ready.drawing
    side = ready.opened.described.resolution
    max_input = max_input or drawing.max_input
    own, own_image = drawing.edit if pictures else drawing.words
    width, height = asked or (side, side)
    if size == "input":
        width, height = _of_input(ready, pictures[0], max_input or side)
    if lora:
        _fold_in(painter, lora)
    with ExitStack() as stack:
        painter.vae.to(torch.device(device))
        if offload_model:
            stack.enter_context(offload.streamed(painter.model, device))
        else:
            painter.model.to(device)
        drawn = painter.generate(
            prompt,
            pictures,
            height=height,
            width=width,
            max_input=max_input,
            seed=seed,
            steps=steps,
            guidance=own if guidance is None else guidance,
            image_guidance=own_image if image_guidance is None else image_guidance,
            shift=shift,
            separate=separate,
            cache=not no_cache,
            offload_cache=offload_cache,
            negative=drawing.negative if negative is None else negative,
        )
    with atomic(out) as temporary:
        drawn.save(temporary, kind)
    if as_json:
        print_json({"out": str(out), "checkpoint": ready.source.place, "width": width, "height": height, "seed": seed})
    else:
        console.print(f"{out}: {width} x {height}, from {ready.source.place}", highlight=False, markup=False)


def _fold_in(painter: Painter, place: str) -> None:
    from x2i.base.weights import Weights
    from x2i.model import lora

    folder = Weights(place).fetch()
    inside = [p for p in (folder / "ema_adapter", folder / "adapter") if p.is_dir()]  # of a checkpoint of ours
    lora.load_adapter(painter.model, inside[0] if inside else folder)
    lora.merge(painter.model)


def _of_input(ready: Ready, picture: Image.Image, largest: int) -> tuple[int, int]:
    """Width and height of the picture to draw from this one."""
    from x2i.model.pixels import fit

    if (edit_size := ready.drawing.edit_size) is not None:
        height, width = edit_size(ready.processor, picture.height, picture.width)
    else:
        height, width = fit(picture, largest, ready.processor.token_side).shape[:2]
    return width, height


def _size(text: str, pictures: list[Image.Image]) -> tuple[int, int] | None:
    """Width and height; None for that of the first input image."""
    if text == "input":
        if not pictures:
            raise RecipeError("--size input: there is no input image; give one with --image")
        return None
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not found:
        raise RecipeError(f"--size {text}: expected pixels, as 512, width x height, as 640x384, or input")
    return int(found[1]), int(found[2] or found[1])
