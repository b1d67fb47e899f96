"""Rows that are X2I samples already: what a published record says, and what its instruction must agree with."""

from __future__ import annotations

from typing import Any, NamedTuple

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


class Published(NamedTuple):
    """A record of OmniGen's, taken apart; `meta` is all but the names of its pictures, `text` the instruction.

    Of a conversation, `output` is the last of its pictures.
    """

    meta: dict[str, Any]
    text: str | None = None
    inputs: tuple[str, ...] = ()
    output: str | None = None
    problem: Problem | None = None


def parsed(record: dict[str, Any]) -> Published:
    """What a published record says, and what is wrong with it.

    It is {"task_type", "instruction", "input_images", "output_image"}; or a conversation as ms-swift has them,
    {"messages", "images"} with no output image, and perhaps {"objects", "rejected_response"}.
    """
    if record.get("messages") and not record.get("output_image"):
        return _conversation(record)
    instruction, inputs, output = (record.get(k) for k in ("instruction", "input_images", "output_image"))
    meta = {k: v for k, v in record.items() if k not in ("input_images", "output_image")}
    text = (instruction.strip() or None) if isinstance(instruction, str) else None
    inputs = inputs or []
    if not isinstance(inputs, list) or not all(isinstance(p, str) and p for p in inputs):
        return Published(meta, text, problem=Problem("bad_metadata", "'input_images' is not a list of paths"))
    problem = check(record.get("task_type"), instruction, len(inputs))
    if output is not None and not isinstance(output, str):
        problem, output = problem or Problem("bad_metadata", "'output_image' is not a path"), None
    elif not output:
        problem = Problem("no_output_image", "a record with no output image (an understanding task)")
    return Published(meta, text, tuple(inputs), output or None, problem)


def _conversation(record: dict[str, Any]) -> Published:
    names = record.get("images") or record.get("input_images") or []
    meta = {k: v for k, v in record.items() if k not in ("images", "input_images", "output_image")}
    if not isinstance(names, list) or not all(isinstance(p, str) and p for p in names):
        return Published(meta, problem=Problem("bad_metadata", "'images' is not a list of paths"))
    if not names:
        return Published(meta, problem=Problem("no_image", "a conversation about no image"))
    return Published(meta, None, tuple(names[:-1]), names[-1])
