"""Environments of the peers' own: pinned packages, made the first time."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from x2i.base.errors import X2IError
from x2i.base.files import remove


def ready(folder: Path, pins: Path) -> bool:
    """Whether the environment is there, with these pins."""
    there = folder / "ready.txt"
    return there.is_file() and there.read_bytes() == pins.read_bytes()


def python_of(folder: Path, pins: Path) -> Path:
    """The Python of the environment in `folder`, made if it is not there with these pins. Raises X2IError."""
    python = folder / "bin" / "python"
    if ready(folder, pins):
        return python
    remove(folder)
    uv = [sys.executable, "-m", "uv"]
    for command in (
        [*uv, "venv", "--quiet", "--python", sys.executable, str(folder)],
        # --python by its full path: uv would else take the environment that it runs in itself
        [*uv, "pip", "install", "--quiet", "--python", str(python), "--requirement", str(pins)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise X2IError(f"the peers' environment could not be made:\n{done.stderr.strip()[-1500:]}")
    shutil.copyfile(pins, folder / "ready.txt")
    return python
