"""The run file: one YAML with the model, the corpora and the stages. Paths are relative to the current folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from x2i.base.config import Config, change, load_yaml, parse_config
from x2i.base.errors import RecipeError
from x2i.base.seeds import digest
from x2i.model import registry
from x2i.model.config import ModelConfig, VAEConfig
from x2i.model.lora_config import LoRAConfig
from x2i.trainer.stage import Stage


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


class Shuffle(Config):
    """How samples are mixed. Small blocks and a wide window mix best; large blocks are read in few, large pieces."""

    block: int = Field(
        64,
        gt=0,
        description="samples that lie beside one another and are drawn soon after one another; 1: each by itself",
    )
    window: int = Field(
        16_384, gt=0, description="draws within which the samples of a block come, one at a time and evenly spaced"
    )


class Reading(Config):
    """How samples are read. Nothing here changes what is read."""

    threads: int = Field(4, gt=0, description="threads that read and decode")
    prefetch: int = Field(4, gt=0, description="steps read ahead")
    prefetch_mib: int = Field(
        512, gt=0, description="most memory for what is read ahead, as it is stored and decoded; one step may have more"
    )
    join_samples: int = Field(
        4096, ge=0, description="how many samples ahead to look for neighbours of one that is read, to be read with it"
    )
    join_gap_kib: int = Field(256, ge=0, description="between two of them at most so much is read and thrown away")
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
    shuffle: Shuffle = Field(default_factory=Shuffle, description="how far samples that lie together are scattered")
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
        if self.ema is None and (own := [s.name for s in self.stages if s.ema is not None]):
            raise ValueError(f"stages.{own[0]}.ema: the run keeps no averaged weights: give the run an `ema`, too")
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
