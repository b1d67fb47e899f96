"""Ray: a session in this process, or on a cluster. What makes corpora and what trains on them begin here."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from x2i.base.errors import X2IError

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
