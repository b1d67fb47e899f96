"""OmniGen written to disk in the layouts of others and ours: see `layouts`, which reads them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from x2i.base.errors import X2IError
from x2i.base.files import atomic
from x2i.base.weights import Weights
from x2i.model import lora, weights
from x2i.model.config import AutoencoderKLConfig, ModelFile, PixelsConfig
from x2i.model.omnigen import names, published
from x2i.model.omnigen.config import OmniGenConfig
from x2i.model.omnigen.layouts import CONFIG, DIFFUSERS, EXTRA, INDEX, TOKENIZER, Layout, Opened

log = logging.getLogger(__name__)

_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<|endoftext|>"}


def save(opened: Opened, folder: Path, layout: Layout) -> None:
    """Write a model in a layout; the folder is there whole or not at all.

    Raises:
        X2IError: the folder exists, or the layout cannot hold this model.
    """
    if folder.exists():
        raise X2IError(f"{folder}: exists already; remove it, or name another folder")
    if lora.adapters(opened.model):
        raise X2IError("the model has adapters: merge them into its weights, or take them away, before it is written")
    config = opened.model.config
    if layout is Layout.DIFFUSERS and not isinstance(opened.described.vae, AutoencoderKLConfig):
        raise X2IError(
            "the autoencoder of this model is the pixels themselves, which diffusers' OmniGenPipeline does not know. "
            "Write the layout `transformer`: its OmniGenTransformer2DModel opens that."
        )
    with atomic(folder) as temporary:
        temporary.mkdir()
        if layout is Layout.X2I:
            _write_x2i(temporary, folder, opened)
            return
        state, described = _without_text_head(opened)
        if layout is Layout.PUBLISHED:
            if other := published.unusual(config):
                log.warning(
                    "VectorSpaceLab's code cannot open %s, whose numbers are not its: %s", folder, "; ".join(other)
                )
            _write(temporary / CONFIG, published.to_phi3(config))
            weights.save(state, temporary / weights.FILE)
            _write_tokenizer(temporary, opened.tokenizer, config)
            _copy_vae(described, temporary)
        else:
            inner = temporary / "transformer" if layout is Layout.DIFFUSERS else temporary
            inner.mkdir(exist_ok=True)
            _write(inner / CONFIG, published.to_transformer(config))
            weights.save(names.to_diffusers(state, config), inner / f"{DIFFUSERS}.safetensors")
            if layout is Layout.DIFFUSERS:
                _write_pipeline(temporary, opened)
            else:
                opened.tokenizer.save(str(temporary / TOKENIZER))
        if (temporary / "vae").is_dir():
            described = _with_vae(described, "vae")
        _write(temporary / EXTRA, described.model_dump(mode="json"))


def _write_x2i(folder: Path, final: Path, opened: Opened) -> None:
    described = opened.described
    if isinstance(described.vae, AutoencoderKLConfig) and Path(described.vae.weights).expanduser().is_dir():
        _copy_vae(described, folder)
        described = _with_vae(described, str(final.absolute() / "vae"))
    _write(folder / CONFIG, described.model_dump(mode="json"))
    _write(folder / "trainer.json", {"step": 0})
    weights.save(opened.model.state_dict(), folder / weights.FILE)
    opened.tokenizer.save(str(folder / TOKENIZER))


def _write_pipeline(folder: Path, opened: Opened) -> None:
    """All but the transformer of diffusers' OmniGenPipeline."""
    index = {
        "_class_name": "OmniGenPipeline",
        "_diffusers_version": "0.33.0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "OmniGenTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    scheduler = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": "0.33.0",
        "invert_sigmas": True,
        "num_train_timesteps": 1,
        "shift": 1.0,
        "use_dynamic_shifting": False,
    }
    (folder / "tokenizer").mkdir()
    (folder / "scheduler").mkdir()
    _write(folder / INDEX, index)
    _write(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_tokenizer(folder / "tokenizer", opened.tokenizer, opened.model.config)
    _copy_vae(opened.described, folder)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, config: OmniGenConfig) -> None:
    """tokenizer.json, and what transformers needs to open it as a tokenizer of no family.

    Its Llama class would rebuild the published file's normaliser around any other vocabulary.
    """
    special = {kind: token for kind, token in _SPECIAL.items() if tokenizer.token_to_id(token) is not None}
    special.setdefault("pad_token", "</s>")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_positions,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    tokenizer.save(str(folder / TOKENIZER))
    _write(folder / "tokenizer_config.json", settings)
    _write(folder / "special_tokens_map.json", special)


def _with_vae(described: ModelFile, place: str) -> ModelFile:
    return described.model_copy(update={"vae": AutoencoderKLConfig(kind="autoencoder_kl", weights=place)})


def _copy_vae(described: ModelFile, folder: Path) -> None:
    if isinstance(described.vae, PixelsConfig) or described.vae is None:
        return
    source = Weights(described.vae.weights).fetch()
    kept = [p for p in sorted(source.iterdir()) if p.name == CONFIG or p.name.startswith(DIFFUSERS)]
    if not any(p.suffix == ".safetensors" for p in kept):
        raise X2IError(f"vae {described.vae.weights}: no {DIFFUSERS}.safetensors in {source}")
    (folder / "vae").mkdir()
    for path in kept:
        shutil.copyfile(path, folder / "vae" / path.name)


def _without_text_head(opened: Opened) -> tuple[dict[str, Tensor], ModelFile]:
    """The weights and the description of the model that others know: it writes no text, or from the token embedding."""
    state = dict(opened.model.state_dict())
    if state.pop("lm_head.weight", None) is None:
        return state, opened.described
    log.warning("the text head is left out: the layout has no place for it")
    silent = opened.described.model | {"text_head": False, "tie_text_head": False}
    return state, opened.described.model_copy(update={"model": silent})


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
