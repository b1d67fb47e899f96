"""`x2i convert`: a model in another layout."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from x2i.cli.console import console, print_json


class DType(StrEnum):
    """Of the weights that are written."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def convert(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A checkpoint, a run's output (its newest), a folder in any of the layouts, or a hub id.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not be there yet.", show_default=False)],
    layout: Annotated[
        str,
        typer.Option(
            help="Who is to open it: published, x2i; of an OmniGen also diffusers, transformer, of an Ovis2 transformers.",
            show_default=False,
        ),
    ],
    dtype: Annotated[
        DType | None, typer.Option(help="Of the weights. Default: float32, which is what they are trained in.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Write a model so that others open it, or a published one as a checkpoint of ours.

    [b]published[/b]: for its publishers' code (OmniGen, Ovis-U1, Ovis2, Mini-Gemini). [b]diffusers[/b]: for its
    OmniGenPipeline. [b]transformer[/b]: for its OmniGenTransformer2DModel alone. [b]transformers[/b]: for its
    Ovis2ForConditionalGeneration, whose answers differ: it takes the encoder's features after the last norm.
    [b]x2i[/b]: to use and to train on. Averaged weights are taken where a checkpoint has them, and adapters are folded
    in.

    Example: x2i convert runs/omnigen/train exported --layout diffusers

    Example: x2i convert Shitao/OmniGen-v1 checkpoints/omnigen --layout x2i
    """
    import torch

    from x2i.cli import opening
    from x2i.model import layouts

    source = opening.find(checkpoint)
    layouts.check(source.architecture, layout)
    opened = opening.load(source, with_vae=False)
    if dtype is not None:
        opened.model.to(getattr(torch, dtype.value))
    layouts.save(opened, out, layout)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    count = sum(parameter.numel() for parameter in opened.model.parameters())
    if as_json:
        print_json({"out": str(out), "layout": layout, "parameters": count, "bytes": size})
    else:
        said = f"{out}: {count:,} parameters in the layout {layout}, {size / 1e6:,.1f} MB"
        console.print(said, highlight=False, markup=False)
