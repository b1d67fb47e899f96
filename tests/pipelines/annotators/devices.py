"""A GPU for tests on machines without one: torch's fake tensors have a device, a shape and a type, and no values.

Tensors of two devices that meet are an error there as on a real one. What depends on values goes on with zeros (arrays,
lists) and ones (scalars, how many are found). That the values are right is for other tests, on the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_KINDS = {torch.float32: "f4", torch.float16: "f2", torch.int64: "i8", torch.int32: "i4", torch.uint8: "u1"}


def _numpy(tensor: torch.Tensor, **given: Any) -> np.ndarray:
    if not isinstance(tensor, FakeTensor):
        return _REAL_NUMPY(tensor, **given)
    assert tensor.device.type == "cpu", "numpy() of a tensor that is on the GPU"
    assert tensor.dtype is not torch.bfloat16, "numpy() of bf16, which numpy does not have"
    return np.zeros(tuple(tensor.shape), _KINDS.get(tensor.dtype, "?"))


def _tolist(tensor: torch.Tensor) -> Any:
    return _numpy(tensor.cpu()).tolist() if isinstance(tensor, FakeTensor) else _REAL_TOLIST(tensor)


def _scalar(mode: Any, function: Any, tensor: torch.Tensor) -> Any:
    return True if tensor.dtype is torch.bool else 1.0 if tensor.dtype.is_floating_point else 1


def _nonzero(mode: Any, function: Any, tensor: torch.Tensor) -> torch.Tensor:
    with mode:
        return torch.zeros(1, tensor.ndim, dtype=torch.int64, device=tensor.device)


def _tensor(data: Any, device: Any = None, **given: Any) -> torch.Tensor:
    if isinstance(data, list):
        data = [0 if isinstance(d, FakeTensor) else d for d in data]
    made = _REAL_TENSOR(data, **given)
    return torch.empty(made.shape, dtype=made.dtype, device=device)  # of a constant the mode keeps the values


_REAL_NUMPY, _REAL_TOLIST, _REAL_TENSOR = torch.Tensor.numpy, torch.Tensor.tolist, torch.tensor
_OPERATORS = {torch.ops.aten._local_scalar_dense.default: _scalar, torch.ops.aten.nonzero.default: _nonzero}


@contextlib.contextmanager
def gpu(runtime: Any, *modules: torch.nn.Module) -> Iterator[None]:
    """The modules and the `Runtime` are on a GPU, for good. Raises where a tensor of the CPU meets one of the GPU's."""
    with (
        mock.patch.object(torch.Tensor, "numpy", _numpy),
        mock.patch.object(torch.Tensor, "tolist", _tolist),
        mock.patch.object(torch, "tensor", _tensor),
        mock.patch.dict(fake_impls.op_implementations_dict, _OPERATORS),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        runtime.device = torch.device("cuda")
        for module in modules:
            module.to("cuda")
        yield
