"""`python benchmarks/edit_loss.py [CORPUS]`: what the weighted losses of edits do, inside and outside of what an edit changes.

Trains the same small OmniGen (weights at the start, samples, crops, noise and timesteps alike) without and with each kind
of `edit_loss`, several times with other seeds. Then measures held-out samples with the averaged weights:

- drawn pictures from several noises: PSNR and mean absolute error (of 255), outside against the source, inside against
  the target; and how much of the edit was done: inside, 0 where the source was left, 1 on average if the target was drawn;
- error of the velocity, outside and inside, at four fixed timesteps with fixed noise.

Inside is the sample's own mask, or where source and target differ, and a pixel around it: crops are scaled bicubically.
A value after ± is the standard deviation over the trainings. A training that is finished is not done again.

The demo's corpus has few pictures. The figures in LOG.md are of one with `restoration: {tasks: [inpaint]}` and
`editing: {tasks: [recolour_all]}` over 250 photographs, `--tasks inpaint,recolour_all`.
"""

from __future__ import annotations

import io
import json
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import torch
import typer
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import max_pool2d

from x2i import corpus
from x2i.base.config import parse_config
from x2i.base.errors import RecipeError
from x2i.base.seeds import generator
from x2i.model import flow
from x2i.model.base import Request
from x2i.model.pixels import centre_crop, to_images
from x2i.model.sampling import Options
from x2i.trainer import checkpoint
from x2i.trainer.batch import Batcher
from x2i.trainer.checkpoint import Loaded
from x2i.trainer.config import RunConfig
from x2i.trainer.data import Example, SampleReader
from x2i.trainer.run import train
from x2i.trainer.table import SampleTable

NONE = "none"
KINDS = (NONE, "paper", "local", "released", "kept")
#: Where there is no mask: a place has changed if a value did by more than this, of 255.
CHANGED = 16
TIMES = 1 / (1 + np.exp(-np.array([-1.1503, -0.3186, 0.3186, 1.1503])))  # as the trainer's held-out loss
SHOWN = 4  # samples of a task on the sheet

console = Console(width=None if Console().is_terminal else 130)


@dataclass(frozen=True)
class Sample:
    """A held-out edit. `inside`: bool [side, side], what was changed; the rest is outside."""

    example: Example
    inside: np.ndarray


@dataclass(frozen=True)
class Figures:
    """Means over samples and noises. PSNR in dB, MAE of 255, errors of the velocity, share of the edit that was done."""

    psnr_outside: float
    psnr_inside: float
    mae_outside: float
    mae_inside: float
    done: float
    velocity_outside: float
    velocity_inside: float


def main(
    folder: Annotated[str, typer.Argument(metavar="CORPUS", help="A corpus of edits.")] = "runs/quickstart/corpus",
    tasks: Annotated[
        str, typer.Option(help="Tasks with one input picture, of the output's size.")
    ] = "inpaint,outpaint",
    kinds: Annotated[str, typer.Option(help="Losses to compare.")] = ",".join(KINDS),
    seeds: Annotated[str, typer.Option(help="Seeds of the trainings.")] = "0,1,2",
    steps: Annotated[str, typer.Option(help="Training steps at 16 and at 32 pixels.")] = "500,1000",
    dropout: Annotated[float, typer.Option(help="Share of samples trained without their condition.")] = 0.1,
    t_mean: Annotated[float, typer.Option(help="Below 0: more noise in training.")] = -0.6,
    held_out: Annotated[float, typer.Option(help="Share of the images kept for measuring.")] = 0.2,
    samples: Annotated[int, typer.Option(help="Most held-out samples of a task.")] = 24,
    noises: Annotated[int, typer.Option(help="Pictures drawn of each.")] = 3,
    draw_steps: Annotated[int, typer.Option(help="Euler steps of a picture.")] = 30,
    out: Annotated[Path, typer.Option(help="Folder of the trainings, the figures and the sheet.")] = Path(
        "runs/bench_edit_loss"
    ),
) -> None:
    """Train, draw, measure, print."""
    torch.set_num_threads(1)  # as the runs: a second thread gains these models little, and waits where cores are shared
    named, losses = tasks.split(","), kinds.split(",")
    found: dict[tuple[str, str], list[Figures]] = defaultdict(list)
    sheet: dict[str, list[list[np.ndarray]]] = {}
    for seed in map(int, seeds.split(",")):
        for kind in losses:
            run = run_of(folder, named, kind, seed, steps, dropout, t_mean, held_out, out)
            began = time.monotonic()
            result = train(run)
            trained = time.monotonic() - began
            loaded = checkpoint.load_model(result.checkpoint)
            chosen = held_out_of(run, named, samples)
            measured = {task: measure(loaded, some, noises, draw_steps) for task, some in chosen.items()}
            for task, (figures, drawn) in measured.items():
                found[task, kind].append(figures)
                if seed == int(seeds.split(",")[0]):
                    add_to_sheet(sheet, task, chosen[task], drawn)
            record = {task: asdict(figures) for task, (figures, _) in measured.items()}
            (run.output / "figures.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            console.print(
                f"seed {seed}, {kind}: trained in {trained:.0f} s, {time.monotonic() - began - trained:.0f} s more"
            )
    for task in named:
        console.print(table_of(task, len(chosen[task]), {k: found[task, k] for k in losses}, copied(chosen[task])))
    save_sheet(sheet, losses, out / "sheet.png")
    console.print(f"pictures: {out / 'sheet.png'}")


