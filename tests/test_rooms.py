"""The house as drawn: imports run one way between the rooms, and `x2i --help` waits for no library."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import x2i

ROOT = Path(x2i.__file__).parent

#: What each room may import, besides itself. Two rooms that may not know each other meet in `corpus`.
MAY_IMPORT = {
    "base": set[str](),
    "corpus": {"base"},
    "model": {"base"},
    "pipelines": {"base", "corpus"},
    "trainer": {"base", "corpus", "model"},
    "cli": {"base", "corpus", "model", "pipelines", "trainer"},
}

#: What tasks may import of annotators: a measure and a table of colours, which are the annotators' own. All else that
#: both use lies beside the folders, as `images` and `regions` do.
TASKS_MAY_IMPORT = ("x2i.pipelines.annotators.quality.colourfulness", "x2i.pipelines.annotators._palette.")

#: Libraries that take long to import: only a command that needs one may wait for it.
HEAVY = {"torch", "transformers", "diffusers", "ray", "duckdb", "pyarrow", "datasets", "webdataset", "cv2", "numpy"}

FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py") if len(path.relative_to(ROOT).parts) > 1)


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, in functions and for type checkers too."""
    package = ("x2i", *path.parent.parts)
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def test_every_room_of_the_plan_is_there_and_no_other() -> None:
    rooms = {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()}
    assert rooms == set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_run_one_way(path: Path) -> None:
    room = path.parts[0]
    for line, name in imported(path):
        parts = name.split(".")
        if parts[0] == "x2i" and len(parts) > 1 and parts[1] in MAY_IMPORT:
            allowed = {room} | MAY_IMPORT[room]
            assert parts[1] in allowed, f"x2i/{path}:{line} imports {name}: `{room}` may import {sorted(allowed)} only"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_annotators_and_tasks_do_not_know_each_other(path: Path) -> None:
    for line, name in imported(path):
        if path.parts[:2] == ("pipelines", "annotators"):
            assert not f"{name}.".startswith("x2i.pipelines.tasks."), (
                f"x2i/{path}:{line}: annotators import no task: {name}"
            )
        if path.parts[:2] == ("pipelines", "tasks") and name.startswith("x2i.pipelines.annotators."):
            assert name.startswith(TASKS_MAY_IMPORT), f"x2i/{path}:{line}: tasks import no annotator: {name}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_says_what_it_is_for(path: Path) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert not tree.body or ast.get_docstring(tree), f"x2i/{path} has no docstring at its top"


def run_help(*command: str) -> tuple[subprocess.Popen[str], str, float]:
    """`x2i … --help` in a process of its own: it, its imports, and its CPU seconds."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "x2i", *command, "--help"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    imports = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process, imports, usage.ru_utime + usage.ru_stime


def test_help_imports_no_heavy_library_and_answers_at_once() -> None:
    process, imports, seconds = run_help()
    assert process.returncode == 0
    modules = set(re.findall(r"^import time:\s+\d+ \|\s+\d+ \|\s+(\S+)$", imports, re.M))
    assert "x2i.cli.main" in modules
    assert not {m.partition(".")[0] for m in modules} & HEAVY
    assert seconds < 1  # of CPU, whatever else the machine does; half a second is the aim


def test_every_command_has_help_with_an_example() -> None:
    from x2i.cli.main import app

    assert app.registered_commands
    for command in app.registered_commands:
        assert command.callback is not None
        text = command.callback.__doc__ or ""
        assert "Example: x2i" in text, f"{command.callback.__name__} shows no example"
