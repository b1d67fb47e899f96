"""Folders of models: weights in shards, networks to be filled from them, tokenizers, autoencoders, JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from x2i.base.errors import X2IError
from x2i.base.weights import Weights
from x2i.model import deferred, registry, weights
from x2i.model.config import AutoencoderKLConfig
from x2i.model.vae import AutoencoderKL

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
#: Larger checkpoints are cut into shards of this size.
SHARD = "5GB"

_as_read: ContextVar[bool] = ContextVar("as_read", default=False)


class Held(AutoencoderKL):
    """An autoencoder of diffusers that is in memory already."""

    def __init__(self, module: Any) -> None:
        self._vae = module.eval().requires_grad_(False)
        self.channels = int(module.config.latent_channels)
        self.shrink = 2 ** (len(module.config.block_out_channels) - 1)
        self._scale = float(module.config.scaling_factor)
        self._shift = float(module.config.shift_factor or 0.0)


def save_shards(state: Mapping[str, Tensor], folder: Path, limit: str = SHARD, index: bool = False) -> None:
    """Write tensors as model.safetensors, or in shards with an index where they are larger than `limit`.

    Args:
        state: by name; of tied ones every name is written.
        folder: is there already.
        limit: as huggingface_hub has it: 5GB.
        index: write an index in any case, for code that reads that alone.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    tied = weights.aliases(state)
    whole = {n: t.detach().clone() if n in tied else t.detach().contiguous() for n, t in state.items()}
    files = split_torch_state_dict_into_shards(whole, max_shard_size=limit).filename_to_tensors
    if index and len(files) == 1:
        files = {"model-00001-of-00001.safetensors": list(whole)}
    for file, inside in files.items():
        save_file({name: whole[name].cpu() for name in inside}, folder / file, {"format": "pt"})
    if index or len(files) > 1:
        size = sum(tensor.numel() * tensor.element_size() for tensor in whole.values())
        where = {name: file for file, inside in files.items() for name in inside}
        content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        write_json(folder / f"{weights.FILE}.index.json", content)


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors, but for tables that old versions of transformers saved and nothing reads.

    Raises:
        X2IError: there are none, or they are pickles.
    """
    refuse_pickles(folder)
    left_out = ("position_ids", "rotary_emb.inv_freq")
    return {name: tensor for name, tensor in weights.tensors_of(folder) if not name.endswith(left_out)}


def refuse_pickles(folder: Path, stem: str = "pytorch_model") -> None:
    """Raise X2IError with the remedy if weights lie in torch's pickles alone, which may run any code."""
    pickles = sorted(folder.glob(f"{stem}*.bin"))
    if pickles and not any(folder.glob("*.safetensors")):
        raise X2IError(
            f"{folder}: its weights are pickles ({pickles[0].name}), which may run any code when they are read. If you "
            "trust them, turn each into safetensors first: python -c 'import torch, safetensors.torch as s; "
            f's.save_file(torch.load("{pickles[0].name}", weights_only=True), "model.safetensors")\''
        )


@contextmanager
def as_read() -> Iterator[None]:
    """Within the block `fill` gives a network of `hollow` the tensors of its files as they are, in whatever type.

    They are not copied into memory until somebody reads them, and then not for this process alone.
    """
    before = _as_read.set(True)
    try:
        yield
    finally:
        _as_read.reset(before)


def hollow(config: Any, dtype: torch.dtype) -> Any:
    """A network whose weights are still to be read: nothing is drawn for them. Its buffers are as they should be."""
    model, _ = deferred.build(lambda: registry.build(config), keep=False)
    if _as_read.get():
        return model.to(dtype).eval()
    made: dict[int, nn.Parameter] = {}  # tied parameters stay one
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=False)
                module._parameters[name] = made.setdefault(id(parameter), empty)
    return model.to(dtype).eval()


