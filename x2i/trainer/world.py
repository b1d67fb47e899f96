"""The processes that train together: who this one is, and how they agree. One process alone is a world, too.

Started by torchrun (RANK, WORLD_SIZE and LOCAL_RANK in the environment) or by Ray Train, which has joined them already.
What ranks tell each other here goes over gloo, beside the tensors that FSDP moves by NCCL on GPUs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from x2i.base.errors import ElsewhereError, RecipeError, X2IError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


def launched() -> bool:
    """Whether a launcher has started this process as one of several (or as the only one) that train together."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def first_of_launch() -> bool:
    """Whether this process is the one that speaks: rank 0, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def turn() -> float:
    """Where in a list of work this process begins, so that those of its launch begin at different places: 0 to 1."""
    return int(os.environ.get("RANK", 0)) / max(int(os.environ.get("WORLD_SIZE", 1)), 1) if launched() else 0.0


def is_lost_contact(error: BaseException) -> bool:
    """Whether an error says that another rank is gone, or does not answer."""
    return isinstance(error, RuntimeError) and any(w in str(error) for w in ("gloo", "NCCL", "Connection", "Timed out"))


class World:
    """Attributes: `rank` of `size`; `first`: whether it is rank 0, which writes; `local`: its number on this machine."""

    def __init__(self, timeout_minutes: float = 30, alone: bool = False) -> None:
        """Join the others, if there are any.

        Args:
            timeout_minutes: how long a rank waits for another before it gives up.
            alone: be one process whatever the launcher says.

        Raises:
            RecipeError: the launcher does not say where the others are.
        """
        self.rank, self.size, self.local = 0, 1, 0
        self.group: ProcessGroup | None = None
        self.writers: ProcessGroup | None = None  # of the threads that write checkpoints: their talk is their own
        self._joined = False
        if alone or not launched():
            return
        import torch
        import torch.distributed as dist

        timeout = timedelta(minutes=timeout_minutes)
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        if not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(self.local)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            try:
                dist.init_process_group(backend, timeout=timeout)
            except ValueError as error:  # what torch makes of a variable that is not there
                raise RecipeError(
                    f"RANK and WORLD_SIZE are set, as by a launcher, but the others cannot be found ({error}): start by "
                    "torchrun, which sets the rest, or unset the two"
                ) from None
            self._joined = True
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        if self.size > 1:
            self.group = dist.new_group(backend="gloo", timeout=timeout)
            self.writers = dist.new_group(backend="gloo", timeout=timeout)

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device of the run file as this rank's own: its GPU where there are some."""
        import torch

        if self.size == 1 or name not in ("auto", "cuda"):
            return name
        return f"cuda:{self.local}" if torch.cuda.is_available() else "cpu"

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value added up over the ranks, in float64."""
        if self.group is None:
            return list(values)
        import torch
        import torch.distributed as dist

        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return [float(v) for v in total]

    def gather(self, value: Any) -> list[Any]:
        """What every rank has, in the ranks' order, on every rank."""
        if self.group is None:
            return [value]
        import torch.distributed as dist

        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value, group=self.group)
        return out

    def tell(self, value: Any) -> Any:
        """What rank 0 has, on every rank."""
        if self.group is None:
            return value
        import torch.distributed as dist

        told = [value]
        dist.broadcast_object_list(told, src=0, group=self.group)
        return told[0]

    def agree(self, fault: X2IError | OSError | None) -> None:
        """All ranks say whether they can begin, and none waits for one that cannot.

        Raises:
            X2IError: this rank's fault, or that another one has some. What rank 0 says, too, it says for all.
            OSError: this rank's fault.
        """
        told = self.gather(None if fault is None else str(fault))
        if fault is None:
            failed = [str(rank) for rank, what in enumerate(told) if what is not None]
            if failed:
                raise ElsewhereError(f"rank {', '.join(failed)} cannot begin: its message says why")
        elif self.first or (isinstance(fault, RecipeError) and told[0] == str(fault)):
            raise fault
        elif told[0] == str(fault):
            raise ElsewhereError("this rank cannot begin either: rank 0 says why")
        else:
            raise (
                X2IError(str(fault)) if isinstance(fault, RecipeError) else fault
            )  # a recipe's is said by rank 0 alone

    def share(self, shards: int | None) -> tuple[int, int] | None:
        """Which part of the weights this rank holds, and of how many, on the mesh of `mesh`; None: all of them."""
        return None if self.size == 1 else (self.rank % (shards or self.size), shards or self.size)

    def mesh(self, device: torch.device, shards: int | None) -> Any:
        """The ranks as FSDP wants them: one dimension to shard over, or replicas of `shards` ranks each."""
        from torch.distributed.device_mesh import init_device_mesh

        shards = shards or self.size
        if shards == self.size:
            return init_device_mesh(device.type, (self.size,))
        return init_device_mesh(device.type, (self.size // shards, shards), mesh_dim_names=("replicate", "shard"))

    @contextlib.contextmanager
    def alike(self) -> Iterator[None]:
        """Within the block all ranks do the same: what is to be warned of is told by rank 0 alone."""
        before = logging.root.manager.disable
        logging.disable(before if self.first else max(before, logging.WARNING))
        try:
            with warnings.catch_warnings():
                if not self.first:
                    warnings.simplefilter("ignore")
                yield
        finally:
            logging.disable(before)

    def close(self) -> None:
        """Leave, if this process joined by itself."""
        if self._joined:
            import torch.distributed as dist

            self._joined = False
            dist.destroy_process_group()
