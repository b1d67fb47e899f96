"""A run on Ray: so many workers of Ray Train, on this machine or on the cluster that made the corpus.

Ray Train starts the workers, joins them into one process group, and starts them anew when one is lost; from there on
the run is what it is under torchrun, and goes on from its newest checkpoint. Corpora and output must lie where all workers
see them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from x2i.base.cluster import ray_session
from x2i.base.errors import ElsewhereError, RecipeError, Stopped, X2IError
from x2i.trainer import checkpoint
from x2i.trainer.config import RunConfig, load_run
from x2i.trainer.progress import Progress, Silent
from x2i.trainer.run import Result, result_of

log = logging.getLogger(__name__)

#: Where Ray Train writes its own records, in the run's folder.
FOLDER = "ray"

_POLL_SECONDS = 0.5


def train_on_ray(
    run: str | Path | RunConfig,
    workers: int,
    address: str | None = None,
    *,
    retries: int = 3,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Train on Ray, or go on from the newest checkpoint of the run's output.

    Args:
        run: a run file, or its content.
        workers: ranks; each gets a GPU where the cluster has so many, else a CPU.
        address: of a cluster (`auto`, `ray://host:10001`); None: Ray is started on this machine.
        retries: how often all workers are started anew after one was lost.
        progress: is told what happens.
        options: of `x2i.trainer.run.train`.

    Raises:
        RecipeError: the run file is wrong.
        X2IError: the cluster cannot be reached, or the run failed.
        Stopped: the run was asked to stop, and wrote a checkpoint; or twice, and has not.
    """
    config = run if isinstance(run, RunConfig) else load_run(run)
    with ray_session(workers, address):
        import ray
        from ray.train import FailureConfig, ScalingConfig
        from ray.train import RunConfig as RayRun
        from ray.train.torch import TorchTrainer

        if (free := int(ray.cluster_resources().get("CPU", 0))) < workers:
            raise RecipeError(f"--workers {workers}: Ray has {free} CPUs; give that many at most")
        gpus = config.device in ("auto", "cuda") and ray.cluster_resources().get("GPU", 0) >= workers
        mailbox = ray.remote(_Mailbox).options(num_cpus=0).remote()
        trainer = TorchTrainer(
            _work,
            train_loop_config={
                "run": config.model_dump(mode="json"),
                "folder": str(Path.cwd()),
                "mailbox": mailbox,
                "options": options,
            },
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus, resources_per_worker={"CPU": 1}),
            run_config=RayRun(
                name=FOLDER,
                storage_path=str(config.output.absolute()),
                failure_config=FailureConfig(max_failures=retries),
            ),
        )
        with _listening(mailbox, progress or Silent()):
            try:
                _fit(trainer, mailbox, progress or Silent())
            except Exception as error:  # noqa: BLE001 - Ray's errors have many classes
                told = ray.get(mailbox.failure.remote()) or str(error).strip().splitlines()[-1]
                raise X2IError(f"{config.output}: the run failed on Ray: {told}") from None
        failure, found, stopped = ray.get([m.remote() for m in (mailbox.failure, mailbox.found, mailbox.stopped)])
    if stopped:
        raise Stopped(stopped)
    if failure:
        raise X2IError(failure)
    return result_of(config, checkpoint.find(config.output), **found)


def _fit(trainer: Any, mailbox: Any, progress: Progress) -> None:
    """Run it in a thread: here signals are waited for, and the first of them asks for a checkpoint."""
    failed: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001 - raised below
            failed.append(error)

    def ask(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, stop)
        mailbox.stop.remote(number)
        progress.note("stopping after this step; once more to stop at once")

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    thread = threading.Thread(target=fit, name="x2i-ray", daemon=True)
    thread.start()
    main = threading.current_thread() is threading.main_thread()
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        for each in before:
            signal.signal(each, ask)
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if failed:
        raise failed[0]


