"""`python benchmarks/subject_lora.py FOLDER --sentence "a photograph of sks toy"`: one subject learned by adapters.

FOLDER holds a few photographs. They are copied with the sentence as the text of each, made into a corpus
(configs/corpora/subject.yaml), and learned beside the frozen weights of the demo's run (configs/train/lora.yaml). Then:

- error of the velocity on the photographs, seen and held out, without and with the adapter: means of 4 noises at four
  fixed timesteps;
- the same on held-out samples of the demo's tasks, and the largest difference of velocities to the base: without the
  adapter it is 0;
- the adapter's file read back by `load_adapter`: applied beside the weights and folded into them;
- `x2i sample` with the run's checkpoint, and with the base and `--lora`: the same picture;
- a sheet of pictures.

Averaged weights everywhere. What is there already is not made again.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from torch import Tensor

from x2i import corpus
from x2i.base.config import change, load_yaml, parse_config
from x2i.base.errors import X2IError
from x2i.base.files import atomic
from x2i.base.seeds import generator
from x2i.model import flow, lora
from x2i.model.base import Request
from x2i.model.sampling import Options, Painter
from x2i.trainer import checkpoint
from x2i.trainer.batch import Batcher, DrawBatch
from x2i.trainer.checkpoint import Loaded
from x2i.trainer.config import RunConfig
from x2i.trainer.data import Example, SampleReader
from x2i.trainer.run import train
from x2i.trainer.table import SampleTable

TASK = "text_to_image"
TIMES = 1 / (1 + np.exp(-np.array([-1.1503, -0.3186, 0.3186, 1.1503])))  # as the trainer's held-out loss
NOISES = 4
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
DRAWN = 6

console = Console(width=None if Console().is_terminal else 130)


def main(
    folder: Annotated[Path, typer.Argument(help="Photographs of one subject.")],
    sentence: Annotated[str, typer.Option(help="What is said of each.")] = "a photograph of sks toy",
    base: Annotated[str, typer.Option(help="Run or checkpoint that the adapters change.")] = "runs/quickstart/train",
    demo: Annotated[str, typer.Option(help="Corpus of the base's other tasks.")] = "runs/quickstart/corpus",
    recipe: Annotated[Path, typer.Option(help="Makes the corpus.")] = Path("configs/corpora/subject.yaml"),
    run_file: Annotated[Path, typer.Option("--run", help="Trains the adapters.")] = Path("configs/train/lora.yaml"),
    out: Annotated[Path, typer.Option(help="Folder of all that is made.")] = Path("runs/bench_subject"),
) -> None:
    """Build, train, compare, print."""
    torch.set_num_threads(1)  # as the runs: a second thread gains these models little, and waits where cores are shared
    place = prepare(folder, sentence, recipe, out)
    changes = [f"corpora=[{place}]", f"output={out / 'lora'}", f"model.weights={base}"]
    run = parse_config(RunConfig, change(load_yaml(run_file), changes, str(run_file)), str(run_file))
    result = train(run)
    if result.steps_now:
        console.print(f"trained {result.steps_now} steps in {result.seconds:.0f} s")
    of_base = checkpoint.fetched(base)
    before, after = checkpoint.load_model(of_base), checkpoint.load_model(result.checkpoint)
    off = checkpoint.load_model(result.checkpoint, adapters=False)
    photographs = examples_of(str(place), run)
    table = Table(title="Error of the velocity")
    for name in ("what", "samples", "base", "adapter off", "adapter on", "off - base", "on - base"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for what, some in {**photographs, **others(demo, run)}.items():
        table.add_row(what, str(len(some)), *compared(before, off, after, some))
    console.print(table)
    console.print(files(of_base, result.checkpoint))
    console.print(read_back(result.checkpoint, before, after, off, [e for some in photographs.values() for e in some]))
    console.print(commands(of_base, result.checkpoint, sentence, out))
    save_sheet(photographs, before, after, sentence, run.stages[-1].resolution, out / "sheet.png")
    console.print(f"pictures: {out / 'sheet.png'}")


def prepare(folder: Path, sentence: str, recipe: Path, out: Path) -> Path:
    """The photographs with their sentence, as a corpus."""
    photographs = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGES)
    if not photographs:
        raise X2IError(f"{folder}: no photograph ({', '.join(IMAGES)})")
    copies, place = out / "photos", out / "corpus"
    copies.mkdir(parents=True, exist_ok=True)
    for photograph in photographs:
        shutil.copyfile(photograph, copies / photograph.name)
    text = io.StringIO()
    csv.writer(text).writerows([("file_name", "text"), *((p.name, sentence) for p in photographs)])
    with atomic(copies / "metadata.csv") as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
    changes = (f"sources.0.path={copies}", f"lake={out / 'lake'}", f"out={place}")
    x2i("build", str(recipe), *(word for c in changes for word in ("--set", c)))
    return place


def x2i(*words: str) -> None:
    """A command as a user types it. Raises X2IError with what it said, if it fails."""
    done = subprocess.run([sys.executable, "-m", "x2i", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise X2IError(f"x2i {' '.join(words)}: {done.stderr or done.stdout}")


def examples_of(place: str, run: RunConfig) -> dict[str, list[Example]]:
    """The photographs, seen and held out."""
    table = SampleTable([corpus.open(place)], run.held_out)
    reader, side = SampleReader(table), run.stages[-1].resolution
    sides = {"photographs, seen": table.train[TASK], "photographs, held out": table.held_out[TASK]}
    return {name: [reader.read(int(i), side) for i in rows] for name, rows in sides.items()}


def others(place: str, run: RunConfig) -> dict[str, list[Example]]:
    """Pictures of the demo's tasks that its run held out."""
    table = SampleTable([corpus.open(place)], 0.1)
    reader, side = SampleReader(table), run.stages[-1].resolution
    drawn = [t for t in table.tasks if t not in table.chats and len(table.held_out[t])]
    return {f"demo's {t}": [reader.read(int(i), side) for i in table.held_out[t]] for t in drawn}


