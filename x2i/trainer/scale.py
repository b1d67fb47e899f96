"""`scale: tiny`: any run file at a size that a CPU takes in a minute, to try it from its first stage to its last.

What stays as it is written: which stages there are, which parts learn in each, with which losses, rates, schedules and
mixture. What shrinks:

- the model: the -tiny preset of its architecture, from nothing (no weights, no pretrained parts, in no stage); of the numbers that
  the file changes those stay that say what kind the model is, and not how large
- the autoencoder: pixels; the tokenizer: trained on the corpora
- sizes: the largest of any stage becomes `SIDE` tokens, the others in proportion, at least two tokens
- a few steps and samples a stage, in float32 on the CPU; small previews and evaluations

Tasks (sources, corpora) of a mixture that the given corpora lack are left out, with a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from x2i import corpus
from x2i.base.config import parse_config
from x2i.base.errors import RecipeError, X2IError
from x2i.model import registry
from x2i.model.config import ModelConfig
from x2i.trainer.config import RunConfig
from x2i.trainer.stage import Stage

log = logging.getLogger(__name__)

#: Pixels of a token's side in the tiny presets with pixels of this factor; tokens of the largest picture's side.
TOKEN, FACTOR, SIDE = 8, 4, 8

#: Most of each in a stage.
STEPS, BATCH = 2, 4

#: Most tokens of a pack, of which a step then has one.
PACK = 2048

#: Words of the tokenizer.
WORDS = 512


def tiny(run: RunConfig) -> RunConfig:
    """The run, tiny.

    Raises:
        RecipeError: it adapts given weights (`lora`), its architecture has no tiny preset, or its corpora have nothing
            of what a stage draws.
    """
    if run.model.lora is not None:
        raise RecipeError("scale: tiny starts from nothing, and adapters need trained weights: leave `scale` out")
    config = _preset(run)
    largest = max(max(_sides(stage)) for stage in run.stages)
    content = run.model_dump(exclude_unset=True, exclude={"stages", "model", "vae", "tokenizer"})
    names = {stage.name for stage in run.stages}
    there = {by: _names(run, by) for by in {stage.mixture_by for stage in run.stages}}
    return parse_config(
        RunConfig,
        content
        | {
            "model": config[0] | {"changes": _kinds(run.model.changes)},
            "vae": {"kind": "pixels", "factor": FACTOR},
            "tokenizer": {"train": {"vocab_size": WORDS}},
            "stages": [_stage(s, names, largest, config[1], there[s.mixture_by]) for s in run.stages],
            "precision": "float32",
            "device": "cpu",
            "cpu_threads": run.cpu_threads or 1,
            "compute": run.compute.model_dump() | {"compile": False, "shards": None},
            "held_out_samples": 1,
            "wandb": None,
            "preview": run.preview.model_dump() | {"per_task": 1, "steps": 1, "answer_tokens": 4},
        },
        "scale: tiny",
    )


def _preset(run: RunConfig) -> tuple[dict[str, Any], ModelConfig]:
    """The tiny preset of the run's architecture, as the section `model` has it, and its numbers."""
    config = run.model.config(None)
    if config is None:
        raise RecipeError(
            "scale: tiny needs to know the architecture, which only the weights can tell: give model.preset"
        )
    for name, numbers in registry.presets().items():
        if numbers.architecture == config.architecture and name.endswith("-tiny"):
            return {"preset": name}, numbers
    raise RecipeError(f"scale: {config.architecture} has no preset whose name ends in -tiny")


def _kinds(changes: dict[str, Any]) -> dict[str, Any]:
    """The changes of a model's numbers that are no numbers: what kind it is."""
    kept = {k: _kinds(v) if isinstance(v, dict) else v for k, v in changes.items()}
    return {k: v for k, v in kept.items() if isinstance(v, bool | str) or (isinstance(v, dict) and v)}


def _sides(stage: Stage) -> list[int]:
    given = [stage.resolution, stage.chat_resolution or 0]
    return [*given, *(side for size in stage.buckets for side in size)]


def _stage(
    stage: Stage, stages: Collection[str], largest: int, config: ModelConfig, there: Collection[str] | None
) -> dict[str, Any]:
    """One stage, small."""

    def side(pixels: int) -> int:
        return TOKEN * max(round(SIDE * pixels / largest), 2)

    content = stage.model_dump(exclude_unset=True)
    content |= {
        "steps": min(stage.steps, STEPS),
        "warmup": min(stage.warmup, 1),
        "resolution": side(stage.resolution),
        "inputs": _at_most(stage.inputs, config.model_dump()),
    }
    if stage.start not in stages:  # weights, of a model of another size
        content["start"] = None
    if stage.batch is not None:
        content["batch"] = min(stage.batch, BATCH)
    if stage.micro_batch is not None:
        content["micro_batch"] = min(stage.micro_batch, BATCH)
    if stage.pack is not None:
        content["pack"] = {"tokens": min(stage.pack.tokens, PACK), "packs": 1}
    if stage.chat_resolution is not None:
        content["chat_resolution"] = side(stage.chat_resolution)
    if stage.buckets:
        content["buckets"] = list(dict.fromkeys((side(width), side(height)) for width, height in stage.buckets))
    if there is None:
        return content
    mixture = {name: weight for name, weight in stage.mixture.items() if name in there}
    if not mixture:
        raise RecipeError(
            f"scale: tiny: stage {stage.name} draws {', '.join(stage.mixture)}, and the corpora have none of it, but "
            f"{', '.join(sorted(there)) or 'nothing'}; --set stages.{stage.name}.mixture='{{…: 1}}' names something else"
        )
    if lacking := [name for name in stage.mixture if name not in mixture]:
        log.warning("scale: tiny: stage %s: left out, as the corpora lack it: %s", stage.name, ", ".join(lacking))
    if stage.edit_loss is not None and stage.edit_loss.tasks is not None and stage.mixture_by == "task":
        content["edit_loss"]["tasks"] = [task for task in stage.edit_loss.tasks if task in mixture]
    return content | {"mixture": mixture}


def _at_most(given: dict[str, Any], numbers: dict[str, Any]) -> dict[str, Any]:
    """What a stage changes of how the model reads, with no number above the tiny preset's."""
    out: dict[str, Any] = {}
    for name, value in given.items():
        own = numbers.get(name)
        if isinstance(value, dict) and isinstance(own, dict):
            out[name] = _at_most(value, own)
        elif isinstance(value, int) and not isinstance(value, bool) and isinstance(own, int):
            out[name] = min(value, own)
        else:
            out[name] = value
    return out


def _names(run: RunConfig, by: Any) -> set[str] | None:
    """The tasks (sources, corpora) that there are training samples of; None if a corpus cannot be opened: training says why."""
    from x2i.trainer.index import TRAIN
    from x2i.trainer.mixture import table_of

    try:
        table = table_of([corpus.open(path) for path in run.corpora], (), run.held_out)
    except X2IError:
        return None
    return {name for name, samples in table.samples(TRAIN, by).items() if len(samples)}