def run_of(
    folder: str,
    tasks: list[str],
    kind: str,
    seed: int,
    steps: str,
    dropout: float,
    t_mean: float,
    held_out: float,
    out: Path,
) -> RunConfig:
    """The demo's model and settings, on these tasks alone."""
    shared: dict[str, Any] = {
        "batch": 4,
        "lr": 3.0e-3,
        "betas": [0.9, 0.95],
        "warmup": 30,
        "t_mean": t_mean,
        "t_std": 1.2,
        "condition_dropout": dropout,
        "mixture": dict.fromkeys(tasks, 1.0),
        "edit_loss": None if kind == NONE else {"kind": kind},
    }
    small, large = map(int, steps.split(","))
    content = {
        "corpora": [folder],
        "output": str(out / f"{kind}-{seed}"),
        "model": {
            "preset": "omnigen-tiny",
            "hidden_size": 128,
            "layers": 4,
            "heads": 2,
            "kv_heads": 2,
            "intermediate_size": 384,
        },
        "vae": {"kind": "pixels", "factor": 2},
        "tokenizer": {"train": {"vocab_size": 1024}},
        "max_text_tokens": 32,
        "seed": seed,
        "held_out": held_out,
        "ema": 0.99,
        "cpu_threads": 1,
        "device": "cpu",
        "stages": [
            {"name": "small", "resolution": 16, "steps": small, "min_crop": 0.25, **shared},
            {"name": "large", "resolution": 32, "steps": large, "min_crop": 0.4, "schedule": "cosine", **shared},
        ],
        "checkpoint_every": 1_000_000,
        "preview": {"per_task": 0},
    }
    return parse_config(RunConfig, content, "benchmark")


def held_out_of(run: RunConfig, tasks: list[str], most: int) -> dict[str, list[Sample]]:
    """Held-out samples of each task, in the order of the table."""
    table = SampleTable([corpus.open(c) for c in run.corpora], run.held_out)
    reader, side = SampleReader(table), run.stages[-1].resolution
    out = {}
    for task in tasks:
        if task not in table.tasks:
            raise RecipeError(f"--tasks: {run.corpora[0]} has no {task}; it has {', '.join(table.tasks)}")
        examples = [(int(i), reader.read(int(i), side)) for i in table.held_out[task][:most]]
        out[task] = [Sample(e, inside_of(reader, index, e)) for index, e in examples]
    reader.close()
    return out


