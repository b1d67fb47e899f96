"""How a run tells what it does: an interface, a silent one, and a bar for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console


#: Columns of a terminal that has room for the losses of tasks.
_WIDE = 140


class Progress(Protocol):
    """What `train` calls while it works."""

    def start(self, total: int, done: int) -> None:
        """The run begins, or goes on after `done` of `total` steps."""

    def step(self, stage: str, done: int, loss: float, by_task: dict[str, float]) -> None:
        """A step is done: `done` steps of all; smoothed losses."""

    def speed(self, text: str) -> None:
        """How fast the last steps were."""

    def note(self, message: str) -> None:
        """Something that a person would like to know."""

    def close(self) -> None:
        """No more calls follow."""


class Silent:
    """Says nothing."""

    def start(self, total: int, done: int) -> None: ...

    def step(self, stage: str, done: int, loss: float, by_task: dict[str, float]) -> None: ...

    def speed(self, text: str) -> None: ...

    def note(self, message: str) -> None: ...

    def close(self) -> None: ...


class Bar:
    """A progress bar with the losses, for a terminal; notes appear above it."""

    def __init__(self, console: Console | None = None) -> None:
        from rich import progress
        from rich.console import Console

        self._console = console or Console(stderr=True)
        self._bar = progress.Progress(
            progress.TextColumn("[bold]{task.description}"),
            progress.BarColumn(bar_width=24 if self._console.width >= _WIDE else 8),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[losses]}"),
            progress.TextColumn("[dim]{task.fields[speed]}"),
            progress.TimeRemainingColumn(),
            console=self._console,
        )
        self._task: progress.TaskID | None = None

    def start(self, total: int, done: int) -> None:
        self._task = self._bar.add_task("training", total=total, completed=done, losses="", speed="")
        self._bar.start()

    def step(self, stage: str, done: int, loss: float, by_task: dict[str, float]) -> None:
        if self._task is not None:
            worst = sorted(by_task.items(), key=lambda item: -item[1])[:2]
            tasks = "".join(f"  {task} {value:.2f}" for task, value in worst)
            shown = f"loss {loss:.3f}" + (tasks if self._console.width >= _WIDE else "")
            self._bar.update(self._task, completed=done, description=f"stage {stage}", losses=shown)

    def speed(self, text: str) -> None:
        if self._task is not None:
            self._bar.update(self._task, speed=text)

    def note(self, message: str) -> None:
        self._console.print(message, highlight=False, markup=False)

    def close(self) -> None:
        self._bar.stop()
