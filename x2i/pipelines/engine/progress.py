"""How long-running work tells of itself: the engine reports, the CLI draws."""

from __future__ import annotations

import logging
from typing import Protocol

log = logging.getLogger(__name__)


class Progress(Protocol):
    """Receives what a build does. Every method may be called from the driver's thread only."""

    def start(self, stage: str, total: int, unit: str) -> None:
        """A stage of `total` things (`unit` names them) begins; it ends with the next stage or `finish`."""

    def advance(self, by: int = 1) -> None:
        """So many things of the current stage are done."""

    def note(self, text: str) -> None:
        """A line that stays on the screen."""

    def finish(self) -> None:
        """The current stage is over."""


class Quiet:
    """Draws nothing; notes go to the log."""

    def start(self, stage: str, total: int, unit: str) -> None:
        log.info("%s: %d %s", stage, total, unit)

    def advance(self, by: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        log.info(text)

    def finish(self) -> None:
        pass