def inside_of(reader: SampleReader, index: int, example: Example) -> np.ndarray:
    """What the edit changes, bool [side, side], with a pixel around it."""
    assert example.output is not None
    side = example.output.shape[0]
    ref = reader.table[index]
    member = next((m for m in ref.members if m[0].startswith("mask")), None)
    if member is None:
        changed = np.abs(example.output.astype(int) - example.inputs[0]).max(axis=2) > CHANGED
    else:
        with (Path(ref.corpus.path) / ref.shard).open("rb") as file:
            file.seek(member[1])
            mask = Image.open(io.BytesIO(file.read(member[2])))
        changed = centre_crop(mask.convert("RGB"), side, side).max(axis=2) > 0
    return cv2.dilate(changed.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0


@torch.no_grad()
def measure(loaded: Loaded, some: list[Sample], noises: int, steps: int) -> tuple[Figures, list[np.ndarray]]:
    """The figures of one model on one task, and the pictures of the first noise."""
    assert loaded.vae is not None
    side = some[0].inside.shape[0]
    requests = [Request(s.example.instruction, s.example.inputs) for s in some]
    values: dict[str, list[float]] = defaultdict(list)
    first: list[np.ndarray] = []
    for number in range(noises):
        options = Options(side, side, steps, guidance=1.0, image_guidance=1.0, seed=number)
        drawn = [np.asarray(p) for p in to_images(loaded.painter.draw(requests, options))]
        first = first or drawn
        for sample, picture in zip(some, drawn, strict=True):
            for where, error in errors(sample, picture).items():
                values[f"psnr_{where}"].append(psnr(error))
                values[f"mae_{where}"].append(float(np.abs(error).mean()))
            values["done"] += [done(sample, picture)] if sample.inside.any() else []
    outside, inside = velocity_errors(loaded, some)
    values["velocity_outside"], values["velocity_inside"] = outside, inside
    return Figures(**{f.name: float(np.mean(values[f.name])) for f in fields(Figures)}), first


def errors(sample: Sample, picture: np.ndarray) -> dict[str, np.ndarray]:
    """Differences of 255 [N, 3]: outside to the source, inside to the target. Empty sides are left out."""
    target = sample.example.output
    assert target is not None
    of = {"outside": (~sample.inside, sample.example.inputs[0]), "inside": (sample.inside, target)}
    return {n: picture[w].astype(float) - true[w] for n, (w, true) in of.items() if w.any()}


def done(sample: Sample, picture: np.ndarray) -> float:
    """How far inside the picture went from the source towards the target: 0 is not at all, 1 is all the way."""
    source, target = sample.example.inputs[0], sample.example.output
    assert target is not None
    way = (target.astype(float) - source)[sample.inside]
    return float(((picture.astype(float) - source)[sample.inside] * way).sum() / max(np.square(way).sum(), 1.0))


def psnr(error: np.ndarray) -> float:
    """In dB, of values to 255; 58.1 where they are equal."""
    return float(10 * np.log10(255**2 / max(np.square(error).mean(), 0.1)))


def velocity_errors(loaded: Loaded, some: list[Sample]) -> tuple[list[float], list[float]]:
    """Squared error of the velocity of each sample and timestep, outside and inside."""
    assert loaded.vae is not None
    batcher = Batcher(loaded.processor, loaded.vae, torch.device("cpu"))
    outside, inside = [], []
    for number, t in enumerate(TIMES):
        drawn = [generator("benchmark/edit-loss/1", s.example.key, number) for s in some]
        batch = batcher.draw([s.example for s in some], drawn, [float(t)] * len(some))
        noisy = flow.interpolate(batch.noise, batch.data, batch.t)
        size = (noisy.shape[-2], noisy.shape[-1])
        predicted = loaded.model.velocity(noisy, batch.t, loaded.model.condition(batch.inputs, target=size))
        squared_BHW = (predicted - (batch.data - batch.noise)).square().mean(dim=1)
        for error_HW, sample in zip(squared_BHW, some, strict=True):
            where_HW = latent_mask(sample.inside, loaded.vae.shrink)
            outside += [float(error_HW[~where_HW].mean())] if (~where_HW).any() else []
            inside += [float(error_HW[where_HW].mean())] if where_HW.any() else []
    return outside, inside


def latent_mask(inside: np.ndarray, shrink: int) -> Tensor:
    """Bool [h, w]: latents of which any pixel is inside."""
    mask = torch.from_numpy(inside.astype(np.float32))[None, None]
    return max_pool2d(mask, shrink)[0, 0] > 0


def copied(some: list[Sample]) -> tuple[float, float]:
    """Share of the picture that is inside, and the outside PSNR of the target itself against the source."""
    psnrs = [psnr(errors(s, s.example.output)["outside"]) for s in some if s.example.output is not None]
    return float(np.mean([s.inside.mean() for s in some])), float(np.mean(psnrs))


def table_of(task: str, count: int, by_kind: dict[str, list[Figures]], facts: tuple[float, float]) -> Table:
    """Means over the trainings, with their standard deviation."""
    trainings = len(next(iter(by_kind.values())))
    title = f"{task}: {count} held-out samples, {trainings} trainings; inside {facts[0]:.0%}; target outside {facts[1]:.1f} dB"
    table = Table(title=title)
    table.add_column("edit loss")
    for name in ("PSNR out", "PSNR in", "MAE out", "MAE in", "edit done", "velocity out", "velocity in"):
        table.add_column(name, justify="right")
    for kind, several in by_kind.items():
        cells = []
        for field in fields(Figures):
            values = np.array([getattr(f, field.name) for f in several])
            digits = 1 if field.name.startswith(("psnr", "mae")) else 2 if field.name == "done" else 3
            spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.{digits}f}{spread}")
        table.add_row(kind, *cells)
    return table


def add_to_sheet(
    sheet: dict[str, list[list[np.ndarray]]], task: str, some: list[Sample], drawn: list[np.ndarray]
) -> None:
    """Each row: source, target, inside, then a drawn picture and its error outside for each kind."""
    if task not in sheet:
        sheet[task] = []
        for sample in some[:SHOWN]:
            assert sample.example.output is not None
            mask = np.repeat(sample.inside[..., None] * np.uint8(255), 3, axis=2)
            sheet[task].append([sample.example.inputs[0], sample.example.output, mask])
    for row, sample, picture in zip(sheet[task], some[:SHOWN], drawn[:SHOWN], strict=True):
        error = np.abs(picture.astype(int) - sample.example.inputs[0]) * 4 * ~sample.inside[..., None]
        row += [picture, error.clip(0, 255).astype(np.uint8)]


def save_sheet(sheet: dict[str, list[list[np.ndarray]]], kinds: list[str], path: Path) -> None:
    """All rows as one picture, three times enlarged."""
    rows = [row for several in sheet.values() for row in several]
    cell = 3 * rows[0][0].shape[0] + 6
    titles = ["source", "target", "inside", *(t for k in kinds for t in (k, "error x 4"))]
    picture = Image.new("RGB", (cell * len(titles), cell * len(rows) + 18), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    for column, title in enumerate(titles):
        draw.text((column * cell + 3, 3), title, fill=(0, 0, 0))
        for line, row in enumerate(rows):
            tile = Image.fromarray(row[column]).resize((cell - 6, cell - 6), Image.Resampling.NEAREST)
            picture.paste(tile, (column * cell + 3, line * cell + 18))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


if __name__ == "__main__":
    typer.run(main)
