"""Which stages a call is to train, from which step and from which weights: read off the checkpoints that are there.

A stage begins with the end of the one before, or with what its `start` names. It may be trained alone; then each
checkpoint remembers what it really began with (`begun` in trainer.json), so that a run that is trained stage by stage
ends with the same weights as one that is trained in one go, and nothing else passes for it.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from x2i.base.errors import RecipeError
from x2i.trainer import checkpoint
from x2i.trainer.checkpoint import Checkpoint
from x2i.trainer.config import RunConfig

#: What a stage begins with: the step of a checkpoint of this run, 0 for the run's own beginning, or weights by name.
Origin = int | str


@dataclass(frozen=True)
class Course:
    """What is to be done.

    Attributes:
        places: the stages to train, in order; none if all is done.
        step: of the run, at which the first of them begins or goes on.
        newest: the checkpoint whose weights are at hand then; None: those of the run's own beginning.
        origins: what each of these stages begins with, or has begun with.
        ahead: whether there are checkpoints of later steps.
    """

    places: tuple[int, ...]
    step: int
    newest: Checkpoint | None
    origins: dict[int, Origin]
    ahead: bool = False


def plot(run: RunConfig, found: Sequence[Checkpoint], stage: str | None = None) -> Course:
    """What is to be done, with these checkpoints at hand.

    Args:
        run: the run file.
        found: the run's checkpoints.
        stage: the name of the only stage to train; default: all.

    Raises:
        RecipeError: there is no such stage, or a stage was trained alone from other weights than it would begin with.
    """
    at = {c.step: c for c in found}
    chosen = range(len(run.stages)) if stage is None else [place_of(run, stage)]
    origins = {place: run.origin(place) for place in chosen}
    for place, origin in origins.items():
        if stage is not None and isinstance(origin, int) and origin not in at:
            origins[place] = 0  # alone, and what it follows is not there
    due = []
    for place in chosen:
        mine = [c for c in found if run.first(place) < c.step <= run.end(place)]
        if mine:
            origins[place] = _agreed(run, place, mine[-1], origins[place])
        if run.end(place) not in at:
            due.append((place, mine))
    if not due:
        return Course((), run.end(chosen[-1]), at.get(run.end(chosen[-1])), origins)
    place, mine = due[0]
    origin = origins[place]
    begun = mine[-1] if mine else at.get(origin) if isinstance(origin, int) else _any(found)
    step = mine[-1].step if mine else run.first(place)
    return Course(tuple(p for p, _ in due), step, begun, origins, any(c.step > step for c in found))


def place_of(run: RunConfig, name: str) -> int:
    """The place of a stage. Raises RecipeError."""
    names = [stage.name for stage in run.stages]
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"the run has {', '.join(names)}"
        raise RecipeError(f"--stage {name}: no such stage; {hint}")
    return names.index(name)


def _any(found: Sequence[Checkpoint]) -> Checkpoint | None:
    """For weights from elsewhere: whatever is there has the tokenizer."""
    return found[-1] if found else None


def _agreed(run: RunConfig, place: int, newest: Checkpoint, origin: Origin) -> Origin:
    """What a stage under way has begun with. Raises RecipeError if that is not what it would begin with now."""
    with checkpoint.resuming(newest.path):
        begun: Origin = newest.info.get("begun", run.origin(place))
    if begun in (origin, run.origin(place)) or (isinstance(begun, str) and isinstance(origin, str)):
        return begun
    stage = run.stages[place].name
    raise RecipeError(
        f"{newest.path}: stage {stage} was trained alone, from {told(run, begun)}, and would now begin with "
        f"{told(run, origin)}: remove the checkpoints of its steps {run.first(place) + 1} to {run.end(place)} to train it "
        "again, or give another `output`"
    )


def told(run: RunConfig, origin: Origin) -> str:
    """An origin in words."""
    if isinstance(origin, str):
        return origin
    if not origin:
        return f"the weights {run.model.weights}" if run.model.weights else "fresh weights"
    return f"the end of stage {run.stages[run.locate(origin - 1)[0]].name} (step {origin})"
