"""`x2i demo`: the main job from end to end, on real photographs: build, verify, audit, train, sample."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from x2i.base.errors import X2IError
from x2i.cli.configs import config
from x2i.cli.console import bars, console, print_json, table


def demo(
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes of the build; default: one per CPU.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Build a corpus of real photographs, verify it, write its report, train a small model on it, draw samples.

    Everything lies under runs/quickstart. A second run does only what is missing. About five minutes on two cores.

    Example: x2i demo
    """
    began = time.perf_counter()
    folder = Path("runs/quickstart")
    done: dict[str, Any] = {"photographs": str(_photographs(folder))}
    _build(workers, done)
    _verify(done)
    _audit(done)
    _train(folder, done)
    done["seconds"] = round(time.perf_counter() - began, 1)
    if as_json:
        print_json(done)
        return
    shown = table(f"The demo, in {done['seconds']:.0f} seconds", "what", "where", "look at it")
    shown.add_row("photographs and trouble", done["photographs"], "")
    shown.add_row(f"corpus, {done['samples']:,} samples", done["corpus"], "x2i verify " + done["corpus"])
    shown.add_row("report", done["report"], "open it in a browser")
    shown.add_row("checkpoint", done["checkpoint"], f'x2i sample {done["run"]} "Human retina." --out retina.png')
    shown.add_row("picture of samples", done["picture"], "open it")
    shown.add_row("training logs", done["logs"], f"tensorboard --logdir {done['logs']}")
    console.print(shown)


def _photographs(folder: Path) -> Path:
    from x2i.pipelines.quickstart import write_photographs

    console.rule("1 of 5: photographs", align="left")
    photos = write_photographs(folder / "photos")
    console.print(f"· the photographs of scikit-image and scikit-learn, and some trouble: {photos}", highlight=False)
    return photos


def _build(workers: int | None, done: dict[str, Any]) -> None:
    from x2i.cli.build import run, show
    from x2i.pipelines.recipe import load

    recipe = config("corpora/quickstart.yaml")
    console.rule(f"2 of 5: x2i build {recipe}", align="left")
    plan = load(recipe)
    with bars() as progress:
        result = run(plan, workers, None, progress)
    show(result)
    done.update(corpus=result.corpus, digest=result.digest, samples=result.samples)


def _verify(done: dict[str, Any]) -> None:
    from x2i.cli.verify import show
    from x2i.corpus.verify import verify

    console.rule(f"3 of 5: x2i verify {done['corpus']}", align="left")
    report = verify(done["corpus"])
    show(report)
    if not report.ok:
        raise X2IError(f"{done['corpus']}: damaged; remove it and run the demo again")


def _audit(done: dict[str, Any]) -> None:
    from x2i.cli.audit import show, write

    console.rule(f"4 of 5: x2i audit {done['corpus']}", align="left")
    written = write(done["corpus"], None)
    show(written)
    done["report"] = written.report


def _train(folder: Path, done: dict[str, Any]) -> None:
    from x2i.cli.train import show
    from x2i.trainer.progress import Bar
    from x2i.trainer.run import train

    run = config("train/quickstart.yaml")
    console.rule(f"5 of 5: x2i train {run}", align="left")
    result = train(run, progress=Bar(console))
    show(result)
    picture = folder / "samples.png"
    if result.preview is not None:
        shutil.copyfile(result.preview, picture)
    done.update(run=str(result.output), checkpoint=str(result.checkpoint), picture=str(picture), logs=str(result.logs))
