"""Rows that are X2I samples already: what their instruction must agree with."""

from __future__ import annotations

from typing import Any

from x2i.corpus.sample import PLACEHOLDER
from x2i.pipelines.sources.base import Problem


def check(task_type: Any, instruction: Any, inputs: int) -> Problem | None:
    """The problem of a record with so many input images, if it has one.

    Task types are not checked against a list: published ones carry typos, and are kept as they are.
    """
    if not isinstance(task_type, str) or not task_type.strip():
        return Problem("bad_metadata", "no 'task_type'")
    if not isinstance(instruction, str) or not instruction.strip():
        return Problem("bad_instruction", "no 'instruction'")
    numbers = sorted({int(n) for n in PLACEHOLDER.findall(instruction)})
    if numbers != list(range(1, inputs + 1)):
        return Problem("bad_instruction", f"{inputs} input images, but the placeholders' numbers are {numbers}")
    return None
