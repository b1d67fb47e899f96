"""The numbers of a low-rank adapter, and the same in the words of the library peft. Light to import: no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from x2i.base.config import Config, parse_config
from x2i.base.errors import X2IError

_SUFFIX = re.compile(r"[\w.]+")
#: Settings of peft that a reader may pass over. Any other one that is on makes another kind of adapter.
_KNOWN = {"peft_type", "base_model_name_or_path", "task_type", "auto_mapping", "revision", "inference_mode"}
_KNOWN |= {"r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"}
_KNOWN |= {"layers_pattern", "rank_pattern", "init_lora_weights", "bias", "megatron_core", "megatron_config"}
_KNOWN |= {"peft_version", "qalora_group_size", "eva_config", "ensure_weight_tying", "runtime_config"}


class LoRAConfig(Config):
    """Which linear layers get an adapter W + alpha / rank * B A, and its size. The defaults are OmniGen's."""

    rank: int = Field(8, gt=0, description="rank of the update: rows of A, columns of B")
    alpha: float | None = Field(None, gt=0, description="the update is scaled by alpha / rank; null for alpha = rank")
    targets: tuple[str, ...] = Field(
        ("qkv_proj", "o_proj"),
        min_length=1,
        description="linear layers: the end of a name (o_proj, self_attn.o_proj), or a regular expression of all of it",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the adapter's inputs that training sets to zero")
    init: Literal["gaussian", "kaiming"] = Field(
        "gaussian", description="of A: normal with deviation 1 / rank, or uniform within 1 / sqrt(inputs); B is zero"
    )

    @field_validator("targets")
    @classmethod
    def _check(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        for target in targets:
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(f"{target!r} is no regular expression ({error})") from None
        return targets

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def to_peft(config: LoRAConfig, base: str | None) -> dict[str, Any]:
    """The content of adapter_config.json; `base` is the adapted model's name or path."""
    alpha = config.scale * config.rank
    # peft reads a list as ends of names, and one string as a regular expression
    plain = all(_SUFFIX.fullmatch(target) for target in config.targets)
    expression = "|".join(rf"(?:.*\.)?{re.escape(t)}" if _SUFFIX.fullmatch(t) else f"(?:{t})" for t in config.targets)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "task_type": None,
        "auto_mapping": None,
        "revision": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(config.targets) if plain else expression,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "use_rslora": False,
    }


def from_peft(file: Path, layers: Sequence[str]) -> LoRAConfig:
    """Read an adapter_config.json.

    Args:
        file: that peft or `to_peft` wrote.
        layers: names of the adapted layers, for targets that the file does not spell out.

    Raises:
        X2IError: no such file, or an adapter that is more than A and B on linear layers.
    """
    numbers = _read(file)
    targets = numbers.get("target_modules")
    if not targets or targets == "all-linear":
        targets = sorted({name.rpartition(".")[2] for name in layers})
    rank = numbers.get("r", 8)
    alpha = numbers.get("lora_alpha", 8)
    ours = {
        "rank": rank,
        "alpha": None if alpha == rank else alpha,
        "targets": [targets] if isinstance(targets, str) else sorted(targets),  # peft keeps them as a set
        "dropout": numbers.get("lora_dropout", 0.0),
        "init": "gaussian" if numbers.get("init_lora_weights") == "gaussian" else "kaiming",
    }
    return parse_config(LoRAConfig, ours, str(file))


def _read(file: Path) -> dict[str, Any]:
    try:
        numbers = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise X2IError(f"{file}: cannot be read as JSON ({error})") from None
    if not isinstance(numbers, dict) or numbers.get("peft_type") != "LORA":
        raise X2IError(f"{file}: no LoRA adapter: peft_type must be LORA")
    other = [key for key, value in numbers.items() if value and key not in _KNOWN]
    other += ["bias"] if numbers.get("bias", "none") != "none" else []
    # pissa, olora and their like change the frozen weights too
    other += [] if numbers.get("init_lora_weights", True) in (True, False, "gaussian", "eva") else ["init_lora_weights"]
    if other:
        raise X2IError(f"{file}: an adapter of another kind: {', '.join(f'{k}={numbers[k]!r}' for k in sorted(other))}")
    return numbers
