"""`x2i ask`: a checkpoint, a question and pictures into an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from x2i.base.errors import RecipeError, X2IError
from x2i.base.files import atomic
from x2i.cli.console import console, print_json
from x2i.cli.pictures import image_format, open_image


def ask(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A checkpoint (step-NNNNNN), a run's output (its newest), a published or transformers folder, or a hub "
            "id.",
            show_default=False,
        ),
    ],
    question: Annotated[str, typer.Argument(help="What to ask.", show_default=False)],
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture that is asked about; give it again for more, in their order.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    system: Annotated[str | None, typer.Option(help="What stands in front of the conversation.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The picture to write, of the answer's prompt (Mini-Gemini); the question asks for one."),
    ] = None,
    draw: Annotated[
        str | None,
        typer.Option(
            help="With --out, the SDXL that draws it: a hub id or a folder. Default: "
            "stabilityai/stable-diffusion-xl-base-1.0."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="With --out, steps from noise to picture.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="With --out, another seed, another picture.")] = 0,
    device: Annotated[
        str, typer.Option(help="cpu, cuda …; published models are in bfloat16 there, and in float32 on a CPU.")
    ] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Ask a trained model about pictures.

    Pictures stand in front of the question; <image> in it puts them elsewhere. The answer is the likeliest one, token
    by token: the same question has the same answer.

    Example: x2i ask runs/unified/train "What is this?" --image photo.jpg

    Example: x2i ask AIDC-AI/Ovis2-1B "How many boats are there?" --image lake.jpg --device cuda

    Example: x2i ask checkpoints/mgm-2b "Draw a red boat" --device cuda --out boat.png
    """
    import numpy as np
    import torch

    from x2i.cli import opening
    from x2i.model.base import Chat, Message
    from x2i.model.pixels import shrink

    pictures = [open_image(path) for path in image or []]
    marks = question.count("<image>")
    if marks not in (0, len(pictures)):
        raise RecipeError(f"the question has {marks} <image>, but {len(pictures)} pictures are given")
    if draw is not None and out is None:
        raise RecipeError("--draw needs --out: the picture to write")
    kind = image_format(out) if out is not None else None
    text = question if marks else "<image>" * len(pictures) + ("\n" if pictures else "") + question
    source = opening.find(checkpoint)
    generation = _generation(source.architecture) if out is not None else None
    ready = opening.ready(source, device)
    model, processor = ready.opened.model, ready.processor
    if not model.answers:
        raise X2IError(f"{source.place}: a model of {source.architecture} that writes no text; draw with `x2i sample`")
    shown = tuple(np.asarray(p) if ready.side is None else shrink(p, ready.side) for p in pictures)
    asked = text if generation is None else generation.asked(text)
    turns = (*((Message("system", system),) if system else ()), Message("user", asked))
    inputs = processor.chats([Chat(turns, shown)], labels=False)
    with torch.no_grad():
        ids = model.to(device).answer(inputs.to(device), max_tokens, processor.stop)[0]
    answer = processor.text(ids)
    told = {"answer": answer, "tokens": len(ids), "checkpoint": source.place}
    if not as_json:
        console.print(answer or "(nothing)", markup=False, highlight=False)
    if generation is not None and out is not None:
        _draw(generation, answer, draw or generation.SDXL, device, (out, kind), steps=steps, seed=seed)
        told["out"] = str(out)
    if as_json:
        print_json(told)


def _generation(architecture: str) -> Any:
    """The module that draws an architecture's answers. Raises X2IError if it has none."""
    from x2i.model import registry

    found = registry.module(architecture, "generation")
    if found is None:
        able = [a for a in registry.architectures() if registry.module(a, "generation")]
        raise X2IError(f"--out: answers of {architecture} are not drawn, only those of {', '.join(able)}")
    return found


def _draw(generation: Any, answer: str, weights: str, device: str, out: tuple[Path, Any], **options: Any) -> None:
    from PIL import Image

    made = generation.draw(answer, weights, device, **options)
    path, kind = out
    with atomic(path) as temporary:
        Image.fromarray(made).save(temporary, kind)
