"""`x2i convert`: a model in another layout."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from x2i.base.errors import RecipeError
from x2i.cli.console import console, print_json


class LayoutName(StrEnum):
    """`x2i.model.omnigen.layouts.Layout`, which is heavy to import."""

    published = "published"
    diffusers = "diffusers"
    transformer = "transformer"
    x2i = "x2i"


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
    layout: Annotated[LayoutName, typer.Option(help="Who is to open it.", show_default=False)],
    dtype: Annotated[
        DType | None, typer.Option(help="Of the weights. Default: float32, which is what they are trained in.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Write an OmniGen so that others open it, or a published OmniGen or Ovis-U1 as a checkpoint of ours.

    [b]published[/b]: as VectorSpaceLab's OmniGen. [b]diffusers[/b]: for its OmniGenPipeline. [b]transformer[/b]: for
    its OmniGenTransformer2DModel alone. [b]x2i[/b]: to sample from and to train on. Averaged weights are taken where a
    checkpoint has them, and adapters are folded in.

    Example: x2i convert runs/omnigen/train exported --layout diffusers

    Example: x2i convert Shitao/OmniGen-v1 checkpoints/omnigen --layout x2i
    """
    import torch

    from x2i.cli import opening
    from x2i.model.omnigen import writing
    from x2i.model.omnigen.layouts import Layout
    from x2i.model.ovis_u1 import layouts

    opened: Any = opening.ovis_u1(checkpoint)
    if opened is not None and layout is not LayoutName.x2i:
        raise RecipeError(f"--layout {layout.value}: a published Ovis-U1 can be written as x2i alone")
    of_ovis = opened is not None
    opened = opened or opening.omnigen(checkpoint)
    if dtype is not None:
        opened.model.to(getattr(torch, dtype.value))
    if of_ovis:
        layouts.save_checkpoint(opened, out)
    else:
        writing.save(opened, out, Layout(layout.value))
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    count = sum(parameter.numel() for parameter in opened.model.parameters())
    if as_json:
        print_json({"out": str(out), "layout": layout.value, "parameters": count, "bytes": size})
    else:
        said = f"{out}: {count:,} parameters in the layout {layout.value}, {size / 1e6:,.1f} MB"
        console.print(said, highlight=False, markup=False)
