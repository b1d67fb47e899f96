"""OmniGen written to disk in the layouts of others and ours: see `layouts`, which reads them."""

from __future__ import annotations

import logging
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from x2i.base.errors import X2IError
from x2i.base.files import atomic
from x2i.model import folders, layouts, weights
from x2i.model.config import AutoencoderKLConfig, ModelFile
from x2i.model.folders import CONFIG, TOKENIZER, write_json
from x2i.model.layouts import EXTRA
from x2i.model.omnigen import names, published
from x2i.model.omnigen.config import OmniGenConfig
from x2i.model.omnigen.layouts import DIFFUSERS, INDEX, Layout, Opened

log = logging.getLogger(__name__)

_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<|endoftext|>"}


def save(opened: Opened, folder: Path, layout: Layout) -> None:
    """Write a model in a layout; the folder is there whole or not at all.

    Raises:
        X2IError: the folder exists, or the layout cannot hold this model.
    """
    layouts.check_free(opened, folder)
    if layout is Layout.X2I:
        layouts.save_checkpoint(opened, folder)
        return
    config = opened.model.config
    if layout is Layout.DIFFUSERS and not isinstance(opened.described.vae, AutoencoderKLConfig):
        raise X2IError(
            "the autoencoder of this model is the pixels themselves, which diffusers' OmniGenPipeline does not know. "
            "Write the layout `transformer`: its OmniGenTransformer2DModel opens that."
        )
    with atomic(folder) as temporary:
        temporary.mkdir()
        state, described = _without_text_head(opened)
        if layout is Layout.PUBLISHED:
            if other := published.unusual(config):
                log.warning(
                    "VectorSpaceLab's code cannot open %s, whose numbers are not its: %s", folder, "; ".join(other)
                )
            write_json(temporary / CONFIG, published.to_phi3(config))
            weights.save(state, temporary / weights.FILE)
            _write_tokenizer(temporary, opened.tokenizer, config)
            _copy_vae(described, temporary)
        else:
            inner = temporary / "transformer" if layout is Layout.DIFFUSERS else temporary
            inner.mkdir(exist_ok=True)
            write_json(inner / CONFIG, published.to_transformer(config))
            weights.save(names.to_diffusers(state, config), inner / f"{DIFFUSERS}.safetensors")
            if layout is Layout.DIFFUSERS:
                _write_pipeline(temporary, opened)
            else:
                opened.tokenizer.save(str(temporary / TOKENIZER))
        if (temporary / "vae").is_dir():
            described = layouts.with_vae(described, "vae")
        write_json(temporary / EXTRA, described.model_dump(mode="json"))


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
    write_json(folder / INDEX, index)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
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
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", special)


def _copy_vae(described: ModelFile, folder: Path) -> None:
    if isinstance(described.vae, AutoencoderKLConfig):
        folders.copy_vae(described.vae, folder / "vae")


def _without_text_head(opened: Opened) -> tuple[dict[str, Tensor], ModelFile]:
    """The weights and the description of the model that others know: it writes no text, or from the token embedding."""
    state = dict(opened.model.state_dict())
    if state.pop("lm_head.weight", None) is None:
        return state, opened.described
    log.warning("the text head is left out: the layout has no place for it")
    silent = opened.described.model | {"text_head": False, "tie_text_head": False}
    return state, opened.described.model_copy(update={"model": silent})
