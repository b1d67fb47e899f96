"""Low-rank adapters: a frozen weight W learns an update alpha / rank * B A (Hu et al. 2106.09685).

Choices:
- an adapted layer is a Linear that keeps its weight under its own name, so that published names stay as they are;
  beside it stand `lora_A.weight` [rank, inputs] and `lora_B.weight` [outputs, rank]
- adapters are float32, whatever the type of the frozen weights
- B is zero at first: the model's outputs are unchanged. A is drawn from its layer's name and a seed
- on disk: the two files of the public library peft, which OmniGen's published fine-tuning writes
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from x2i.base.errors import X2IError
from x2i.base.files import atomic, write_text
from x2i.base.seeds import generator
from x2i.model import weights
from x2i.model.lora_config import LoRAConfig, from_peft, to_peft

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
_TENSOR = re.compile(r"(.+)\.lora_([AB])\.weight")


class LoRALinear(nn.Linear):
    """A frozen linear layer and its adapter: x W' + b + scale * B (A x)."""

    def __init__(self, base: nn.Linear, config: LoRAConfig) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.config = config
        self._seed: tuple[Any, ...] = ()
        device = base.weight.device
        self.dropout = nn.Dropout(config.dropout)
        self.lora_A = nn.Linear(base.in_features, config.rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(config.rank, base.out_features, bias=False, device=device, dtype=torch.float32)
        self.train(base.training)

    def initialise(self, *seed: Any) -> None:
        """Draw A from the seed, the same on every device; B = 0. What is not on a device yet is to be drawn by `renew`."""
        self._seed = seed
        self.renew()

    def renew(self) -> None:
        """As `initialise`, from the same seed once more; A and B may be divided among ranks by now."""
        weight, rank = self.lora_A.weight, self.config.rank
        nn.init.zeros_(self.lora_B.weight)
        if weight.is_meta:
            return
        drawn, bound = generator("lora/1", *self._seed), self.in_features**-0.5
        gaussian = self.config.init == "gaussian"
        values = drawn.normal(0, 1 / rank, weight.shape) if gaussian else drawn.uniform(-bound, bound, weight.shape)
        weights.assign(weight, torch.from_numpy(values))

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs], in the type of the layer without the adapter."""
        base = super().forward(x)
        update = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))))
        return (base + self.config.scale * update).to(base.dtype)

    def merged(self) -> Tensor:
        """The weight with the update folded in: added up in float32, in the type of the weight."""
        update = self.lora_B.weight.float() @ self.lora_A.weight.float()
        return (self.weight.float() + self.config.scale * update).to(self.weight.dtype)

    def plain(self) -> nn.Linear:
        """A layer without the adapter, of the same weight."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight, layer.bias = self.weight, self.bias
        return layer.train(self.training)


def attach(model: nn.Module, config: LoRAConfig, seed: int = 0) -> list[str]:
    """Put adapters on the linear layers that `config` names, and freeze everything else, in place.

    An adapter of a layer with `i` inputs and `o` outputs has rank * (i + o) parameters. OmniGen of 3.8 billion with
    rank 8 on qkv_proj (3072 -> 9216) and o_proj (3072 -> 3072) of 32 layers: 32 * 8 * (12,288 + 6,144) = 4,718,592.

    Only layers of the class nn.Linear itself are adapted: others may use their weight without being called.

    Args:
        model: with its weights loaded; checkpoints without adapters do not fit it afterwards.
        config: rank, scale and targets.
        seed: of A, together with the layer's name.

    Returns:
        Names of the adapted layers, in the model's order.

    Raises:
        X2IError: a target fits no linear layer (near names are given), or the model has adapters already.
    """
    names = matching(model, config)
    attach_to(model, dict.fromkeys(names, config), seed)
    return names


