"""The command line as a whole: help with examples, nothing heavy on import, exit codes that tell faults apart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.pipelines.builds import recipe, x2i
from x2i.cli.main import app

GROUP = typer.main.get_command(app)
COMMANDS = [
    (name,) if not hasattr(command, "commands") else (name, below)
    for name, command in GROUP.commands.items()  # type: ignore[attr-defined]
    for below in (getattr(command, "commands", None) or [""])
]


def test_the_promised_commands_are_there() -> None:
    names = {" ".join(c).strip() for c in COMMANDS}
    assert {"build", "audit", "verify", "trace", "train", "sample", "demo", "models fetch"} <= names


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_an_example_and_every_option_a_word_of_help(command: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(app, [*command, "--help"], terminal_width=200)
    assert shown.exit_code == 0
    assert "Example: x2i " + " ".join(command) in " ".join(shown.output.split())
    found = GROUP
    for name in command:
        found = found.commands[name]  # type: ignore[attr-defined]
    for parameter in found.params:
        assert getattr(parameter, "help", None), f"{command}: {parameter.name} has no help"


def test_help_imports_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "ray", "duckdb", "pyarrow", "datasets", "cv2", "PIL"]
    code = f"import sys; import x2i.cli.main; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_exit_codes_tell_a_bad_recipe_from_a_failed_run(tmp_path: Path) -> None:
    missing = x2i("build", tmp_path / "none.yaml")
    assert missing.returncode == 2
    assert "no such file" in missing.stderr
    (tmp_path / "photos").mkdir()
    empty = x2i("build", recipe(tmp_path))
    assert empty.returncode == 2
    assert str(tmp_path / "photos") in empty.stderr
    misspelt = tmp_path / "misspelt.yaml"
    misspelt.write_text("nmae: x\n")
    refused = x2i("build", misspelt)
    assert refused.returncode == 2
    assert "nmae: unknown key; did you mean 'name'?" in refused.stderr
    assert "misspelt.yaml" in refused.stderr
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [x\n")
    assert "not valid YAML" in x2i("build", broken).stderr
    assert x2i("audit", tmp_path).returncode in (1, 2)
    for done in (missing, empty, refused):
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
