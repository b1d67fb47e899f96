"""A stage of a run file: what learns from which samples, for how long, how fast, by which losses."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from x2i.base.config import Config
from x2i.model.lora_config import LoRAConfig


class EditLoss(Config):
    """How the velocity's error is weighted by where a picture differs from its source (`x2i.trainer.losses`)."""

    kind: Literal["paper", "local", "released", "kept"] = Field(
        description="paper: OmniGen's formula, 1 where the latents are equal, 1 / |difference|^2 of the whole picture "
        "elsewhere; local: the same with the difference of each place; released: the heuristic of its code; kept: "
        "`kept` where the latents are equal, 1 elsewhere"
    )
    kept: float = Field(4.0, gt=0, description="of kind kept: weight of what an edit must leave alone")
    tasks: tuple[str, ...] | None = Field(
        None, description="tasks whose first input image is the source; default: all samples with one input image"
    )


class Preference(Config):
    """Direct preference optimisation: samples whose answer was preferred to another, `rejected_response`."""

    beta: float = Field(0.1, gt=0, description="how far the model may move from what it was when the stage began")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of preferences taken to be wrong")


class Pack(Config):
    """Sequences of several samples each, as full as they can be (`x2i.trainer.packing`)."""

    tokens: int = Field(ge=64, description="budget of one pack: text, pictures and marks of all its samples")
    packs: int = Field(1, gt=0, description="packs per step, over all devices")
    count: int = Field(
        100_000,
        ge=0,
        description="a stage that draws from at most so many samples counts their texts with the run's tokenizer before "
        "the first step (once; they are kept in the run's folder); of more they are estimated from the manifest, and "
        "packs are left a little emptier for that",
    )


class PartTraining(Config):
    """How a stage trains one part of the model. A number alone is its `lr`."""

    lr: float | None = Field(
        None, gt=0, description="learning rate of this part after the warm-up; default: the stage's"
    )
    lora: LoRAConfig | None = Field(
        None, description="train adapters on the part's layers, merged into them at the stage's end; the part is frozen"
    )

    @model_validator(mode="before")
    @classmethod
    def _rate(cls, value: Any) -> Any:
        if value is None:
            return {}
        return {"lr": value} if isinstance(value, int | float | str) else value


Momentum = Annotated[float, Field(ge=0, lt=1)]
Temperature = Annotated[float, Field(gt=0)]


