"""`python benchmarks/kv_cache.py`: steps of OmniGen with the condition's keys and values kept, against without.

A model of 8 layers of width 512 with random weights on the CPU; a prompt of 300 text tokens with none to three images
of 256 x 256 (256 tokens each), drawn at 256 x 256 with its guidance branches in one batch. Both ways make the same
steps from the same noise, by turns; the cached time has the pass over the condition in it. From that pass and the
steps timed apart follows the ratio at 50 steps. On a machine with other work look at the CPU's seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from x2i.model import flow
from x2i.model.omnigen.config import OmniGenConfig
from x2i.model.omnigen.model import Condition, OmniGen
from x2i.model.omnigen.prompt import Prompt, PromptBatch, collate

MID = OmniGenConfig(hidden_size=512, layers=8, heads=8, kv_heads=8, intermediate_size=1408, vocab_size=1024)
SIDE = 32  # latents; 16 x 16 tokens
TOKENS = (SIDE // MID.patch_size) ** 2

console = Console(width=None if Console().is_terminal else 110)


def prompt(text: int, images: int) -> Prompt:
    """`text` tokens, with the images in their middle."""
    before, after = text // 2, text - text // 2
    blocks = [0] * before + [k for k in range(1, images + 1) for _ in range(TOKENS)] + [0] * after
    return Prompt(tuple(i % 1000 + 3 for i in range(len(blocks))), tuple(blocks), tuple(range(images)))


def branches(text: int, images: int) -> PromptBatch:
    """The rows of a guided step: full, image-only (if there are images), unconditional."""
    pictures = [torch.randn(MID.in_channels, SIDE, SIDE) for _ in range(images)]
    rows = [(prompt(text, images), pictures), (prompt(20, images), pictures), (prompt(20, 0), [])]
    if not images:
        del rows[1]
    return collate([p for p, _ in rows], [i for _, i in rows])


def integrate(model: OmniGen, condition: Condition, noise: Tensor, steps: int) -> Tensor:
    """Draw: every branch sees the same noisy latents, and the first one's velocity leads."""
    rows = len(condition.prompt.ids_BL)

    def velocity(x: Tensor, t_B: Tensor) -> Tensor:
        each = model.velocity(x.expand(rows, -1, -1, -1), t_B.expand(rows), condition)
        return each[-1:] + 2.5 * (each[:1] - each[-1:])

    return flow.euler(velocity, noise, steps)


@dataclass
class Clock:
    """Seconds of the wall and of the CPU."""

    wall: float = 0.0
    cpu: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu


@torch.no_grad()
def main(
    steps: Annotated[int, typer.Option(help="Steps of each picture.")] = 3,
    text: Annotated[int, typer.Option(help="Text tokens of the instruction.")] = 300,
    threads: Annotated[int, typer.Option(help="Threads of PyTorch; 0: its own choice.")] = 1,
    images: Annotated[tuple[int, int], typer.Option(help="Fewest and most condition images.")] = (0, 3),
) -> None:
    """Time cached and uncached steps."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = OmniGen(MID).eval()
    for linear in (model.final_layer.linear, model.final_layer.adaLN_modulation[1]):
        nn.init.normal_(linear.weight, std=0.02)  # zero at initialisation: nothing would be compared
    table = Table(
        title=f"{steps} steps at 256 x 256, {text} text tokens, {torch.get_num_threads()} threads: wall (CPU) s"
    )
    for name in ("images", "rows", "condition", "uncached", "cached", "ratio", "at 50", "cache MiB", "difference"):
        table.add_column(name, justify="right")
    for number in range(images[0], images[1] + 1):
        batch = branches(text, number)
        noise = torch.randn(1, MID.in_channels, SIDE, SIDE)
        plain, first, rest = Clock(), Clock(), Clock()
        with plain.running():
            expected = integrate(model, model.condition(batch), noise, steps)
        with first.running():
            condition = model.condition(batch, cache=True, target=(SIDE, SIDE))
        with rest.running():
            drawn = integrate(model, condition, noise, steps)
        assert condition.cache is not None
        table.add_row(
            *map(str, (number, *batch.ids_BL.shape)),
            f"{plain.wall:.1f} ({plain.cpu:.1f})",
            f"{first.wall + rest.wall:.1f} ({first.cpu + rest.cpu:.1f})",
            f"{plain.wall / (first.wall + rest.wall):.2f} ({plain.cpu / (first.cpu + rest.cpu):.2f})",
            f"{at(50, plain.wall, first.wall, rest.wall, steps):.2f} ({at(50, plain.cpu, first.cpu, rest.cpu, steps):.2f})",
            f"{condition.cache.nbytes() / 2**20:.0f}",
            f"{float((drawn - expected).abs().max()):.1e}",
        )
    console.print(table)


def at(wanted: int, plain: float, first: float, rest: float, steps: int) -> float:
    """Ratio of times at another number of steps."""
    return plain / steps * wanted / (first + rest / steps * wanted)


if __name__ == "__main__":
    typer.run(main)
