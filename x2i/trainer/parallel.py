"""A model made ready to learn: activation checkpointing, compilation, and its weights divided among the ranks (FSDP2).

The units of all three are the model's repeated `blocks`; whatever is outside of them is one unit more.

With bfloat16 what FSDP gathers is cast to bfloat16 and gradients are added up in float32; the computation itself runs
under autocast as it does on one rank, which keeps times, norms and losses in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from x2i.model import lora, weights
from x2i.model.base import Model
from x2i.trainer.config import RunConfig
from x2i.trainer.world import World

#: Graphs of a block, at most: of packs and batches, of training and evaluation, of each stage's trained parts, of shapes.
_GRAPHS = 64


def prepare(model: Model[Any], run: RunConfig, world: World, device: torch.device) -> Model[Any]:
    """Move a model to its device, as the run's `compute` asks, and divide its weights if there are other ranks.

    With other ranks it may be on the meta device (`x2i.model.deferred`): then no rank ever has all of it, and what each
    holds is to be filled.
    """
    blocks = model.blocks()
    if run.compute.checkpointing:
        for block in blocks:
            block.forward = MethodType(_recomputed, block)
    if run.compute.compile:
        # all blocks are one function to dynamo; beyond its limit of 8 graphs it would run them uncompiled
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
        for block in blocks:
            block.compile()
    if world.size == 1:
        return model.to(device)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    half = run.precision == "bfloat16"
    options: dict[str, Any] = {
        "mesh": world.mesh(device, run.compute.shards),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
    }
    for block in blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    for method in ("next_token", "packed"):
        register_fsdp_forward_method(model, method)
    return _placed(model, device)


def _placed(model: Model[Any], device: torch.device) -> Model[Any]:
    """Move a divided model; of what has no memory yet (the meta device) each rank gets its part, to be filled.

    Adapters are as they are at first.
    """
    tied, hollow = weights.tied_names(model), any(p.is_meta for p in model.parameters())
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    for second, first in tied.items() if hollow else ():
        module, _, name = second.rpartition(".")
        setattr(model.get_submodule(module), name, model.get_parameter(first))
    for layer in lora.adapters(model).values() if hollow else ():
        layer.renew()
    return model


def _recomputed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A block's forward pass whose activations are not kept, but computed again in the backward pass."""
    return checkpoint(type(block).forward, block, *args, use_reentrant=False, **kwargs)


def is_divided(model: nn.Module) -> bool:
    """Whether FSDP has divided a model's weights."""
    return any(isinstance(p, DTensor) for p in model.parameters())


@contextlib.contextmanager
def whole(model: Any) -> Iterator[None]:
    """Within the block any method of a divided model may be called, without gradients: what is outside of its blocks is
    gathered. All ranks enter together.
    """
    if not is_divided(model):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def touched(model: Model[Any]) -> Tensor | None:
    """Zero, with a gradient of zeros for each learning parameter outside of the blocks; None if nothing is divided.

    Ranks add up gradients together, and so all need to have some: also of a head that one of them did not use.
    """
    if not hasattr(model, "unshard"):
        return None
    inside = {id(p) for block in model.blocks() for p in block.parameters()}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
    zero = (0.0 * p.reshape(-1)[:1].float().sum() for p in rest)
    return sum(zero, torch.zeros((), device=rest[0].device)) if rest else None


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor; it shares the memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered: all ranks call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def untied(state: Mapping[str, Tensor], tied: Mapping[str, str]) -> dict[str, Tensor]:
    """A state without the second names of what has two."""
    return {name: tensor for name, tensor in state.items() if tied.get(name) not in state}
