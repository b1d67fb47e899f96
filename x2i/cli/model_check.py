"""Loads one annotator in a process of its own and runs it on a photograph: what `x2i models check` is made of.

A process each, so that the peak of memory is the annotator's own, and a crash costs no other.
`python -m x2i.cli.model_check` reads the annotator as JSON on stdin and writes what it found on stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from x2i.cli.model_rows import Wanted
    from x2i.pipelines.annotators.base import Annotator, Batch


def check(one: Wanted, timeout: float, fetch: bool = True) -> dict[str, Any]:
    """Check one annotator: fetch its weights if they can be had (with `fetch`), compare hashes, load, run.

    Returns:
        `status`: "works" (ran on a photograph), "loads" (it reads columns of others, so it was only set up),
        "missing" (weights, a package or a setting are not here), or "failed"; `reason` says why, `remedy` what
        helps; then `seconds` (of setting up and of the call) and `peak_mb`, null where it did not come to that.
    """
    from x2i.base.errors import X2IError
    from x2i.cli.model_rows import apart

    found: dict[str, Any] = {"annotator": one.name, "status": "missing", "reason": "", "remedy": ""}
    found |= {"seconds": None, "peak_mb": None}
    if one.broken:
        return found | {"status": "failed", "reason": one.broken}
    if one.annotator is None:
        return found | {"reason": f"needs: {one.needs}"}
    for weights in one.weights:
        if not fetch and weights.local() is None:
            return found | {"reason": f"weights {weights.spec}: not here", "remedy": weights.remedy}
        try:
            weights.fetch()
        except X2IError as error:
            reason, remedy = apart(error, weights)
            status = "missing" if weights.local() is None else "failed"
            return found | {"status": status, "reason": reason, "remedy": remedy}
    return found | _in_process(one.annotator, timeout)


def _in_process(annotator: Annotator, timeout: float) -> dict[str, Any]:
    asked = {
        "kind": type(annotator).__module__.rpartition(".")[2],
        "config": annotator.config.model_dump(mode="json"),
        "decoding": annotator.decoding.model_dump(mode="json"),
    }
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(
            command, input=json.dumps(asked), capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"did not end within {timeout:.0f} seconds (--timeout)"}
    try:
        result: dict[str, Any] = json.loads(done.stdout)
        return result
    except ValueError:
        said = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        how = f"was killed by signal {-done.returncode}" if done.returncode < 0 else f"ended with {done.returncode}"
        return {"status": "failed", "reason": f"the process {how}: {said[0]}"}


def tried(asked: dict[str, Any]) -> dict[str, Any]:
    """Make, set up and call an annotator, in this process. Never raises: what is raised is the reason."""
    from x2i.base.errors import X2IError
    from x2i.pipelines import annotators, registry
    from x2i.pipelines.annotators.base import Annotator, Decoding

    batch = _photograph()
    try:
        start = time.perf_counter()
        kind = registry.find(annotators, asked["kind"], Annotator, "annotators")
        annotator = kind(kind.Config.model_validate(asked["config"]), Decoding.model_validate(asked["decoding"]))
        annotator.setup()
        ready = time.perf_counter()
        runs = set(annotator.reads) <= {"rows.text"}
        if runs:
            table = annotator(batch)
            if table.num_rows != 1:
                raise ValueError(f"gave {table.num_rows} rows for one photograph")
            table.select(annotator.columns.names).cast(annotator.columns)
        seconds = {"setup": round(ready - start, 2), "call": round(time.perf_counter() - ready, 2) if runs else None}
        return {"status": "works" if runs else "loads", "seconds": seconds, "peak_mb": round(_peak() / 1e6, 1)}
    except X2IError as error:
        needs_package = "needs the package" in str(error)
        return {"status": "missing" if needs_package else "failed", "reason": str(error)}
    except Exception as error:  # noqa: BLE001 - whatever a model raises is what was asked for
        return {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}


def _photograph() -> Batch:
    """One packaged photograph with its text, as the engine gives it."""
    import pyarrow as pa

    from x2i.pipelines.annotators.base import Batch, Item
    from x2i.pipelines.images import decode, read_header
    from x2i.pipelines.quickstart import photographs

    files = photographs()
    name = next(n for n in files if n.startswith("astronaut") and not n.endswith(".txt"))
    text = files["astronaut.txt"].decode()
    header = read_header(files[name])
    pixels = decode(files[name], header)
    pixels.flags.writeable = False
    return Batch([Item("0" * 64, text, files[name], header, pixels)], pa.table({"rows.text": [text]}))


def _peak() -> int:
    """The most memory that this process ever held, in bytes."""
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def main() -> None:
    """Read the request on stdin, answer on stdout; whatever libraries print goes to stderr."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    result = tried(json.load(sys.stdin))
    answer.write(json.dumps(result))
    answer.flush()


if __name__ == "__main__":
    main()
