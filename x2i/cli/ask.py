"""`x2i ask`: a checkpoint, a question and pictures into an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from x2i.cli.console import console, print_json


def ask(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint (step-NNNNNN), or a run's output: then its newest.", show_default=False)
    ],
    question: Annotated[str, typer.Argument(help="What to ask.", show_default=False)],
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture that is asked about; give it again for more, in their order.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    system: Annotated[str | None, typer.Option(help="What stands in front of the conversation.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda …")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Ask a trained model about pictures.

    Pictures stand in front of the question; <image> in it puts them elsewhere. The answer is the likeliest one, token
    by token: the same question has the same answer.

    Example: x2i ask runs/unified/train "What is this?" --image photo.jpg
    """
    import torch

    from x2i.base.errors import RecipeError
    from x2i.cli.pictures import open_image
    from x2i.model.base import Chat, Message
    from x2i.model.pixels import shrink
    from x2i.trainer.checkpoint import find, load_model

    pictures = [open_image(path) for path in image or []]
    marks = question.count("<image>")
    if marks not in (0, len(pictures)):
        raise RecipeError(f"the question has {marks} <image>, but {len(pictures)} pictures are given")
    text = question if marks else "<image>" * len(pictures) + ("\n" if pictures else "") + question
    found = find(checkpoint)
    loaded = load_model(found.path, device)
    side = loaded.described.chat_resolution or loaded.described.resolution
    shown = tuple(shrink(picture, side) for picture in pictures)
    turns = (*((Message("system", system),) if system else ()), Message("user", text))
    inputs = loaded.processor.chats([Chat(turns, shown)], labels=False)
    with torch.no_grad():
        ids = loaded.model.answer(inputs.to(device), max_tokens, loaded.processor.stop)[0]
    answer = loaded.processor.text(ids)
    if as_json:
        print_json({"answer": answer, "tokens": len(ids), "checkpoint": str(found.path)})
    else:
        console.print(answer or "(nothing)", markup=False, highlight=False)
