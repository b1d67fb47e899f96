"""Wall time, CPU and memory of a command and of everything that it starts, daemons included. Linux only.

This process becomes the *subreaper* of the command: whatever is orphaned below it becomes our child, so
that nothing escapes, and `wait4` tells its exact CPU time with that of the children it waited for. One
kind of process is never waited for: children of a parent that ignores SIGCHLD (Ray's raylet, and so all
of Ray's workers). For those the CPU time last seen counts, at most one sample (0.2 s) old.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")
PR_SET_CHILD_SUBREAPER = 36
IGNORES_SIGCHLD = 1 << (signal.SIGCHLD - 1)

#: Seconds between samples, and how many of them there are to one of memory: at five a second that would
#: take a tenth of a core from what is measured.
EVERY, WEIGHED = 0.2, 3

#: Seconds that what the command left behind may take to end before it is killed.
GRACE = 20.0


@dataclass
class Process:
    """One process as last seen: what it is called, its own CPU seconds, its highest PSS in bytes."""

    name: str
    cpu: float = 0.0
    pss: int = 0


@dataclass(frozen=True)
class Cost:
    """What a command cost: seconds of wall clock until it ended, CPU seconds of the tree, peak PSS in bytes."""

    code: int
    wall: float
    cpu: float
    pss: int
    processes: list[Process]


def run(command: list[str], log: Path, environment: dict[str, str]) -> tuple[Cost, str]:
    """Run a command; its stderr goes to `log`. Returns its cost and its stdout.

    Raises:
        OSError: the command cannot be started, or this is not Linux.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")
    out = log.with_suffix(".out")
    with log.open("wb") as errors, out.open("wb") as output:
        began = time.perf_counter()
        root = subprocess.Popen(command, stdout=output, stderr=errors, env=os.environ | environment)
        tree = _Tree(root.pid)
        tree.watch()
    assert tree.ended is not None
    wall = tree.ended - began
    root.returncode = tree.code  # it was reaped here, not by Popen
    cpu = tree.reaped + sum(tree.unreaped.values())
    return Cost(tree.code, wall, cpu, tree.peak, list(tree.seen.values())), out.read_text(errors="replace")


class _Tree:
    def __init__(self, root: int) -> None:
        self.root, self.code = root, -1
        self.ended: float | None = None  # when the command itself ended
        self.reaped = 0.0
        self.samples = 0
        self.unreaped: dict[int, float] = {}  # CPU last seen of those that nobody waits for
        self.peak = 0
        self.seen: dict[int, Process] = {}

    def watch(self) -> None:
        """Sample until the last descendant is gone."""
        handle = os.pidfd_open(self.root)
        try:
            while self._reap():
                self._sample()
                if self.ended is None:
                    select.select([handle], [], [], EVERY)  # returns at once when the command ends
                else:
                    time.sleep(EVERY / 4)
                    if time.perf_counter() - self.ended > GRACE:
                        self._kill()
        finally:
            os.close(handle)

    def _reap(self) -> bool:
        """Take in what has ended. Returns whether a descendant is left."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            self.reaped += usage.ru_utime + usage.ru_stime
            self.unreaped.pop(pid, None)
            if pid == self.root:
                self.ended = time.perf_counter()
                self.code = os.waitstatus_to_exitcode(status)

    def _kill(self) -> None:
        for pid in self._descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _sample(self) -> None:
        weigh = self.samples % WEIGHED == 0
        self.samples += 1
        pss = 0
        for pid, (parent, own, whole) in self._descendants().items():
            if _ignores_sigchld(parent):
                self.unreaped[pid] = whole
            process = self.seen.setdefault(pid, Process(""))
            process.cpu = own
            if weigh:
                process.name = _name(pid) or process.name  # workers change theirs
                held = _pss(pid)
                process.pss = max(process.pss, held)
                pss += held
        self.peak = max(self.peak, pss)

    def _descendants(self) -> dict[int, tuple[int, float, float]]:
        """Of each process below this one: parent, own CPU seconds, and those with the children it waited for."""
        found: dict[int, tuple[int, float, float]] = {}
        for name in os.listdir("/proc"):
            if name.isdigit() and (fields := _stat(int(name))) is not None:
                times = [int(t) / TICK for t in fields[11:15]]
                found[int(name)] = (int(fields[1]), sum(times[:2]), sum(times))
        ours, mine = {os.getpid()}, {}
        grown = True
        while grown:
            below = {p: v for p, v in found.items() if v[0] in ours and p not in ours}
            grown = bool(below)
            ours |= below.keys()
            mine |= below
        return mine


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third (state) on; None if it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _name(pid: int) -> str:
    """A short name of a process: its program, or the script or module that Python runs; empty if it is gone."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    told = [w for w in words[1:] if not w.startswith("-")] if "python" in words[0] else words
    return Path(told[0] if told else words[0]).name[:40]


def _ignores_sigchld(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/status") as file:
            mask = next((line.split()[1] for line in file if line.startswith("SigIgn:")), "0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return bool(int(mask, 16) & IGNORES_SIGCHLD)


def _pss(pid: int) -> int:
    """Proportional set size in bytes: what is shared is divided among those that share it."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:")), 0)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
