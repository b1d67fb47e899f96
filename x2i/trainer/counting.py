"""One training pass without memory: what its operators cost, on the meta device (`x2i.trainer.flops`).

Matrix products and convolutions are counted by PyTorch's formulas as they pass through the dispatcher; attention is
replaced by a stand-in that counts itself, per pair of query and key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from x2i.model.base import Model
from x2i.model.lengths import Lengths

#: Shapes of operators' results, by operator and the shapes of its arguments.
Known = dict[Any, tuple[Any, ...]]


@dataclass
class Call:
    """One call of an attention: queries, keys, and FLOPs a pair."""

    queries: int
    keys: int
    forward: float
    backward: float = 0.0


@dataclass(frozen=True)
class Run:
    """What one pass took; attention is in `calls` alone."""

    forward: float
    backward: float
    kept: float
    calls: list[Call]


def run(model: Model[Any], inputs: Any, row: Lengths, known: Known) -> Run:
    """Forward and backward pass of one row, as the trainer does it.

    Args:
        model: on the meta device, in training mode; what learns asks for gradients.
        inputs: of this row.
        row: its lengths.
        known: filled, for the next call.
    """
    calls: list[Call] = []
    kept: dict[int, int] = {}
    weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            alive.append(tensor)  # so that its storage's address is not used again
            kept[storage._cdata] = storage.nbytes()
        return tensor

    alive: list[Tensor] = []
    forward, backward = _Counter(known), _Counter(known)
    with saved_tensors_hooks(keep, lambda tensor: tensor), forward, _OnMeta(calls, max(row.learned, 1)):
        if row.drawn:
            dtype = next(model.parameters()).dtype
            noisy = _noisy(model, row.drawn, dtype)
            t = torch.zeros(1, device="meta")
            condition = model.condition(inputs, target=(noisy.shape[-2], noisy.shape[-1]))
            loss = model.velocity(noisy, t, condition).float().pow(2).sum()
        else:
            loss = model.next_token(inputs)[0].sum()
    if loss.requires_grad:
        with backward:
            loss.backward()
        for parameter in model.parameters():
            parameter.grad = None
    return Run(forward.total, backward.total, sum(kept.values()), calls)


def _noisy(model: Model[Any], tokens: int, dtype: torch.dtype) -> Tensor:
    """Noisy latents of so many tokens, one token high."""
    channels, patch = latents_of(model.config)
    return torch.zeros(1, channels, patch, patch * tokens, device="meta", dtype=dtype)


def latents_of(config: Any) -> tuple[int, int]:
    """Channels of the latents that a model draws, and how many of them are a token's side."""
    if hasattr(config, "decoder"):  # which counts the values of a token
        return config.decoder.in_channels // config.decoder.patch_size**2, config.decoder.patch_size
    return config.in_channels, config.patch_size


class _Counter(TorchDispatchMode):
    """Adds up the FLOPs of operators by PyTorch's formulas (`torch.utils.flop_counter`), without its table of modules.

    What an operator returned is remembered by the shapes that it was given: layers repeat, and to work shapes out in
    Python is what takes the time.
    """

    def __init__(self, known: Known) -> None:
        super().__init__()
        self.total = 0.0
        self._known = known

    def _shaped(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The operator's result, without content."""
        schema = func._schema
        if schema.is_mutable or len(schema.returns) != 1 or schema.returns[0].alias_info is not None:
            return func(*args, **kwargs)
        try:
            key = (func, *(_signature(a) for a in args), *((k, _signature(v)) for k, v in kwargs.items()))
            found = self._known.get(key)
        except TypeError:  # an argument that cannot be told by its shape
            return func(*args, **kwargs)
        if found is None:
            out = func(*args, **kwargs)
            if isinstance(out, Tensor) and out.is_meta and all(out is not a for a in args):
                self._known[key] = found = (out.shape, out.stride(), out.dtype)
            return out
        shape, stride, dtype = found
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._shaped(func, args, kwargs or {})
        packet = func._overloadpacket
        if packet is torch.ops.aten.convolution_backward:  # PyTorch's formula takes no notice of groups
            grad, weight, wanted = args[0], args[2], args[-1]
            once = 2 * grad.shape[0] * grad.shape[2:].numel() * weight.numel()
            self.total += once * sum(wanted[:2])
        elif (formula := flop_registry.get(packet)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _signature(value: Any) -> Any:
    """What of an argument decides the shape of the result. Raises TypeError for what cannot be a key."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, list | tuple):
        return tuple(_signature(v) for v in value)
    hash(value)
    return type(value), value


class _OnMeta(TorchFunctionMode):
    """What the meta device cannot do, because it depends on values: attention, which is counted here, and choices.

    Every token is valid; so many are learned; no sequence is so long that frequencies change.
    """

    def __init__(self, calls: list[Call], learned: int) -> None:
        super().__init__()
        self._calls, self._learned = calls, learned

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self._attend(
                *args[:3], **{k: v for k, v in (kwargs or {}).items() if k in ("query", "key", "value")}
            )
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.is_meta:
            if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
                return first.flatten(0, args[1].ndim - 1)[: self._learned]
            if func in (Tensor.nonzero, torch.nonzero):
                return first.new_zeros(self._learned, first.ndim, dtype=torch.long)
            if func in (Tensor.all, torch.all) and len(args) == 1:
                return torch.tensor(True)
            if func in (Tensor.sum, torch.sum) and len(args) == 1 and first.dtype == torch.bool:
                return torch.tensor(first.numel())
            if func in (Tensor.max, torch.max) and len(args) == 1 and not first.is_floating_point():
                return torch.tensor(0)
        return func(*args, **(kwargs or {}))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = query.shape[1]
        score, mix = 2.0 * heads * query.shape[-1], 2.0 * heads * value.shape[-1]
        call = Call(query.shape[-2], key.shape[-2], score + mix)
        self._calls.append(call)
        out: Tensor = _Attention.apply(query, key, value, call, score, mix)
        return out


class _Attention(torch.autograd.Function):
    """Stands in for an attention: right shapes, right gradients asked for, and what they cost."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call, score: float, mix: float) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out)
        ctx.call, ctx.score, ctx.mix = call, score, mix
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, _ = ctx.saved_tensors
        to_q, to_k, to_v = ctx.needs_input_grad[:3]
        # dV = P'dO; for dQ and dK first dP = dO V', then dS K and dS'Q
        ctx.call.backward += to_v * ctx.mix + (to_q or to_k) * ctx.mix + (to_q + to_k) * ctx.score
        grads = (torch.empty_like(x) if need else None for x, need in zip((q, k, v), (to_q, to_k, to_v), strict=True))
        return (*grads, None, None, None)