@torch.no_grad()
def fill(module: Any, state: Mapping[str, Tensor], where: Path) -> None:
    """Copy a state into a network; of tied tensors one name is enough.

    Raises:
        X2IError: tensors are missing, unknown or of another shape: the first few are named.
    """
    wanted: dict[str, Tensor] = module.state_dict()
    tied = weights.aliases(wanted) | weights.tied_names(module)
    groups: dict[str, set[str]] = {}
    for second, first in tied.items():
        groups.setdefault(first, {first}).add(second)
    spare = {name for group in groups.values() if group & state.keys() for name in group}
    faults = [f"missing {n}" for n in sorted(wanted.keys() - state.keys() - spare)]
    faults += [f"unknown {n}" for n in sorted(state.keys() - wanted.keys())]
    both = sorted(wanted.keys() & state.keys())
    faults += [
        f"{n} is {list(state[n].shape)}, expected {list(wanted[n].shape)}"
        for n in both
        if state[n].shape != wanted[n].shape
    ]
    if faults:
        raise X2IError(f"{where}: not weights of this model: {'; '.join(faults[:5])} ({len(faults)} in all)")
    named = dict(module.named_parameters(remove_duplicate=False))
    read: dict[int, nn.Parameter] = {}
    for name in both:
        if _as_read.get() and wanted[name].is_meta:
            read[id(named[name])] = nn.Parameter(state[name], requires_grad=False)
        else:
            wanted[name].copy_(state[name])
    for owner in module.modules() if read else ():
        for name, parameter in owner._parameters.items():
            owner._parameters[name] = read.get(id(parameter), parameter)
    # tied ones lie in the same memory: the last one written counts, and must be what the others are
    for second, first in tied.items():
        if {first, second} <= state.keys() and not torch.equal(state[first], state[second]):
            raise X2IError(f"{where}: {first} and {second} differ, but the numbers say that they are one")


def tokenizer_of(folder: Path) -> Tokenizer:
    """A folder's tokenizer, from tokenizer.json (here or in tokenizer/) or any files that transformers reads.

    Raises:
        X2IError: it has none.
    """
    try:
        for file in (folder / TOKENIZER, folder / "tokenizer" / TOKENIZER):
            if file.is_file():
                return Tokenizer.from_file(str(file))
        import transformers

        # by its class, where that is known: otherwise config.json is asked, which may name code of others
        name = str(peek(folder / "tokenizer_config.json").get("tokenizer_class")).removesuffix("Fast")
        if (known := getattr(transformers, name, None)) is not None:
            found: Tokenizer = known.from_pretrained(folder).backend_tokenizer
        else:
            found = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False).backend_tokenizer
    except Exception as error:  # noqa: BLE001 - the libraries raise nothing narrower
        raise X2IError(f"{folder}: no {TOKENIZER}, and no tokenizer that transformers can read ({error})") from None
    return found


def save_tokenizer(tokenizer: Tokenizer, folder: Path, length: int, special: Mapping[str, str]) -> None:
    """Write tokenizer.json and what transformers needs to open it as it is.

    One that cuts text as Qwen's does is also written in Qwen's own files, and named as such.

    Args:
        length: the longest sequence.
        special: kind (eos_token, pad_token …) -> token; those that the tokenizer lacks are left out.
    """
    parts = json.loads(tokenizer.to_str())
    cut = parts.get("pre_tokenizer") or {}
    qwen = cut.get("type") == "Sequence" and tokenizer.token_to_id("<|im_start|>") is not None
    known = {kind: token for kind, token in special.items() if tokenizer.token_to_id(token) is not None}
    added = {t["content"]: t["id"] for t in parts["added_tokens"]}
    settings = {
        "tokenizer_class": "Qwen2Tokenizer" if qwen else "PreTrainedTokenizerFast",
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in parts["added_tokens"]
        },
        **known,
    }
    tokenizer.save(str(folder / TOKENIZER))
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", known)
    if qwen:
        merges = [m if isinstance(m, str) else " ".join(m) for m in parts["model"]["merges"]]
        write_json(folder / "vocab.json", parts["model"]["vocab"])
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        write_json(folder / "added_tokens.json", added)


def copy_vae(described: AutoencoderKLConfig, folder: Path) -> None:
    """Copy an autoencoder of diffusers from where it lies. Raises X2IError if its weights are not there."""
    source = Weights(described.weights).fetch()
    stem = "diffusion_pytorch_model"
    kept = [p for p in sorted(source.iterdir()) if p.name == CONFIG or p.name.startswith(stem)]
    if not any(p.suffix == ".safetensors" for p in kept):
        raise X2IError(f"vae {described.weights}: no {stem}.safetensors in {source}")
    folder.mkdir()
    for path in kept:
        shutil.copyfile(path, folder / path.name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises X2IError if it is not there, or is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise X2IError(f"{path}: cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise X2IError(f"{path}: expected a JSON object")
    return value


def peek(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if it is not there. Raises X2IError if it is none."""
    return read_json(path) if path.is_file() else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object. Not atomic: wrap the folder."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
