"""A model larger than the device's memory: its layers wait in host memory, and each comes when it computes.

Everything that is not a layer (embeddings, patchers, heads) stays on the device. On a CPU nothing moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of every stack (`nn.ModuleList`) of a model, in order; of stacks within stacks the outer ones."""
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in stacks):
            stacks[name] = module
    return [layer for stack in stacks.values() for layer in stack]


@contextmanager
def streamed(model: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Within the block the model computes on `device`, its layers' weights being there one layer at a time.

    Afterwards the layers lie in host memory, the rest on `device`; `model.to(device)` brings them there for good.
    """
    device = torch.device(device)
    layers = layers_of(model)
    hooks = []
    for layer in layers:
        at_home = {tensor: _pinned(tensor.data, device) for tensor in [*layer.parameters(), *layer.buffers()]}
        for tensor, host in at_home.items():
            tensor.data = host
        hooks.append(layer.register_forward_pre_hook(_Fetch(at_home, device)))
        hooks.append(layer.register_forward_hook(_Return(at_home), always_call=True))
    try:
        _move_rest(model, layers, device)
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Fetch:
    """Before a layer computes: its weights onto the device."""

    def __init__(self, at_home: dict[Tensor, Tensor], device: torch.device) -> None:
        self.at_home = at_home
        self.device = device

    def __call__(self, module: nn.Module, args: Any) -> None:
        for tensor, host in self.at_home.items():
            tensor.data = host.to(self.device, non_blocking=True)


class _Return:
    """After it: the copies are let go. They are copies on one stream, so none is freed before its last use."""

    def __init__(self, at_home: dict[Tensor, Tensor]) -> None:
        self.at_home = at_home

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        for tensor, host in self.at_home.items():
            tensor.data = host


def _move_rest(model: nn.Module, layers: list[nn.Module], device: torch.device) -> None:
    within = {id(t) for layer in layers for t in (*layer.parameters(), *layer.buffers())}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in within:
            tensor.data = tensor.data.to(device)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    host = tensor.cpu()
    return host.pin_memory() if device.type == "cuda" and not host.is_pinned() else host
