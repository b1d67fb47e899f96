"""A pool of Ray actors that works off a list of jobs, and survives the death of any of them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from x2i.base.errors import X2IError

log = logging.getLogger(__name__)

#: Deaths of workers on one job after which the run gives up on it.
MOST_DEATHS = 20


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