def _work(config: dict[str, Any]) -> None:
    """What each worker does."""
    import ray

    from x2i.base.config import parse_config
    from x2i.trainer.run import train

    os.chdir(config["folder"])
    mailbox = config["mailbox"]
    rank = int(os.environ.get("RANK", 0))
    try:
        run = parse_config(RunConfig, config["run"], "run")
        ask = _Asked(mailbox) if rank == 0 else int
        done = train(run, progress=_Sent(mailbox), ask=ask, **config["options"])
    except Stopped as stopped:
        ray.get(mailbox.stop_done.remote(stopped.args[0]))
        return
    except X2IError as error:  # nothing that a second try could mend
        ray.get(mailbox.fail.remote(rank, str(error), isinstance(error, ElsewhereError)))
        return
    if rank == 0:
        now = ("steps_now", "seconds", "train_loss", "damaged")
        ray.get(mailbox.finish.remote({name: getattr(done, name) for name in now}))


class _Mailbox:
    """Lies between the first worker and the one who waits: an actor."""

    def __init__(self) -> None:
        self._events: list[tuple[str, tuple[Any, ...]]] = []
        self._failures: dict[int, tuple[bool, str]] = {}
        self._found: dict[str, Any] = {}
        self._asked = self._stopped = 0

    def stop(self, number: int) -> None:
        """The run is to stop, by this signal."""
        self._asked = number

    def asked(self) -> int:
        """The signal by which the run is to stop, or 0."""
        return self._asked

    def stop_done(self, number: int) -> None:
        """A rank has stopped."""
        self._stopped = number

    def stopped(self) -> int:
        """The signal by which the run has stopped, or 0."""
        return self._stopped

    def tell(self, what: str, *values: Any) -> None:
        """A call of the progress."""
        self._events.append((what, values))

    def take(self) -> list[tuple[str, tuple[Any, ...]]]:
        """What was told since the last call."""
        out, self._events = self._events, []
        return out

    def fail(self, rank: int, message: str, elsewhere: bool) -> None:
        """A rank cannot go on, perhaps for what another one tells."""
        self._failures[rank] = elsewhere, message

    def failure(self) -> str | None:
        """Why the run ended, if it failed: as the lowest rank says that knows more than that another one failed."""
        told = [self._failures[rank] for rank in sorted(self._failures)]
        return min(told, key=lambda failure: failure[0])[1] if told else None

    def finish(self, found: dict[str, Any]) -> None:
        """All is done."""
        self._found, self._failures = found, {}

    def found(self) -> dict[str, Any]:
        """What `finish` was given."""
        return self._found


class _Asked:
    """The signal by which the run is to stop, as the mailbox last said: nothing waits for its answer."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._answer = mailbox.asked.remote()
        self._known = 0

    def __call__(self) -> int:
        import ray

        if not self._known and ray.wait([self._answer], timeout=0)[0]:
            self._known = ray.get(self._answer)
            self._answer = self._mailbox.asked.remote()
        return self._known


class _Sent:
    """A progress whose calls are made elsewhere."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def start(self, total: int, done: int) -> None:
        self._mailbox.tell.remote("start", total, done)

    def step(self, stage: str, done: int, loss: float, by_task: dict[str, float]) -> None:
        self._mailbox.tell.remote("step", stage, done, loss, by_task)

    def speed(self, text: str) -> None:
        self._mailbox.tell.remote("speed", text)

    def note(self, message: str) -> None:
        self._mailbox.tell.remote("note", message)

    def close(self) -> None:
        self._mailbox.tell.remote("close")


@contextlib.contextmanager
def _listening(mailbox: Any, progress: Progress) -> Iterator[None]:
    """Within the block what the first worker tells reaches `progress`."""
    import ray

    over = threading.Event()

    def deliver() -> None:
        for what, values in ray.get(mailbox.take.remote()):
            getattr(progress, what)(*values)

    def listen() -> None:
        while not over.wait(_POLL_SECONDS):
            deliver()

    thread = threading.Thread(target=listen, name="x2i-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        deliver()