@torch.no_grad()
def velocities(loaded: Loaded, some: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Velocity [N, C, H, W] and its squared error [N], for each sample, timestep and noise."""
    assert loaded.vae is not None
    network = loaded.model
    batcher = Batcher(loaded.processor, loaded.vae, torch.device("cpu"))
    drawn: list[Tensor] = []
    errors: list[Tensor] = []
    for number in range(NOISES):
        for t in TIMES:
            noise = [generator("benchmark/subject/1", e.key, number) for e in some]
            batch: DrawBatch = batcher.draw(some, noise, [float(t)] * len(some))
            noisy = flow.interpolate(batch.noise, batch.data, batch.t)
            size = (noisy.shape[-2], noisy.shape[-1])
            drawn.append(network.velocity(noisy, batch.t, network.condition(batch.inputs, target=size)))
            errors.append(flow.squared_error(drawn[-1], batch.noise, batch.data))
    return torch.cat(drawn), torch.cat(errors)


def compared(before: Loaded, off: Loaded, after: Loaded, some: Sequence[Example]) -> list[str]:
    """Mean errors of base, adapter off and on; and the largest differences of the velocity to the base."""
    (base, was), (without, same), (with_it, now) = (velocities(m, some) for m in (before, off, after))
    means = [f"{float(e.mean()):.3f}" for e in (was, same, now)]
    return means + [f"{float((x - base).abs().max()):.2g}" for x in (without, with_it)]


def files(base: Path, place: Path) -> str:
    """Sizes of the adapter and of the weights that it changes."""
    adapter = (place / checkpoint.EMA_ADAPTER / lora.WEIGHTS).stat().st_size
    whole = checkpoint.weights_of(base)
    size = (whole if whole.is_file() else whole / checkpoint.MODEL).stat().st_size
    return f"adapter {adapter:,} bytes, the base's weights {size:,}: {adapter / size:.1%}"


def read_back(place: Path, before: Loaded, after: Loaded, off: Loaded, some: Sequence[Example]) -> str:
    """Read the adapter's file into the base: beside the weights, folded in, and taken away."""
    model = off.model
    lora.load_adapter(model, place / checkpoint.EMA_ADAPTER)
    beside, folded = velocities(off, some)[0], velocities(after, some)[0]
    difference = float((beside - folded).abs().max())
    lora.detach(model)
    was, now = before.model.state_dict(), model.state_dict()
    same = was.keys() == now.keys() and all(torch.equal(was[n], now[n]) for n in was)
    return f"adapter beside the weights - folded in: {difference:.2g}; taken away: {'the base, bit for bit' if same else 'NOT the base'}"


def commands(base: Path, place: Path, sentence: str, out: Path) -> str:
    """Whether `x2i sample` draws the same from the run and from the base with the adapter."""
    ways = {
        "run": [str(place)],
        "lora": [str(base), "--lora", str(place / checkpoint.EMA_ADAPTER)],
        "base": [str(base)],
    }
    drawn = {}
    for name, (model, *more) in ways.items():
        file = out / f"sample-{name}.png"
        x2i("sample", model, sentence, *more, "--out", str(file), "--steps", "40")
        with Image.open(file) as image:
            drawn[name] = np.asarray(image.convert("RGB")).astype(int)
    run, given, plain = drawn["run"], drawn["lora"], drawn["base"]
    return (
        f"x2i sample RUN and x2i sample BASE --lora: {np.abs(run - given).max()} of 255 apart; "
        f"from BASE alone: {np.abs(run - plain).max()}"
    )


def save_sheet(
    photographs: dict[str, list[Example]], before: Loaded, after: Loaded, sentence: str, side: int, path: Path
) -> None:
    """The photographs; what the base draws of the sentence; what the adapter makes of it."""
    options = Options(side, side, 40, guidance=1.0, image_guidance=1.0)
    asked = [Request(sentence, ())] * DRAWN

    def drawn(painter: Painter) -> list[Image.Image]:
        return painter.paint(asked, options)

    rows = {
        name: [Image.fromarray(e.output) for e in some if e.output is not None] for name, some in photographs.items()
    }
    rows |= {f"base: {sentence}": drawn(before.painter), f"adapter: {sentence}": drawn(after.painter)}
    tile, head = 4 * side, 20
    picture = Image.new("RGB", ((tile + 4) * DRAWN, (tile + head) * len(rows)), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    for line, (name, images) in enumerate(rows.items()):
        draw.text((4, line * (tile + head) + 4), name, fill=(0, 0, 0))
        for column, image in enumerate(images[:DRAWN]):
            enlarged = image.resize((tile, tile), Image.Resampling.BICUBIC)
            picture.paste(enlarged, (column * (tile + 4), line * (tile + head) + head))
    picture.save(path)


if __name__ == "__main__":
    typer.run(main)
