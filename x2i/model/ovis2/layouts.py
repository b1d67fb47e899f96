"""Ovis2 in the folders of others, read and written.

published     config.json (`ovis`), model.safetensors or shards, the tokenizer's files: AIDC-AI's code
transformers  config.json (`ovis2`): transformers' Ovis2ForConditionalGeneration. It takes the encoder's features after
              its last norm, where the published code takes them before it: the same weights give other answers

transformers writes visual tokens and marks as tokens of the vocabulary, with ids below the token embedding's rows. In
Qwen's tokenizer they come next (151665 to 151670). A table with too few rows is written with copies of its first row
behind it, which no greedy answer takes, and read back without them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor
from transformers import Ovis2Config as Ovis2Numbers

from x2i.base.errors import X2IError
from x2i.base.files import atomic
from x2i.base.weights import Weights
from x2i.model import folders, layouts, registry
from x2i.model.config import ModelFile
from x2i.model.folders import CONFIG, peek, read_json, write_json
from x2i.model.layouts import EXTRA
from x2i.model.ovis2 import names, published
from x2i.model.ovis2.config import Ovis2Config
from x2i.model.ovis2.model import Ovis2

LAYOUTS = {"published": "AIDC-AI's Ovis2", "transformers": "transformers' Ovis2ForConditionalGeneration"}
EXPECTED = f"{CONFIG} of an ovis (AIDC-AI) or an ovis2 (transformers)"
DRAWING = None
#: transformers' tokens for a visual token and for the marks, in the order of the visual table's last rows.
TOKENS = ("<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
_KINDS = {"ovis": "published", "ovis2": "transformers"}
_SPECIAL = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
#: What holds a row per token, by transformers' names.
_TABLES = ("model.language_model.embed_tokens.weight", "lm_head.weight")

Opened = layouts.Opened[Ovis2]


def recognises(folder: Path) -> bool:
    """Whether a folder holds an Ovis2 in one of `LAYOUTS`."""
    return peek(folder / CONFIG).get("model_type") in _KINDS


def open_model(place: str | Path, *, dtype: torch.dtype | None = None, with_vae: bool = True) -> Opened:
    """Open a folder in one of `LAYOUTS`, or the hub's repository, in host memory.

    Args:
        place: a folder or a hub id.
        dtype: of the weights; default: float32.
        with_vae: changes nothing: there is no autoencoder.

    Raises:
        X2IError: it cannot be had, is no Ovis2, or its weights do not fit its numbers.
    """
    folder = Weights(str(place)).fetch()
    if not recognises(folder):
        raise X2IError(f"{folder}: no published Ovis2: its {CONFIG} must say model_type ovis or ovis2")
    numbers, where = read_json(folder / CONFIG), str(folder / CONFIG)
    layout = _KINDS[numbers["model_type"]]
    if layout == "transformers":  # which leaves out what its classes have by default
        numbers = Ovis2Numbers.from_dict(numbers).to_dict()
    described = layouts.beside(folder)
    if described is None:
        read = published.from_published if layout == "published" else published.from_transformers
        described = ModelFile(
            architecture=Ovis2Config.architecture, model=read(numbers, where).model_dump(mode="json"), resolution=448
        )
    config = registry.config_of(described.architecture, described.model, where)
    assert isinstance(config, Ovis2Config)
    state = folders.tensors(folder)
    if layout == "transformers":
        state = names.from_transformers({n: _rows(n, t, config.llm.vocab_size) for n, t in state.items()})
    model = folders.hollow(config, dtype or torch.float32)
    folders.fill(model, state, folder)
    return Opened(model, folders.tokenizer_of(folder), described, None, layout)


def save(opened: Opened, folder: Path, layout: str) -> None:
    """Write a model in one of `LAYOUTS`, whole or not at all.

    Raises:
        X2IError: the folder exists, or the model has adapters.
    """
    layouts.check_free(opened, folder)
    config, state, tokenizer = opened.model.config, dict(opened.model.state_dict()), opened.tokenizer
    dtype = str(next(opened.model.parameters()).dtype).removeprefix("torch.")
    if layout == "published":
        numbers, kind = published.to_published(config, dtype), "CLIPImageProcessor"
    else:
        tokenizer, places = _with_tokens(tokenizer)
        rows = max(config.llm.vocab_size, max(places) + 1)
        state = {n: _rows(n, t, rows) for n, t in names.to_transformers(state).items()}
        if config.llm.tied:
            del state["lm_head.weight"]
        numbers, kind = published.to_transformers(config, rows, places, dtype), "Ovis2ImageProcessor"
    with atomic(folder) as temporary:
        temporary.mkdir()
        write_json(temporary / CONFIG, numbers)
        write_json(temporary / "preprocessor_config.json", published.preprocessor(config, kind))
        folders.save_shards(state, temporary)
        folders.save_tokenizer(tokenizer, temporary, config.max_length, _SPECIAL)
        write_json(temporary / EXTRA, opened.described.model_dump(mode="json"))


def _with_tokens(tokenizer: Tokenizer) -> tuple[Tokenizer, list[int]]:
    """A copy that knows transformers' tokens, and their ids."""
    made: Tokenizer = Tokenizer.from_str(tokenizer.to_str())
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS])
    known = made.get_vocab()
    return made, [known[token] for token in TOKENS]


def _rows(name: str, tensor: Tensor, rows: int) -> Tensor:
    """A table of tokens with so many rows: cut, or with copies of its first row behind; any other tensor as it is."""
    if name not in _TABLES or len(tensor) == rows:
        return tensor
    return torch.cat([tensor[:rows], tensor[:1].expand(max(0, rows - len(tensor)), -1)])
