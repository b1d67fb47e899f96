"""Checkpoints are written while the training goes on: copied to host memory at once, to disk by a thread of each rank.

Weights and the optimiser's state go by torch.distributed.checkpoint: each rank copies and writes what it holds, nothing
is gathered, and another number of ranks can read it. Rank 0 writes the rest, which is small. A checkpoint appears under
its name when all of it is on disk.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from x2i.base.errors import ElsewhereError, X2IError
from x2i.base.files import aside, remove
from x2i.trainer import checkpoint
from x2i.trainer.onefile import OneFile
from x2i.trainer.world import World

_MOMENTS = ("exp_avg", "exp_avg_sq")

# one process alone is no oversight
warnings.filterwarnings("ignore", message="torch.distributed is disabled", module="torch.distributed.checkpoint")


class Saver:
    """Writes one checkpoint at a time. Errors of the writing are raised by the next call, on all ranks."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether the writing has ended in an error that `wait` will raise."""
        return self._error is not None

    def save(
        self,
        target: Path,
        files: Mapping[str, Any],
        weights: Mapping[str, Mapping[str, Tensor]],
        optimizer: Mapping[str, Tensor] | None,
        done: Callable[[], None],
    ) -> None:
        """Begin to write; all ranks call this together.

        Args:
            target: the folder step-NNNNNN.
            files: as of `checkpoint.fill`, of rank 0; what they hold is not changed any more.
            weights: the tensors of each safetensors file, by the file's name: of `Copies`.
            optimizer: of `state_of`; copied before this returns.
            done: called in rank 0's thread when the checkpoint is there.

        Raises:
            X2IError: the one before could not be written, or nothing can be written at all.
        """
        self.wait()
        temporary, fault = None, None
        if self._world.first:
            temporary = aside(target)
            try:
                temporary.mkdir(parents=True)
            except OSError as error:
                fault = str(checkpoint.unwritten(target, error))
        temporary, fault = self._world.tell((temporary, fault))
        if fault:
            raise X2IError(fault)
        state = None if optimizer is None else Copies().of(optimizer)
        self._thread = threading.Thread(
            target=self._finish, args=(temporary, target, files, dict(weights), state, done), name="x2i-checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until all is written; all ranks call this together. Raises X2IError where it could not be."""
        self.join()
        error, self._error = self._error, None
        told = [e for e in self._world.gather(None if error is None else str(error)) if e]
        if error is not None and (self._world.first or not isinstance(error, X2IError)):
            raise error
        if told and self._world.first:
            raise X2IError(told[0])
        if told:
            raise ElsewhereError("a checkpoint cannot be written: rank 0 says why")

    def join(self) -> None:
        """Wait for this rank's thread alone, whatever comes of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _finish(
        self,
        temporary: Path,
        target: Path,
        files: Mapping[str, Any],
        weights: dict[str, Mapping[str, Tensor]],
        optimizer: Mapping[str, Tensor] | None,
        done: Callable[[], None],
    ) -> None:
        try:
            for name in list(weights):
                self._put(weights.pop(name), OneFile(temporary / name), target / name)
            if optimizer is not None:
                name = checkpoint.OPTIMIZER
                writer = dcp.FileSystemWriter(temporary / name, per_thread_copy_ahead=0)  # all is in host memory
                self._put(optimizer, writer, target / name)
            if self._world.first:
                checkpoint.fill(temporary, files, target)
                done()
        except BaseException as error:  # noqa: BLE001 - a thread's errors are raised by `wait`
            if self._world.first:
                remove(temporary)
            self._error = checkpoint.unwritten(target, error) if isinstance(error, OSError) else error

    def _put(self, state: Mapping[str, Tensor], writer: dcp.StorageWriter, place: Path) -> None:
        """Write a state, each rank its part: all ranks do it together."""
        try:
            dcp.save(dict(state), storage_writer=writer, process_group=self._world.writers)
        except (CheckpointException, RuntimeError) as error:  # what torch makes of a full disk
            causes = getattr(error, "failures", None) or {0: (error,)}
            raise checkpoint.unwritten(place, next(iter(causes.values()))[0]) from None


class Copies:
    """Copies in host memory of what this rank holds of tensors, divided or not: of each one alone, in however many states."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # with the tensor, so that its number stays its own

    def of(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The copies by the same names."""
        return {name: self._copied(tensor) for name, tensor in state.items()}

    def _copied(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._made:
            self._made[id(tensor)] = tensor, tensor.detach().to("cpu", copy=True)
        return self._made[id(tensor)][1]


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state by the parameters' names: `<name>.exp_avg`, `<name>.exp_avg_sq`, `<name>.step`."""
    out = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            out[f"{name}.{key}"] = value
    return out


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, place: Path) -> None:
    """Read a checkpoint's state of the optimiser, written by whatever number of ranks. Raises X2IError."""
    reader = dcp.FileSystemReader(place / checkpoint.OPTIMIZER)
    with checkpoint.resuming(place), _naming(place):
        for parameter in model.parameters():
            if parameter.requires_grad:
                state = {key: torch.zeros_like(parameter) for key in _MOMENTS}
                step = torch.zeros((), dtype=torch.float32, device=parameter.device)
                optimizer.state[parameter] = {"step": step, **state}
        dcp.load(state_of(model, optimizer), storage_reader=reader)


@contextlib.contextmanager
def _naming(place: Path) -> Iterator[None]:
    faults = (CheckpointException, OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError)
    try:
        yield
    except faults as error:
        told = str(error).strip().rpartition("\n")[2].partition(". ")[0] or type(error).__name__
        raise X2IError(f"{place / checkpoint.OPTIMIZER}: cannot be read ({told})") from None
