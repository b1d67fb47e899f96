"""What a run would do, and what it would cost: `x2i train RUN --explain`. Nothing is trained, and no weights are read.

The model is built on the meta device. Samples and their lengths come from the corpora's manifests; where corpora are
not there, a stage's samples are assumed to be alike, and what that means is said (`x2i.trainer.told.Explained.notes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from x2i import corpus
from x2i.base.errors import RecipeError, X2IError
from x2i.base.seeds import generator
from x2i.model import registry
from x2i.model.base import Model
from x2i.model.config import ModelConfig, ModelFile, PixelsConfig, VAEConfig
from x2i.model.lora_config import LoRAConfig
from x2i.trainer import checkpoint, parts
from x2i.trainer.capacity import FULL, words
from x2i.trainer.config import RunConfig
from x2i.trainer.counting import latents_of
from x2i.trainer.flops import StageFlops, on_meta
from x2i.trainer.mixture import table_of
from x2i.trainer.parts import Trained
from x2i.trainer.peak import known_names
from x2i.trainer.samples import Mean, Shapes, Stratum, assumed, lot_of, of_manifest
from x2i.trainer.stage import Stage
from x2i.trainer.table import SampleTable
from x2i.trainer.told import Devices, Drawn, Explained, Memory, StageTold

#: Tokens of the vocabularies that the manifest's estimate of texts stands for (`x2i.corpus.text`), at least.
_WORDS = 16_000


def explain(run: RunConfig, devices: Devices | None = None) -> Explained:
    """What a run would do.

    Args:
        run: its file. Its output need not exist, and its weights are not read.
        devices: to estimate time and memory for; default: eight H100 at 45 % of their peak.

    Raises:
        RecipeError: the run asks for parts that the model lacks, or only weights that are not here say which model it is.
    """
    devices, notes = devices or Devices(), list[str]()
    if devices.flops is None:
        notes.append(f"no time: the peak of {devices.name!r} is not known; those of {', '.join(known_names())} are")
    beside = _beside(run.model.weights)
    config = _numbers(run, beside)
    vae = run.vae or (beside.vae if beside else None) or (None if run.model.weights else PixelsConfig())
    model = on_meta(config, run.model.lora)
    shrink, table = _shrink(vae, notes) if model.draws else 1, _table(run, notes)
    words = None if run.tokenizer is None or run.tokenizer.train is None else run.tokenizer.train.vocab_size
    if words is not None and words < _WORDS:
        notes.append(
            f"texts are counted in tokens of vocabularies of {_WORDS:,} and more: those of the run's {words:,} are shorter, "
            "so there are more of them (of 300 words, more than twice as many)"
        )
    strata = []
    for place, stage in enumerate(run.stages):
        reading = registry.read_as(config, stage.inputs, f"stages.{place}.inputs")
        shapes = Shapes(reading, shrink, run.max_text_tokens)
        found = assumed(stage, shapes, model, notes) if table is None else of_manifest(table, stage, shapes, notes)
        if not found:
            raise RecipeError(f"stages.{stage.name}.mixture: the corpora have no training samples of any of it")
        strata.append(found)
    trained = [parts.trained(model, s, f"stages.{i}") for i, s in enumerate(run.stages)]
    ever = frozenset[str]().union(*(t.changed for t in trained))
    known: dict[tuple[frozenset[str], bool, tuple[LoRAConfig, ...]], StageFlops] = {}
    told = []
    dtype = torch.bfloat16 if run.precision == "bfloat16" else torch.float32
    for stage, what, found in zip(run.stages, trained, strata, strict=True):
        key = what.names, stage.preference is not None, tuple(what.adapted.values())
        if key not in known:
            known[key] = StageFlops(
                *(config, what.names), lora=run.model.lora, adapted=what.adapted, preference=key[1], dtype=dtype
            )
        fill = 1.0 if stage.pack is None else _fill(stage, found, table is not None, notes)
        told.append(_stage(run, stage, model, what, ever, found, known[key], devices, fill))
    how = "with" if run.compute.checkpointing else "without"
    notes.append(
        "activations: of what a device computes at once, a pack or `micro_batch` samples (default: all of its share of a "
        f"step), {how} checkpointing (`compute`); estimated"
    )
    if not isinstance(vae, PixelsConfig) and model.draws:
        notes.append("FLOPs and memory are those of the model; the frozen autoencoder's encoding comes on top")
    parameters = sum(p.numel() for p in model.parameters())
    return Explained(run.model.preset or config.architecture, parameters, devices, told, list(dict.fromkeys(notes)))


def _stage(
    run: RunConfig,
    stage: Stage,
    model: Model[Any],
    what: Trained,
    ever: frozenset[str],
    strata: Sequence[Stratum],
    flops: StageFlops,
    devices: Devices,
    fill: float,
) -> StageTold:
    mean = Mean.of(strata, flops)
    batch, at_once = _batch(stage, mean, devices.count, fill)
    ranks = min(run.compute.shards or devices.count, devices.count)
    width = 2 if run.precision == "bfloat16" else 4
    samples = stage.steps * batch
    needed = samples * mean.flops
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    count, ever_trained = sum(sizes.values()), sum(sizes[n] for n in ever)
    trained = what.count
    for layer, config in what.adapted.items():
        outputs, inputs = model.get_parameter(f"{layer}.weight").shape
        sizes |= {f"{layer}.lora_A.weight": config.rank * inputs, f"{layer}.lora_B.weight": config.rank * outputs}
        count += config.rank * (inputs + outputs)
    names = {p: [n for n in what.names if n.startswith(tuple(model.parts[p]))] for p in stage.train or model.parts}
    return StageTold(
        name=stage.name,
        trains={
            p: sum(sizes[n] for n in inside) for p, inside in names.items() if inside and (stage.train or p != "all")
        },
        trained=trained,
        resolution=", ".join(f"{w}x{h}" for w, h in stage.buckets) or str(stage.resolution),
        steps=stage.steps,
        batch=batch,
        samples=samples,
        images=samples * mean.images,
        tokens=samples * mean.tokens,
        tasks=_drawn(strata, "task", samples),
        corpora=_drawn(strata, "corpus", samples),
        flops=needed,
        seconds=None if devices.flops is None else needed / devices.flops,
        memory=Memory(
            ranks=ranks,
            weights=4 * count / ranks,
            gradients=4 * trained / ranks,
            optimiser=8 * trained / ranks,
            averaged=4 * ever_trained / ranks if run.ema else 0.0,
            reference=4 * count / ranks if stage.preference else 0.0,
            gathered=2 * _largest(model) * width if ranks > 1 else 0.0,
            activations=at_once * (_recomputed(model, mean, width) if run.compute.checkpointing else mean.kept),
        ),
    )


def _fill(stage: Stage, strata: Sequence[Stratum], known: bool, notes: list[str]) -> float:
    """How full a stage's packs become, without a margin for texts; where it is little, it is noted."""
    assert stage.pack is not None
    if not known:
        return FULL
    lot, random = lot_of(strata), generator("explain/packs/1", stage.name)
    fill = lot.fill(stage.pack.tokens, random)
    if not fill:
        notes.append(f"stage {stage.name}: no sample fits into packs of {stage.pack.tokens:,} tokens")
        return FULL
    if told := words(stage.name, stage.pack.tokens, fill, lot.better(stage.pack.tokens, random)):
        notes.append(told)
    return fill