def matching(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Names of the linear layers that `config` names, in the model's order. Raises X2IError, as `attach`."""
    if adapters(model):
        raise X2IError("the model has adapters already: merge them or detach them first")
    linear = _linear(model)
    found = {target: [name for name in linear if _fits(target, name)] for target in config.targets}
    for target, names in found.items():
        if not names:
            raise X2IError(f"lora: no linear layer is called {target!r}; {_near(target, linear)}")
    chosen = {name for names in found.values() for name in names}
    return [name for name in linear if name in chosen]


def attach_to(model: nn.Module, layers: Mapping[str, LoRAConfig], *seed: Any) -> None:
    """Put adapters on these linear layers, as `attach` does: each with numbers of its own."""
    model.requires_grad_(False)
    for name, config in layers.items():
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        layer = LoRALinear(base, config)
        layer.initialise(*seed, name)
        model.set_submodule(name, layer)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors, detached, by their names in the model: `<layer>.lora_A.weight`, `<layer>.lora_B.weight`."""
    state = {}
    for name, layer in adapters(model).items():
        state[f"{name}.lora_A.weight"] = layer.lora_A.weight.detach()
        state[f"{name}.lora_B.weight"] = layer.lora_B.weight.detach()
    return state


def detach(model: nn.Module) -> list[str]:
    """Take the adapters away, in place: the model is the base again. Parameters stay frozen. Returns the layers' names."""
    found = adapters(model)
    for name, layer in found.items():
        model.set_submodule(name, layer.plain())
    return list(found)


@torch.no_grad()
def merge(model: nn.Module) -> list[str]:
    """Fold the adapters into the weights and take them away, in place. Parameters stay frozen.

    Outputs are those with adapters, but for rounding in the weights' type. Returns the layers' names.
    """
    for layer in adapters(model).values():
        layer.weight.copy_(layer.merged())
    return detach(model)


def save_adapter(model: nn.Module, folder: Path, base: str | None = None) -> None:
    """Write adapter_model.safetensors and adapter_config.json, as peft's `save_pretrained` lays them out.

    Tensors are called `base_model.model.<layer>.lora_A.weight`, as for a model that peft has wrapped.

    Args:
        model: with adapters.
        folder: made if it is not there; each file is written whole or not at all.
        base: name or path of the model that was adapted, for the reader of the file.

    Raises:
        X2IError: the model has no adapters.
    """
    layers = adapters(model)
    if not layers:
        raise X2IError(f"{folder}: no adapter to write: the model has none")
    write_adapter(adapter_state(model), next(iter(layers.values())).config, folder, base)


def write_adapter(tensors: Mapping[str, Tensor], config: LoRAConfig, folder: Path, base: str | None = None) -> None:
    """Write an adapter's tensors, as of `adapter_state`, as `save_adapter` does."""
    state = {PREFIX + name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / WEIGHTS) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)  # safetensors lets nobody else read it
    write_text(folder / CONFIG, json.dumps(to_peft(config, base), indent=2, sort_keys=True) + "\n")


def load_adapter(model: nn.Module, folder: Path) -> LoRAConfig:
    """Attach an adapter from disk: ours, or one that peft wrote for the same model. Everything else is frozen.

    The layers are those that the file holds tensors for. Adapters that the model has already are replaced.

    Returns:
        The adapter's configuration.

    Raises:
        X2IError: a file is missing or broken, the adapter is of another kind, or does not fit the model.
    """
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise X2IError(f"{folder / WEIGHTS}: cannot be read as safetensors ({error})") from None
    pairs = _pairs(tensors, folder / WEIGHTS)
    config = from_peft(folder / CONFIG, list(pairs))
    shapes = {name: (module.in_features, module.out_features) for name, module in _linear(model).items()}
    shapes |= {name: (layer.in_features, layer.out_features) for name, layer in adapters(model).items()}
    for name, (a, b) in pairs.items():
        if name not in shapes:
            raise X2IError(f"{folder}: the model has no linear layer {name}; {_near(name, shapes)}")
        wanted = (config.rank, shapes[name][0]), (shapes[name][1], config.rank)
        if (tuple(a.shape), tuple(b.shape)) != wanted:
            raise X2IError(
                f"{folder}: {name}: A is {list(a.shape)} and B {list(b.shape)}, expected {list(wanted[0])} and "
                f"{list(wanted[1])}: an adapter of another model, or of more than one rank"
            )
    detach(model)
    attach_to(model, dict.fromkeys(pairs, config), 0)
    with torch.no_grad():
        for name, layer in adapters(model).items():
            layer.lora_A.weight.copy_(pairs[name][0])
            layer.lora_B.weight.copy_(pairs[name][1])
    return config


def _linear(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


def _fits(target: str, name: str) -> bool:
    return name == target or name.endswith("." + target) or re.fullmatch(target, name) is not None


def _near(name: str, linear: Mapping[str, object]) -> str:
    last = list(dict.fromkeys(n.rpartition(".")[2] for n in linear))
    wanted = name.rpartition(".")[2]
    alike = {n: difflib.SequenceMatcher(None, wanted, n).ratio() for n in last}
    near = sorted((n for n in last if alike[n] > 0.6), key=lambda n: -alike[n])
    return f"it has {', '.join(near or last[:8]) or 'none'}"


def _pairs(tensors: Mapping[str, Tensor], file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each layer, by the layer's name."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = _TENSOR.fullmatch(key.removeprefix(PREFIX))
        if not found:
            raise X2IError(f"{file}: {key} is no tensor of an adapter of linear layers (lora_A.weight, lora_B.weight)")
        parts.setdefault(found[1], {})[found[2]] = tensor
    for name, both in parts.items():
        if len(both) != 2:
            raise X2IError(f"{file}: {name} has lora_{next(iter(both))} alone")
    if not parts:
        raise X2IError(f"{file}: no tensors")
    return {name: (both["A"], both["B"]) for name, both in parts.items()}
