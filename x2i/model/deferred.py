"""A network built without the memory of its weights, and yet with the numbers that they would have had.

Networks draw their first weights while they are built, one after the other from one stream of random numbers, and some
draw them twice. Here parameters lie on the meta device as soon as they are registered; what is written to one is done
for real on a tensor that is given up at once, and of it the rows are kept that this rank will hold. So the memory is the
rank's share and one tensor more. Buffers are none of this: they are computed as they always are.

What is read from a parameter on the way (the spread of an embedding, by which a table is drawn) is made once more, from
the state that the random numbers had.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from x2i.base.errors import X2IError

#: Operators that write number by number without looking at others, so that a part is treated as the whole is.
_ALIKE = {"zero_", "fill_", "mul_", "add_", "sub_", "div_", "neg_", "erfinv_", "clamp_", "clamp_min_", "clamp_max_"}
#: Operators that ask for a tensor's shape alone.
_SHAPE = {"empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full"}
#: Numbers that are remembered as they are, of what a parameter is registered with and of what is copied into it.
_FEW = 1 << 16

M = TypeVar("M", bound=nn.Module)

_truncated = nn.init._no_grad_trunc_normal_


def build(make: Callable[[], M], place: int = 0, of: int = 1, keep: bool = True) -> tuple[M, dict[str, Tensor]]:
    """Build a network whose parameters lie on the meta device.

    Args:
        make: builds it; random numbers are those of the moment, as always.
        place: this rank among the `of` that divide the weights by rows, as FSDP does.
        keep: whether the first numbers are wanted; without, nothing is drawn.

    Returns:
        The network; and, by each parameter's name (of tied ones the first), the rows of it that this rank holds.

    Raises:
        X2IError: the network reads weights while it is built that are not remembered.
    """
    if not keep:
        with _registering(lambda parameter: nn.Parameter(_hollow(parameter), parameter.requires_grad)):
            return make(), {}
    recorder = _Recorder(place, of)
    _active.append(recorder)
    try:
        with _registering(recorder.register), _truncating(recorder.truncated), recorder:
            model = make()
    finally:
        _active.pop()
    return model, {name: recorder.part(parameter) for name, parameter in model.named_parameters()}


def readable(tensor: Tensor) -> bool:
    """Whether a tensor has numbers: it lies on a device, or belongs to a network that is being built with them."""
    return not tensor.is_meta or any(recorder.held(tensor) for recorder in _active)


@dataclass
class _Held:
    """A parameter: this rank's numbers from number `first` on, and how all of them come about.

    `done` are the calls that wrote to it, each with the part of it that it wrote to and the state of the random numbers,
    over `base`, what there was before (None: nothing that matters); `done` is None where that is not remembered.
    """

    parameter: Tensor
    first: int
    part: Tensor
    base: Tensor | None
    done: list[Callable[[Tensor], None]] | None


_active: list[_Recorder] = []


class _Recorder(TorchDispatchMode):
    """Within, what is done to registered parameters is done to the parts of them that are kept."""

    def __init__(self, place: int, of: int) -> None:
        super().__init__()
        self._place, self._of = place, of
        self._by_storage: dict[int, _Held] = {}

    def held(self, tensor: Any) -> _Held | None:
        """What is known of a parameter or a view of one; None for any other tensor."""
        if not isinstance(tensor, Tensor) or not tensor.is_meta:
            return None
        return self._by_storage.get(tensor.untyped_storage()._cdata)

    def register(self, parameter: nn.Parameter) -> nn.Parameter:
        """What stands in for a parameter from now on."""
        out = nn.Parameter(_hollow(parameter), parameter.requires_grad)
        flat = parameter.detach().reshape(-1)
        count = len(parameter) if parameter.ndim else 1
        each, row = -(-count // self._of), flat.numel() // max(count, 1)
        first, last = (min(place * each, count) * row for place in (self._place, self._place + 1))
        few = flat.numel() <= _FEW
        self._by_storage[out.untyped_storage()._cdata] = _Held(
            *(out, first, flat[first:last].clone(), flat.clone() if few else None, [] if few else None)
        )
        return out

    def part(self, parameter: Tensor) -> Tensor:
        """This rank's rows of a parameter."""
        held = self.held(parameter)
        assert held is not None
        return held.part.view(-1 if held.part.numel() else 0, *parameter.shape[1:])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(self.held(x) for x in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        name, schema = func.overloadpacket.__name__, func._schema
        if name in _SHAPE:
            return func(*tree_map(lambda x: torch.empty(x.shape, dtype=x.dtype) if self.held(x) else x, args), **kwargs)
        written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
        if not any(written):
            if schema.returns and all(r.alias_info is not None for r in schema.returns):  # a view
                return func(*args, **kwargs)
            return func(*tree_map(self._whole, args), **tree_map(self._whole, kwargs))
        target, rest, kwargs = args[0], tree_map(self._whole, args[1:]), tree_map(self._whole, kwargs)
        held = self.held(target)
        if held is None:
            return func(target, *rest, **kwargs)
        tensors = [x for x in tree_leaves((rest, kwargs)) if isinstance(x, Tensor)]
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        self._write(
            *(held, target, lambda real: func(real, *rest, **kwargs), drawn),
            anew=drawn or name in ("copy_", "zero_", "fill_"),
            alike=name in _ALIKE and not tensors,
            lost=kwargs.get("generator") is not None or any(x.numel() > _FEW for x in tensors),
        )
        return target

    def truncated(self, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`nn.init.trunc_normal_`, which does nothing on the meta device."""
        held = self.held(target)
        if held is None:
            return _truncated(target, *args, **kwargs)
        self._write(held, target, lambda real: _truncated(real, *args, **kwargs), drawn=True, anew=True)
        return target

    def _write(
        self,
        held: _Held,
        target: Tensor,
        call: Callable[[Tensor], Any],
        drawn: bool,
        anew: bool,
        alike: bool = False,
        lost: bool = False,
    ) -> None:
        """Do to a parameter, or to a view of one, what is to be done to it.

        Args:
            held: the parameter; `target`: what is written to.
            call: writes to a tensor like `target`.
            drawn: whether it takes random numbers.
            anew: whether what was there before does not matter; `alike`: whether it treats each number alone.
            lost: whether it cannot be called again.
        """
        where = target.size(), target.stride(), target.storage_offset()
        state = torch.get_rng_state() if drawn else None

        def again(whole: Tensor) -> None:
            with torch.random.fork_rng(devices=[], enabled=drawn):
                if state is not None:
                    torch.set_rng_state(state)
                call(whole.as_strided(*where))

        all_of_it = target.is_contiguous() and target.numel() == held.parameter.numel()
        if all_of_it and anew:
            held.base, held.done = None, []
        if all_of_it and alike:
            call(held.part)
        else:
            count = held.parameter.numel()
            fresh = all_of_it and anew
            whole = torch.empty(count, dtype=held.parameter.dtype) if fresh else self._numbers(held)
            call(whole.as_strided(*where))
            held.part.copy_(whole[held.first : held.first + held.part.numel()])
        if lost:
            held.done = None
        elif held.done is not None:
            held.done.append(again)

    def _whole(self, x: Any) -> Any:
        """Of a parameter or a view of one all numbers; of anything else itself."""
        held = self.held(x)
        return x if held is None else self._numbers(held).as_strided(x.size(), x.stride(), x.storage_offset())

    def _numbers(self, held: _Held) -> Tensor:
        if held.done is None:
            raise X2IError(
                f"this network reads a weight of {list(held.parameter.shape)} while it is built, which cannot be done for "
                "several ranks: train it on one"
            )
        shape = held.parameter.numel()
        whole = torch.empty(shape, dtype=held.parameter.dtype) if held.base is None else held.base.clone()
        for again in held.done:
            again(whole)
        return whole


def _hollow(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta", memory_format=torch.contiguous_format)


@contextlib.contextmanager
def _registering(instead: Callable[[nn.Parameter], nn.Parameter]) -> Iterator[None]:
    """Within the block another parameter is registered in place of each that is not on the meta device."""
    register = nn.Module.register_parameter

    def registered(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(self, name, parameter if parameter is None or parameter.is_meta else instead(parameter))

    nn.Module.register_parameter = registered
    try:
        yield
    finally:
        nn.Module.register_parameter = register


@contextlib.contextmanager
def _truncating(instead: Callable[..., Tensor]) -> Iterator[None]:
    nn.init._no_grad_trunc_normal_ = instead
    try:
        yield
    finally:
        nn.init._no_grad_trunc_normal_ = _truncated
