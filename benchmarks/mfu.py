"""Share of a GPU's peak that training reaches: OmniGen of 1 and of 3.8 billion parameters on packs, compiled.

    python benchmarks/mfu.py                        # on a GPU: 1b and 3.8b at 16,384 and 32,768 tokens
    python benchmarks/mfu.py --model tiny --tokens 1024 --steps 4 --warmup 2 --device cpu

It trains as `x2i train` does, by the same plan, loader, batches and optimiser step, on a corpus of JPEGs that it makes of
scikit-image's photographs: pictures to be drawn (some with an input image) in seven aspects, and conversations. There are
no weights: pixels of 8 x 8 stand for an autoencoder, so that a token is 16 x 16 pixels as with SDXL's, and nothing is
encoded.

After the warm-up each step is timed with the device waited for. Told are, for each model and budget:

    MFU         needed FLOPs / (seconds x peak), by `x2i.trainer.flops` and `x2i.trainer.peak`; "-" where there is no peak
    TFLOP/s     needed FLOPs / seconds
    padding     share of the packs that is empty
    mask        seconds to make a pack's mask on the device, over those of a step
    data wait   share of the time spent waiting for samples; `making`: for packs to be made of them
    recompiled  graphs that torch.compile made after the warm-up
    memory      the most that the device held

Source of the definition of MFU: Chowdhery et al. 2204.02311, appendix B.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import logging
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.trainer import corpora
from x2i import corpus
from x2i.base.config import parse_config
from x2i.corpus.sample import Picture, Sample, placeholder
from x2i.trainer.batch import PackBatch
from x2i.trainer.config import RunConfig
from x2i.trainer.flops import StageFlops
from x2i.trainer.learner import Learner
from x2i.trainer.loader import Loader
from x2i.trainer.peak import mfu, peak
from x2i.trainer.setup import Setup

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"preset": "omnigen-tiny"},
    # Phi-3's design at a billion parameters: heads of 128
    "1b": {
        "preset": "omnigen-3.8b",
        "hidden_size": 2048,
        "layers": 20,
        "heads": 16,
        "kv_heads": 16,
        "intermediate_size": 5632,
        "rope_scaling": None,
        "text_head": True,
        "tie_text_head": True,
    },
    "3.8b": {"preset": "omnigen-3.8b", "text_head": True, "tie_text_head": True},
}
#: Seven aspects of about a quarter of a million pixels: some thousand tokens.
BUCKETS = [[512, 512], [576, 448], [448, 576], [640, 384], [384, 640], [704, 352], [352, 704]]


@dataclass
class Measured:
    """One model at one budget; shares are of the time, but for `padding`, which is of the tokens."""

    model: str
    parameters: int
    tokens: int
    step_seconds: float
    tflops: float
    mfu: float | None
    padding: float
    mask: float
    data_wait: float
    making: float
    recompiled: int
    memory_gb: float | None
    samples_per_step: float


def main() -> None:
    """Measure what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(MODELS), help="default: 1b and 3.8b")
    parser.add_argument("--tokens", action="append", type=int, help="of a pack; default: 16384 and 32768")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--pictures", type=int, default=240, help="of the corpus that is made")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        small = options.model == ["tiny"]
        made = made_corpus(Path(folder) / "corpus", options.pictures, 96 if small else 640)
        for model, tokens in itertools.product(options.model or ["1b", "3.8b"], options.tokens or [16_384, 32_768]):
            try:
                found.append(measure(model, tokens, made, Path(folder) / "run", options))
            except torch.cuda.OutOfMemoryError as error:
                print(f"{model} at {tokens:,} tokens does not fit: {str(error).partition('. ')[0]}", file=sys.stderr)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    if options.json:
        print(json.dumps([asdict(m) for m in found], indent=1))
    else:
        show(found)


def measure(model: str, tokens: int, made: Path, output: Path, options: argparse.Namespace) -> Measured:
    """Train some steps."""
    run = run_of(model, tokens, made, output, options)
    stage = run.stages[0]
    setup = Setup(run, [corpus.open(made)], None)
    device = setup.device
    parameters = sum(p.numel() for p in setup.model.parameters())
    learner = Learner(run, setup.model, device)
    learner.start_stage(0)
    flops = StageFlops(setup.model.config, learner.trained(0))
    loader = Loader(setup.reader, setup.plans[0], stage, 0, run.reading)
    graphs = needed = seconds = waited = making = mask = used = room = samples = 0.0
    began = time.perf_counter()
    for number, examples in enumerate(loader):
        draws = {draw.index: draw for draw in setup.plans[0].step(number)}
        arrived = time.perf_counter()
        batches = setup.batchers[0].training(examples, run.seed, stage, draws=draws)
        ready = time.perf_counter()
        learner.step(batches, stage, number, number)
        wait_for(device)
        done = time.perf_counter()
        if number >= options.warmup:
            seconds += done - began
            making += ready - arrived
            waited += loader.waited()
            needed += flops.step(batches)
            for batch in batches:
                assert isinstance(batch, PackBatch)
                used, room, samples = used + batch.tokens, room + batch.length, samples + len(batch.examples)
                mask += mask_seconds(batch.inputs, setup.model.flex, device)
        else:
            loader.waited()
            graphs = compiled()
        began = time.perf_counter()
    setup.reader.close()
    speed = needed / seconds
    return Measured(
        model=model,
        parameters=parameters,
        tokens=tokens,
        step_seconds=seconds / options.steps,
        tflops=speed / 1e12,
        mfu=mfu(needed, seconds, 1, peak(device)),
        padding=1 - used / room,
        mask=mask / seconds,
        data_wait=waited / seconds,
        making=making / seconds,
        recompiled=int(compiled() - graphs),
        memory_gb=torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
        samples_per_step=samples / options.steps,
    )


