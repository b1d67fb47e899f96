"""The tables of `x2i train RUN --explain`: stages side by side, then what each draws and how often it is repeated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from x2i.cli.console import console, table

if TYPE_CHECKING:
    from rich.table import Table

    from x2i.trainer.told import Drawn, Explained, StageTold

#: Wider terminals are not filled: lines would be hard to follow.
_WIDEST = 100


def show(told: Explained) -> None:
    """Print what `x2i.trainer.explain.explain` found."""
    width = min(console.width, _WIDEST)
    shown = [_stages(told), _memory(told)]
    shown += [_drawn(told, by) for by in ("task", "corpus") if any(_of(stage, by) for stage in told.stages)]
    for out in shown:  # a title of its own may be wider than the table
        console.print(str(out.title), style="bold", markup=False, highlight=False, width=width)
        out.title = None
        console.print(out, width=width)
    devices = told.devices
    speed = f"time: at {devices.mfu:.0%} of the peak of {devices.count:,} {devices.name} (assumed: --mfu, --devices, "
    speed += "--device-name), without evaluation and checkpoints"
    for note in ([speed] if devices.flops is not None else []) + list(told.notes):
        console.print(f"· {note}", markup=False, highlight=False, width=width)


def _plain(title: str, told: Explained, last: str | None) -> Table:
    """A table with a column for each stage; it has few lines, so that seven columns fit into 80 characters."""
    from rich import box

    out = table(title, "", *(stage.name for stage in told.stages), *([last] if last else []))
    out.box, out.padding, out.collapse_padding, out.pad_edge = box.SIMPLE_HEAD, (0, 1), True, False
    for column in out.columns[1:]:
        column.justify = "right"
    return out


def _stages(told: Explained) -> Table:
    many = len(told.stages) > 1
    out = _plain(f"{told.model}: {big(told.parameters)} parameters", told, "all" if many else None)

    def row(name: str, of: Callable[[StageTold], str], total: str = "") -> None:
        out.add_row(name, *(of(stage) for stage in told.stages), *([total] if many else []))

    def total(name: str) -> str:
        found = told.total(name)
        return "?" if found is None else (f"{found:,.0f}" if name == "steps" else big(found))

    row("trains", lambda s: "\n".join(s.trains) if s.trained < told.parameters else "all")
    row("parameters", lambda s: big(s.trained))
    row("resolution", lambda s: s.resolution.replace(", ", "\n"))
    row("steps", lambda s: f"{s.steps:,}", total("steps"))
    row("batch", lambda s: f"{s.batch:,.0f}")
    row("samples", lambda s: big(s.samples), total("samples"))
    row("images", lambda s: big(s.images), total("images"))
    row("tokens", lambda s: big(s.tokens), total("tokens"))
    row("FLOPs a step", lambda s: f"{s.flops_per_step:.2g}")
    row("FLOPs", lambda s: f"{s.flops:.2g}", f"{told.total('flops'):.2g}")
    row("time", lambda s: duration(s.seconds), duration(told.total("seconds")))
    return out


def _memory(told: Explained) -> Table:
    ranks = told.stages[0].memory.ranks
    where = "on the device" if ranks == 1 else f"on each device; sharded over {ranks:,} ranks, but for the last two"
    out = _plain(f"Memory, GB {where}", told, None)
    names = {
        "weights": "weights",
        "gradients": "gradients",
        "optimiser": "AdamW",
        "averaged": "averaged (EMA)",
        "reference": "reference (DPO)",
        "gathered": "two blocks, whole",
        "activations": "activations",
    }
    for name, shown in names.items():
        values = [getattr(stage.memory, name) for stage in told.stages]
        if any(values):
            out.add_row(shown, *(_gigabytes(v) for v in values))
    out.add_row("together", *(_gigabytes(stage.memory.total) for stage in told.stages))
    return out


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:,.1f}" if value >= 1e9 or not value else f"{value / 1e9:.2g}"


def _of(stage: StageTold, by: str) -> dict[str, Drawn]:
    return dict(stage.tasks if by == "task" else stage.corpora)


def _drawn(told: Explained, by: str) -> Table:
    """Share of the stage's samples, and how often each is seen."""
    known = any(d.epochs is not None for stage in told.stages for d in _of(stage, by).values())
    means = "share of the samples" + (", and how often each is seen" if known else "")
    total = known and len(told.stages) > 1
    out = _plain(f"By {by}: {means}", told, "in all" if total else None)
    for name in dict.fromkeys(name for stage in told.stages for name in _of(stage, by)):
        each = [_of(stage, by).get(name) for stage in told.stages]
        out.add_row(name, *map(_cell, each), *([_times(each)] if total else []))
    return out


def _cell(drawn: Drawn | None) -> str:
    if drawn is None:
        return ""
    share = f"{drawn.share:.1%}" if drawn.share < 0.9995 else "100%"
    return share if drawn.epochs is None else f"{share}\nx {_epochs(drawn.epochs)}"


def _times(each: Sequence[Drawn | None]) -> str:
    epochs = [d.epochs for d in each if d is not None]
    return "?" if any(e is None for e in epochs) else f"x {_epochs(sum(e or 0 for e in epochs))}"


def _epochs(value: float) -> str:
    return big(value) if value >= 100 else f"{value:.3g}"


def big(value: float) -> str:
    """A number in three digits: 3.76 B."""
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            digits = 2 if value < 9.995 * size else 1 if value < 99.95 * size else 0
            return f"{value / size:,.{digits}f} {name}"
    return f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """A time in its unit: 18.7 d."""
    if seconds is None:
        return "?"
    for size, name in ((86_400 * 2, "d"), (3600 * 2, "h"), (120, "min")):
        if seconds >= size:
            unit = {"d": 86_400, "h": 3600, "min": 60}[name]
            return f"{seconds / unit:,.{0 if seconds / unit >= 99.5 else 1}f} {name}"
    return f"{seconds:.2g} s"