class Stage(Config):
    """One stage: which tasks in what mixture, at what resolution, how long, how fast."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$", description="unique name; it seeds the stage's order and noise")
    resolution: int = Field(
        gt=0,
        description="side of the square crop in pixels, a multiple of a token's side",
    )
    buckets: tuple[tuple[int, int], ...] = Field(
        (),
        description="[width, height] in pixels: pictures are cut to the one of the nearest aspect, and those of one step "
        "share one (in packs several stand side by side). Default: squares of `resolution`, which evaluation and previews use in any case",
    )
    chat_resolution: int | None = Field(
        None,
        gt=0,
        description="conversations show their pictures whole, scaled down to this shorter side; default: `resolution`",
    )
    start: str | None = Field(
        None,
        description="what it begins with: the end of an earlier stage, by name, or weights (a checkpoint, a run's output, a "
        "hub id, a .safetensors file). Default: the end of the stage before",
    )
    steps: int = Field(gt=0, description="optimiser steps")
    batch: int | None = Field(None, gt=0, description="samples per step, over all devices; or give `pack`")
    pack: Pack | None = Field(
        None, description="in place of `batch`: a step is so many packs of so many tokens; samples differ in number"
    )
    micro_batch: int | None = Field(
        None,
        gt=0,
        description="samples that a device computes at once; the rest of its share of `batch` is accumulated. Default: all",
    )
    lr: float = Field(
        gt=0,
        description="learning rate after the warm-up; default: the highest, if all parts in `train` have their own",
    )
    warmup: int = Field(0, ge=0, description="steps over which the learning rates rise from 0")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="what the learning rate does after the warm-up; the last two end at 0"
    )
    mixture: dict[str, float] = Field(
        description="weight of each task_type (or source, or corpus: `mixture_by`); what is not named is not trained"
    )
    mixture_by: Literal["task", "source", "corpus"] = Field(
        "task",
        description="what `mixture` names; a corpus is called by its recipe's name, or its path where two have the same",
    )
    mixture_unit: Literal["samples", "tokens"] = Field(
        "samples",
        description="what the weights are shares of; tokens are estimated from the manifest (`x2i.trainer.lengths`)",
    )
    min_crop: float = Field(
        1.0,
        gt=0,
        le=1,
        description="samples with input images are cut at random places: the crop's side as a share of the shorter "
        "side, from this to 1. At 1, and without input images, around the centre",
    )
    t_mean: float = Field(0.0, description="timesteps are sigmoid(normal(t_mean, t_std)); below 0: more noise")
    t_std: float = Field(1.0, gt=0, description="spread of the timesteps")
    condition_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of the pictures drawn without instruction and input images"
    )
    train: dict[str, PartTraining] | None = Field(
        None,
        description="parts of the model that learn, as [refiner, decoder], or with learning rates of their own, as "
        "{adapter: 1e-3, llm: 1e-5}, or by adapters, as {llm: {lora: {rank: 16}}}; the others are frozen. Default: all",
    )
    edit_loss: EditLoss | None = Field(None, description="weight the velocity's error by what an edit changes")
    answer_weight: float = Field(
        1.0, gt=0, description="weight of a conversation's next-token loss beside a picture's velocity loss"
    )
    plain_captions: bool = Field(
        False, description="conversations are learned without the chat's template: picture, then answer"
    )
    inputs: dict[str, Any] = Field(
        {}, description="numbers of the model that say how it reads, changed for this stage, as {tiles: {single: 4}}"
    )
    tau: tuple[Temperature, Temperature] | None = Field(
        None, description="temperature of a visual tokenizer's Gumbel softmax, from the first step to the last"
    )
    preference: Preference | None = Field(
        None, description="learn from preferred and rejected answers (DPO); a pack holds both of a sample"
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of the averaged weights in this stage, of a run with `ema`; default: the run's",
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decay")
    betas: tuple[Momentum, Momentum] = Field((0.9, 0.999), description="AdamW's momenta")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")

    def side(self, chat: bool) -> int:
        """Side in pixels of a picture to draw, or shorter side of one that a conversation shows."""
        return self.chat_resolution or self.resolution if chat else self.resolution

    @field_validator("buckets")
    @classmethod
    def _sizes(cls, value: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        if len(set(value)) < len(value) or any(side < 1 for size in value for side in size):
            raise ValueError("give different sizes, each [width, height] above 0")
        return value

    @field_validator("mixture")
    @classmethod
    def _positive(cls, value: dict[str, float]) -> dict[str, float]:
        if not value or min(value.values()) <= 0:
            raise ValueError("name at least one of them, each with a weight above 0")
        return value

    @model_validator(mode="before")
    @classmethod
    def _highest(cls, value: Any) -> Any:
        """The stage's own rate, where only its parts have one."""
        if not isinstance(value, dict) or "lr" in value or not isinstance(value.get("train"), dict):
            return value
        rates: list[Any] = [part.get("lr") if isinstance(part, dict) else part for part in value["train"].values()]
        known = []
        for rate in rates:
            with contextlib.suppress(TypeError, ValueError):  # YAML reads 1e-3 as a word
                known.append(float(rate))
        return value | {"lr": max(known)} if known and len(known) == len(rates) else value

    @field_validator("train", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """A list of names: all at the stage's rate."""
        return {name: {} for name in value} if isinstance(value, list | tuple) else value

    @field_validator("train")
    @classmethod
    def _some(cls, value: dict[str, PartTraining] | None) -> dict[str, PartTraining] | None:
        if value == {}:
            raise ValueError("a stage that trains nothing: name a part, or leave the key out to train all")
        return value

    @model_validator(mode="after")
    def _one_size(self) -> Stage:
        if (self.batch is None) == (self.pack is None):
            raise ValueError("give either batch (samples per step) or pack: {tokens: …, packs: …}")
        if self.pack is not None and self.micro_batch is not None:
            raise ValueError("micro_batch: packs are computed one by one: leave it out")
        return self

    @model_validator(mode="after")
    def _edits(self) -> Stage:
        named = (self.edit_loss.tasks if self.edit_loss else None) or ()
        if self.mixture_by == "task" and (unknown := [task for task in named if task not in self.mixture]):
            raise ValueError(
                f"edit_loss.tasks: {unknown[0]!r} is not in the mixture, which has {', '.join(self.mixture)}"
            )
        return self
