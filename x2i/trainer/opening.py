"""What a session tells when it begins."""

from __future__ import annotations

from x2i.trainer.capacity import words
from x2i.trainer.config import RunConfig
from x2i.trainer.learner import Learner
from x2i.trainer.packing import PackPlan
from x2i.trainer.progress import Progress
from x2i.trainer.setup import Setup


def announce(run: RunConfig, setup: Setup, learner: Learner, step: int, progress: Progress) -> None:
    """Say at which step a run begins or goes on, what it trains, and what it leaves out."""
    parameters = sum(p.numel() for p in setup.model.parameters())
    training = sum(len(v) for v in setup.table.train.values())
    held = sum(len(v) for v in setup.table.held_out.values())
    where = f"goes on at step {step}" if step else "starts"
    progress.note(
        f"{run.output}: {where} on {setup.device}; {parameters / 1e6:.1f} million parameters, "
        f"{training} samples to train on, {held} held out"
    )
    if setup.table.apart:
        progress.note(f"{setup.table.apart} samples are on neither side: a held-out image is among their inputs")
    for path in setup.table.derived:
        progress.note(
            f"{path}: an earlier x2i built it: its images' digests are computed at each start; `x2i build` on its "
            "recipe writes them into the manifest"
        )
    for place, stage in enumerate(run.stages):
        trained = learner.what(place).count
        if trained < parameters:
            what = "adapters" if run.model.lora else ", ".join(stage.train or ())
            progress.note(f"stage {stage.name} trains {trained:,} of {parameters:,} parameters: {what}")
        if long := getattr(setup.plans[place], "too_long", None):
            assert stage.pack is not None
            shown = ", ".join(f"{count:,} of {task}" for task, count in long.items())
            progress.note(
                f"stage {stage.name} never draws samples that do not fit into a pack of {stage.pack.tokens:,} tokens: "
                f"{shown}"
            )
        if stage.pack and isinstance(plan := setup.plans[place], PackPlan):
            for told in filter(None, [words(stage.name, stage.pack.tokens, plan.fill, plan.better())]):
                progress.note(told)
    unused = sorted(set(setup.table.tasks) - setup.tasks)
    if unused:
        progress.note(f"tasks of the corpora that no stage trains: {', '.join(unused)}")
