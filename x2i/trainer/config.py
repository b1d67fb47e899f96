"""The run file: one YAML with the model, the corpora and the stages. Paths are relative to the current folder."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from x2i.base.config import Config, change, load_yaml, parse_config
from x2i.base.errors import RecipeError
from x2i.base.seeds import digest
from x2i.model import registry
from x2i.model.config import ModelConfig, VAEConfig
from x2i.model.lora_config import LoRAConfig


class ModelSpec(Config):
    """A preset, and what of it to change. What the vae and the tokenizer decide is not given here."""

    preset: str | None = Field(
        None, description="name of a model's published or small numbers; default: those of `weights`, or omnigen-tiny"
    )
    changes: dict[str, Any] = Field(
        {}, description="numbers of the preset to replace, as hidden_size; they may also stand beside `preset`"
    )
    weights: str | None = Field(
        None, description="start from these: a checkpoint, a run's output (its newest), a hub id or a .safetensors file"
    )
    pretrained: dict[str, str] = Field(
        {}, description="start parts of a fresh model from other models' weights, as {llm: Qwen/Qwen3-1.7B}"
    )
    lora: LoRAConfig | None = Field(
        None, description="train low-rank adapters beside frozen weights, and write the adapters only"
    )

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: Any) -> Any:
        """Whatever is no key of this section is a number of the preset."""
        if not isinstance(value, dict):
            return value
        own = {k: v for k, v in value.items() if k in cls.model_fields}
        rest = {k: v for k, v in value.items() if k not in cls.model_fields}
        return own | {"changes": own.get("changes", {}) | rest} if rest else own

    @model_validator(mode="after")
    def _check(self) -> ModelSpec:
        try:
            self.config(None)
        except RecipeError as error:
            raise ValueError(str(error).removeprefix("model: ")) from None
        if self.lora is not None and self.weights is None:
            raise ValueError("lora: adapters change a trained model: give its `weights`")
        if self.pretrained and self.weights is not None:
            raise ValueError("pretrained: parts are read into a fresh model, and `weights` holds them all: give one")
        return self

    def config(self, of_weights: ModelConfig | None) -> ModelConfig | None:
        """The preset's numbers, or those that lie beside the weights, with the changes. Raises RecipeError.

        None if only the weights can tell, and they are not given.
        """
        if self.preset is None and self.weights is not None:
            return None if of_weights is None else registry.changed(of_weights, self.changes)
        return registry.changed(registry.preset(self.preset or "omnigen-tiny"), self.changes)


class TokenizerTraining(Config):
    """A byte-level BPE trained on the corpus's own instructions; it is kept with every checkpoint."""

    vocab_size: int = Field(1024, ge=300, description="tokens, the 256 bytes and the special ones included")
    samples: int = Field(20_000, gt=0, description="instructions to read, evenly spaced over the corpus")


class TokenizerSpec(Config):
    """Where the tokenizer comes from: exactly one of the two keys."""

    path: str | None = Field(None, description="a hub id, a folder or a file: tokenizer.json of the tokenizers library")
    train: TokenizerTraining | None = Field(None, description="train one on the instructions")

    @model_validator(mode="after")
    def _one(self) -> TokenizerSpec:
        if (self.path is None) == (self.train is None):
            raise ValueError("give either path (a hub id or a folder) or train (vocab_size: …)")
        return self


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
    preference: Preference | None = Field(None, description="learn from preferred and rejected answers (DPO)")
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


class PreviewPrompt(Config):
    """A picture to draw at every checkpoint, besides those of the corpus."""

    instruction: str = Field(description="with placeholders for its images, or without: then they come first")
    images: tuple[Path, ...] = Field((), description="files of the input images")


class Preview(Config):
    """What is drawn at a checkpoint: for each task a held-out sample and one from training, and own prompts."""

    per_task: int = Field(2, ge=0, description="samples per task; the first is held out where there is one")
    prompts: tuple[PreviewPrompt, ...] = Field((), description="prompts of one's own")
    steps: int = Field(20, gt=0, description="Euler steps")
    guidance: float = Field(1.0, gt=0, description="weight of the text; 1 is none")
    image_guidance: float = Field(1.0, gt=0, description="weight of the input images; 1 is none")
    seed: int = Field(0, ge=0, description="of the noise")
    answer_tokens: int = Field(48, gt=0, description="longest answer to a conversation")