def _batch(stage: Stage, mean: Mean, devices: int, fill: float) -> tuple[float, float]:
    """Samples of a step, and those that one device computes at once."""
    if stage.pack is not None:
        one = stage.pack.tokens * fill / mean.tokens
        return stage.pack.packs * one, one
    assert stage.batch is not None
    share = stage.batch / devices
    return float(stage.batch), max(min(stage.micro_batch or share, share), 1.0)


def _drawn(strata: Sequence[Stratum], by: str, samples: float) -> dict[str, Drawn]:
    """What a stage draws of each task or corpus."""
    out: dict[str, Drawn] = {}
    for name in dict.fromkeys(getattr(s, by) for s in strata):
        if name is None:
            continue
        own = [s for s in strata if getattr(s, by) == name]
        share = sum(s.share for s in own)
        there = None if any(s.there is None for s in own) else sum(s.there or 0 for s in own)
        epochs = samples * share / there if there else None
        out[name] = Drawn(share, samples * share, there, epochs)
    return out


def _largest(model: Model[Any]) -> int:
    """Parameters of the largest of the blocks that repeat."""
    lists = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    return max((sum(p.numel() for p in block.parameters()) for each in lists for block in each), default=0)


def _recomputed(model: Model[Any], mean: Mean, width: int) -> float:
    """Bytes that a sample keeps where blocks keep their inputs alone, and one of them is computed again."""
    blocks = model.blocks()
    if not blocks:
        return mean.kept
    inputs = getattr(model.config, "llm", model.config).hidden_size * width
    return mean.kept / len(blocks) + mean.tokens * len(blocks) * inputs


def _numbers(run: RunConfig, beside: ModelFile | None) -> ModelConfig:
    """The model's numbers, with the words and latents of the run's tokenizer and autoencoder. Raises RecipeError."""
    known = None if beside is None else registry.config_of(beside.architecture, beside.model, str(run.model.weights))
    config = run.model.config(known)
    if config is None:
        raise RecipeError(
            f"model.weights: {run.model.weights} is not here, or not in x2i's layout, and only it says which model it is: "
            "give `preset` too"
        )
    words, channels = config.vocabulary, 0
    if run.tokenizer is not None and run.tokenizer.train is not None:
        words = run.tokenizer.train.vocab_size
    if registry.model_class(config.architecture).draws:
        channels = latents_of(config)[0]
        if run.model.weights is None and (run.vae is None or isinstance(run.vae, PixelsConfig)):
            channels = 3 * (run.vae or PixelsConfig()).factor ** 2
    return config.adapted(vocab_size=words, latent_channels=channels)


def _beside(weights: str | None) -> ModelFile | None:
    """What lies beside weights of ours on this machine."""
    if weights is None or not Path(weights).exists():
        return None
    base = checkpoint.fetched(checkpoint.pinned(weights))
    return checkpoint.describe(base) if (base / checkpoint.CONFIG).is_file() else None


def _shrink(vae: VAEConfig | None, notes: list[str]) -> int:
    """Pixels per side of a latent."""
    if isinstance(vae, PixelsConfig):
        return vae.factor
    notes.append("the autoencoder is not opened: 8 pixels a latent's side are assumed, as SDXL's")
    return 8


def _table(run: RunConfig, notes: list[str]) -> SampleTable | None:
    """The samples of the corpora; None if one of them is not there."""
    try:
        return table_of([corpus.open(path) for path in run.corpora], (), run.held_out)
    except X2IError as error:
        notes.append(f"without the corpora nothing can be said of epochs: {error}")
        return None
