"""A pool of Ray actors that works off a list of jobs, and survives the death of any of them."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from x2i.base.errors import X2IError

log = logging.getLogger(__name__)

#: Deaths of workers on one job after which the run gives up on it.
MOST_DEATHS = 20

#: Ray's shared-memory store: no pixels go through it, so the smallest that Ray takes is enough.
OBJECT_STORE = 80 * 2**20


@contextlib.contextmanager
def ray_session(workers: int | None, address: str | None) -> Iterator[int]:
    """Start Ray in this process, or connect to a cluster; yields the number of workers to use.

    Args:
        workers: how many; None takes every CPU.
        address: `ray://host:10001` or `auto` for a running cluster; None starts a local one.

    Raises:
        X2IError: the cluster cannot be reached.
    """
    token = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    if address and ("RAY_AUTH_TOKEN" in os.environ or Path(token).is_file()):
        # clusters ask for a token by default, and Ray's client sends the one it has only if it is told to
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # leaves CUDA_VISIBLE_DEVICES alone
    os.environ.setdefault("RAY_enable_metrics_collection", "0")
    import ray

    terminate = signal.getsignal(signal.SIGTERM)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    began = not ray.is_initialized()
    try:
        if not began:
            pass  # the caller's own session is used, and left running
        elif address:
            import x2i

            # the cluster's machines need this package, not its dependencies, which they must have
            quiet["runtime_env"] = {"py_modules": [str(Path(x2i.__file__).parent)]}
            ray.init(address=address, **quiet)
        else:
            cpus = workers or os.cpu_count() or 1
            ray.init("local", num_cpus=cpus, include_dashboard=False, object_store_memory=OBJECT_STORE, **quiet)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        hint = (
            "\nIf the cluster asks for a token, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH must give it." if address else ""
        )
        raise X2IError(f"Ray: cannot reach {address or 'a local cluster'}: {error}{hint}") from None
    if terminate is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)  # Ray puts its own in the place of the caller's
    # Ray prints what it has to say on stdout, where a result in JSON may be expected, and goes on until it has ended
    with contextlib.redirect_stdout(sys.stderr):
        try:
            yield workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        finally:
            if began:
                ray.shutdown()


@dataclass
class Job:
    """A call of one method of the worker. `deaths` counts the workers that it took with it."""

    method: str
    arguments: tuple[Any, ...]
    deaths: int = 0


#: Called with a job whose worker died; gives the job to try instead.
Revive = Callable[[Job], Job]


class Pool:
    """Actors of one class, made by `create`; each has one job at a time.

    Args:
        create: makes a new actor, e.g. `lambda: ray.remote(Worker).remote(…)`.
        size: how many actors at most; they are made when there are jobs for them, and stay.
    """

    def __init__(self, create: Callable[[], Any], size: int) -> None:
        self._create, self._size = create, size
        self._idle: list[Any] = []

    def run(self, jobs: list[Job], revive: Revive) -> Iterator[tuple[Job, Any]]:
        """Yield each job with its result, as they end.

        Args:
            revive: called with a job whose worker died; gives the job to try instead.

        Raises:
            X2IError: a job raised, or killed `MOST_DEATHS` workers; or workers cannot start at all.
        """
        import ray
        from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayTaskError

        waiting: deque[Job] = deque(jobs)
        running: dict[Any, tuple[Any, Job]] = {}
        while len(self._idle) < min(self._size, len(jobs)):
            self._idle.append(self._create())
        stillborn = 0
        while waiting or running:
            while waiting and self._idle:
                actor, job = self._idle.pop(), waiting.popleft()
                running[getattr(actor, job.method).remote(*job.arguments)] = (actor, job)
            (done,), _ = ray.wait(list(running), num_returns=1)
            actor, job = running.pop(done)
            try:
                result = ray.get(done)
            except (RayActorError, OutOfMemoryError) as death:
                stillborn += 1
                job = revive(_bury(job, death, stillborn))
                self._idle.append(self._create())
                waiting.append(job)
                continue
            except RayTaskError as error:
                raise _explain(error) from None
            except GetTimeoutError as error:  # pragma: no cover
                raise X2IError(f"Ray did not answer: {error}") from None
            stillborn = 0
            self._idle.append(actor)
            yield job, result


def _bury(job: Job, death: Exception, in_a_row: int) -> Job:
    if "creation task" in str(death):
        raise X2IError(f"a worker could not be set up:\n{death}") from None
    if in_a_row > MOST_DEATHS or job.deaths >= MOST_DEATHS:
        raise X2IError(
            f"workers keep dying ({job.deaths + 1} on one job, {in_a_row} in a row); the last one: {death}\n"
            "What is done is kept: mend the cause and run the same command again."
        ) from None
    log.warning("a worker died (%s); its job is tried again", str(death).splitlines()[0])
    job.deaths += 1
    return job


def _explain(error: Any) -> X2IError:
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, OSError):
        return X2IError(f"{cause}\nWhat is done is kept: make room or mend the path, and run the same command again.")
    if isinstance(cause, X2IError):
        return X2IError(str(cause))
    return X2IError(f"a worker failed:\n{error}")


def through(work: Callable[[list[Job]], Iterator[tuple[Job, Any]]]) -> Callable[..., Iterator[Any]]:
    """By workers that have a method `call(function, *arguments)`."""

    def run(function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        return (result for _, result in work([Job("call", (function, *job)) for job in jobs]))

    return run