#: How JPEGs are decoded (`x2i.trainer.decode`).
Decode = Literal["full", "reduced"]


class Reading(Config):
    """How samples are read. Nothing here changes what is read."""

    threads: int = Field(4, gt=0, description="threads that read and decode")
    prefetch: int = Field(4, gt=0, description="steps read ahead")
    prefetch_mib: int = Field(
        512, gt=0, description="most memory for what is read ahead, as it is stored and decoded; one step may have more"
    )
    join_steps: int = Field(
        16, ge=0, description="samples due in so many steps more that lie beside one that is read are read with it"
    )
    join_gap_kib: int = Field(64, ge=0, description="between two of them at most so much is read and thrown away")
    join_mib: int = Field(8, ge=0, description="largest joined read; 0: each sample by itself")
    in_flight: int = Field(16, gt=0, description="reads of a URL's shards at a time")
    open_files: int = Field(128, gt=0, description="local shards that are kept open")
    verify: bool = Field(True, description="hold each sample's bytes against the manifest's SHA-256")
    cache_mib: int = Field(256, ge=0, description="memory for decoded crops, least recently used out first")


class WandB(Config):
    """Where Weights & Biases shows the run. It needs the library wandb: `pip install 'x2i[wandb]'`."""

    project: str = Field(min_length=1, description="the project's name")
    name: str | None = Field(None, description="the run's name there; default: that of the output folder")
    entity: str | None = Field(None, description="the team or user; default: the one that is logged in")
    mode: Literal["online", "offline"] = Field(
        "online", description="offline: write to the run's logs alone; `wandb sync` sends it later"
    )


class Compute(Config):
    """How the model is computed, on one device or many. Nothing here changes what is computed, but for rounding."""

    compile: bool = Field(False, description="compile the model's repeated blocks (torch.compile)")
    checkpointing: bool = Field(
        False, description="keep no activations within a block, compute them again in the backward pass: less memory"
    )
    shards: int | None = Field(
        None,
        gt=0,
        description="ranks over which the weights are divided (FSDP2); default: all. Fewer: replicas of so many",
    )
    timeout_minutes: float = Field(30, gt=0, description="how long a rank waits for another before it gives up")