def run_of(model: str, tokens: int, made: Path, output: Path, options: argparse.Namespace) -> RunConfig:
    """The run: one stage of packs. The tiny one has smaller pictures."""
    small = model == "tiny"
    half = torch.cuda.is_available() and options.device != "cpu"
    stage = {
        "name": f"{model}-{tokens}",
        "resolution": 32 if small else 512,
        "buckets": [[48, 48], [64, 32], [32, 64]] if small else BUCKETS,
        "chat_resolution": 64 if small else 448,
        "steps": options.warmup + options.steps,
        "pack": {"tokens": tokens, "packs": 1},
        "lr": 1e-5,
        "mixture": {"text_to_image": 3, "deblur": 2, "describe": 1},
    }
    content: dict[str, Any] = {
        "corpora": [str(made)],
        "output": str(output),
        "model": MODELS[model],
        "vae": {"kind": "pixels", "factor": 4 if small else 8},
        "tokenizer": {"train": {"vocab_size": 1024}},
        "precision": "bfloat16" if half else "float32",
        "device": options.device,
        "cpu_threads": 1 if small else None,
        "compute": {"compile": not options.no_compile, "checkpointing": not options.no_checkpointing},
        "stages": [stage],
    }
    return parse_config(RunConfig, content, "mfu")


def made_corpus(folder: Path, pictures: int, side: int) -> Path:
    """Crops of photographs in several aspects: from each a picture of words, a blurred one to mend, and a question."""
    made = []
    for i, (name, crop) in enumerate(corpora.crops(pictures, side)):
        width, height = BUCKETS[i % len(BUCKETS)]
        image = crop.crop((0, 0, side * min(width / height, 1), side * min(height / width, 1)))
        out, key = jpeg(image), f"{i:05d}"
        told = f"A photograph of {name}, " + " ".join(f"detail {j}" for j in range(i % 40))
        made.append(corpora.Made(Sample(f"{key}-t2i", "text_to_image", told, (), out), f"{i:064x}"))
        blurred = jpeg(image.resize((image.width // 4, image.height // 4)).resize(image.size))
        text = f"Sharpen {placeholder(1)}"
        made.append(corpora.Made(Sample(f"{key}-blur", "deblur", text, (blurred,), out), f"{i:064x}"))
        turns = (
            {"role": "user", "content": "<image>What is this?"},
            {"role": "assistant", "content": told},
        )
        made.append(corpora.Made(Sample(f"{key}-ask", "describe", "", (out,), None, turns), f"{i:064x}"))
    return corpora.write(folder, made, per_shard=100, row_group=4096)


def jpeg(image: Image.Image) -> Picture:
    """A picture as it is stored."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return Picture(out.getvalue(), "jpg", image.width, image.height)


def mask_seconds(inputs: Any, flex: bool | None, device: torch.device) -> float:
    """How long a pack's mask takes on the device: the median of five."""
    from x2i.model.layers.attention import mask_of

    each = []
    for _ in range(5):
        wait_for(device)
        began = time.perf_counter()
        mask_of(inputs.spans, flex)
        wait_for(device)
        each.append(time.perf_counter() - began)
    return float(np.median(each))


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compiled() -> float:
    """Graphs that torch.compile has made so far."""
    from torch._dynamo.utils import counters

    return float(counters["stats"]["unique_graphs"])


def show(found: list[Measured]) -> None:
    """A table."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    table = Table(title=f"One {name}, torch {torch.__version__}", title_justify="left")
    for column in ("model", "tokens", "s / step", "TFLOP/s", "MFU", "padding", "mask", "data wait", "making"):
        table.add_column(column, justify="right")
    for column in ("recompiled", "memory GB"):
        table.add_column(column, justify="right")
    for m in found:
        table.add_row(
            f"{m.model} ({m.parameters / 1e6:,.0f} M)",
            f"{m.tokens:,}",
            f"{m.step_seconds:.3g}",
            f"{m.tflops:.3g}",
            "-" if m.mfu is None else f"{m.mfu:.1%}",
            *(f"{share:.2%}" for share in (m.padding, m.mask, m.data_wait, m.making)),
            str(m.recompiled),
            "-" if m.memory_gb is None else f"{m.memory_gb:.1f}",
        )
    Console(width=None if Console().is_terminal else 130).print(table)


if __name__ == "__main__":
    main()