class RunConfig(Config):
    """A training run."""

    corpora: tuple[str, ...] = Field(min_length=1, description="folders or URLs of corpora")
    output: Path = Field(description="folder of checkpoints and logs")
    model: ModelSpec = Field(default_factory=ModelSpec, description="a preset's name, or a preset and changes to it")
    vae: VAEConfig | None = Field(
        None,
        description="pixels to latents; default: that of the weights, or pixels. Models that draw nothing do without",
    )
    tokenizer: TokenizerSpec | None = Field(None, description="text to tokens; default: the one beside the weights")
    max_text_tokens: int | None = Field(
        None, gt=16, description="longer instructions and conversations are cut; null: no limit"
    )
    stages: tuple[Stage, ...] = Field(min_length=1, description="what follows what")
    held_out: float = Field(0.05, ge=0, lt=1, description="share of images (by id) kept for evaluation only")
    seed: int = Field(0, ge=0, description="of initial weights, order, noise")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the averaged weights that are drawn with")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the forward and backward pass")
    scale: Literal["full", "tiny"] = Field(
        "full",
        description="tiny: the same stages at a size that a CPU takes in a minute, to try a run file (`x2i.trainer.scale`)",
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …")
    cpu_threads: int | None = Field(
        None,
        gt=0,
        description="threads of the computation on a CPU; default: PyTorch's, one per core. One is faster for small "
        "models where other processes share the cores",
    )
    checkpoint_every: int = Field(1000, gt=0, description="steps; stages and the run end with one besides")
    keep: int = Field(3, gt=0, description="newest checkpoints kept; the ends of stages are always kept")
    held_out_samples: int = Field(16, gt=0, description="held-out samples per task in the evaluation")
    preview: Preview = Field(default_factory=Preview, description="pictures drawn at a checkpoint")
    decode: Decode = Field(
        "reduced",
        description="reduced: JPEGs are decoded at 1/2, 1/4 or 1/8 where that suffices, and scaled by a faster filter; "
        "full: every pixel is decoded, by Pillow",
    )
    reading: Reading = Field(default_factory=Reading, description="threads and memory")
    compute: Compute = Field(default_factory=Compute, description="ranks, compilation, memory of activations")
    wandb: WandB | None = Field(None, description="tell Weights & Biases what TensorBoard is told, as {project: x2i}")

    @field_validator("model", mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        return {"preset": value} if isinstance(value, str) else value

    @field_validator("tokenizer", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _unique(self) -> RunConfig:
        if self.tokenizer is None and self.model.weights is None:
            raise ValueError(
                "tokenizer: give its path, or train: {vocab_size: …}; there are no weights to take it from"
            )
        if self.tokenizer is not None and self.tokenizer.train is not None and self.model.weights is not None:
            raise ValueError(
                "tokenizer: the weights know the words of their own tokenizer, and one that is trained anew gives "
                "other words the same numbers: leave the key out, or leave out model.weights"
            )
        names = [s.name for s in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"two stages have the same name: {', '.join(names)}")
        for place, stage in enumerate(self.stages):
            if stage.start in names[place:]:
                known = ", ".join(names[:place]) or "none"
                raise ValueError(f"stages.{place}.start: {stage.start!r} is no earlier stage; those are: {known}")
            if self.model.lora is not None and any(part.lora for part in (stage.train or {}).values()):
                raise ValueError(
                    f"stages.{place}.train: with model.lora adapters are all that learns: give one of them"
                )
            if stage.start is not None and stage.start not in names and self.model.lora is not None:
                raise ValueError(f"stages.{place}.start: with model.lora a stage begins with the end of an earlier one")
        return self

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return sum(s.steps for s in self.stages)

    def first(self, place: int) -> int:
        """Steps before a stage."""
        return sum(s.steps for s in self.stages[:place])

    def end(self, place: int) -> int:
        """Steps up to the end of a stage: the name of its last checkpoint."""
        return self.first(place) + self.stages[place].steps

    def origin(self, place: int) -> int | str:
        """What a stage begins with: the step of a checkpoint of this run (0: its own beginning), or weights by name."""
        start = self.stages[place].start
        if start is None:
            return self.first(place)
        names = [s.name for s in self.stages]
        return self.end(names.index(start)) if start in names else start

    def locate(self, step: int) -> tuple[int, int]:
        """Stage (its place in `stages`) and step within it of a global step, all from 0."""
        for place, stage in enumerate(self.stages):
            if step < stage.steps:
                return place, step
            step -= stage.steps
        return len(self.stages), 0

    def identity(self) -> dict[str, Any]:
        """What decides the weights. A run whose identity changed cannot go on from its checkpoints."""
        everything = self.model_dump(mode="json")
        for name in (
            "output",
            "device",
            "checkpoint_every",
            "keep",
            "held_out_samples",
            "preview",
            "reading",
            "compute",
            "wandb",
            "corpora",
        ):
            del everything[name]
        for stage in everything["stages"]:
            del stage["micro_batch"]
        return everything

    @property
    def digest(self) -> str:
        """Digest of `identity`."""
        return digest("run/1", self.identity())


def load_run(path: str | Path, changes: Sequence[str] = ()) -> RunConfig:
    """Read a run file, as it is to run: at the size that its `scale` says.

    Args:
        path: the file.
        changes: keys to set, as `stages.high.steps=10`; a stage is called by its name or its number.

    Raises:
        RecipeError: with file, key and remedy.
    """
    content = load_yaml(path)
    if changes:
        content = change(_spread(content), changes, str(path))
    run = parse_config(RunConfig, content, str(path))
    if run.scale == "full":
        return run
    from x2i.trainer.scale import tiny

    return tiny(run)


def _spread(content: Any) -> Any:
    """The content with its short forms written out, so that keys within them can be set."""
    forms = {"model": "preset", "tokenizer": "path"}
    if not isinstance(content, dict):
        return content
    return {k: {forms[k]: v} if k in forms and isinstance(v, str) else v for k, v in content.items()}
